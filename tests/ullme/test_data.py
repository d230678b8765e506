"""The data stage: bad records, splits, caps, the artifact and its key."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from ullme.artifacts import ArtifactRef, Store
from ullme.data import PREPARE, DataConfig, Dataset, check_records, read_examples
from ullme.errors import ArtifactError, ContractError, DataError
from ullme.records import Document, Query, Records, Split, normalise

FIXTURES = Path(__file__).parent / "fixtures"


def lines(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = [
        row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode() for row in rows
    ]
    path.write_bytes(b"".join(row + b"\n" for row in encoded))
    return path


def produce(store: Store, source: dict, **fields: object) -> ArtifactRef:
    section = DataConfig.model_validate({"source": source, **fields}).resolved()
    return store.produce(PREPARE, section, {}, seed=0)


def pairs(path: Path, texts: Sequence[str]) -> dict:
    return {"kind": "jsonl", "path": str(lines(path, *({"query": text, "pos": f"answer to {text}"} for text in texts)))}


BEIR = {"kind": "beir", "path": str(FIXTURES / "beir")}


# bad records


@pytest.fixture
def bad_folder(tmp_path: Path) -> tuple[Path, list[str]]:
    """A BEIR folder with ten and more kinds of bad record, and what should be said of each."""
    folder = tmp_path / "bad"
    lines(
        folder / "corpus.jsonl",
        {"_id": "d1", "text": "a good document"},
        '{"_id": "d2", "text": ',
        '["not", "an object"]',
        {"_id": 3, "text": "a number as id"},
        {"text": "no id at all"},
        {"_id": "d6", "title": "", "text": "  "},
        {"_id": "d1", "text": "the same id again"},
        b'{"_id": "d8", "text": "caf\xe9"}',
        {"_id": "d9", "text": "a \x00 inside"},
        '{"_id": "d10", "text": "half a pair: \\ud83d"}',
        {"_id": "d11", "text": "another good one"},
    )
    lines(folder / "queries.jsonl", {"_id": "q1", "text": "good?"}, {"_id": "q2", "text": ["list"]}, {"_id": "q3", "text": "fine"})
    lines(
        folder / "qrels" / "test.tsv",
        "query-id\tcorpus-id\tscore",
        "q1\td1\t1",
        "q1\td11\tvery",
        "q9\td1\t1",
        "q3\td99\t1",
        "q3",
        "q3\td11\t2",
        "q3\td11\t1",
    )
    corpus, queries, qrels = folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / "test.tsv"
    return folder, [
        f"{corpus}:2: bad JSON",
        f"{corpus}:3: not an object",
        f"{corpus}:4: wrong type",
        f"{corpus}:5: missing field",
        f"{corpus}:6: empty text",
        f"{corpus}:7: duplicate id",
        f"{corpus}:8: invalid UTF-8",
        f"{corpus}:9: NUL character",
        f"{corpus}:10: lone surrogate",
        f"{queries}:2: wrong type",
        f"{qrels}:3: non-integer score",
        f"{qrels}:4: unknown query",
        f"{qrels}:5: unknown document",
        f"{qrels}:6: wrong number of columns",
        f"{qrels}:8: judged twice",
    ]


def test_every_bad_record_is_named_by_path_and_line_in_one_error(store, bad_folder):
    folder, expected = bad_folder
    with pytest.raises(DataError) as caught:
        produce(store, {"kind": "beir", "path": str(folder)})
    *found, summary = caught.value.problems
    assert [problem.partition(" (")[0] for problem in found] == expected
    assert len({problem.split(": ")[1].partition(" (")[0] for problem in found}) >= 10
    assert summary.startswith("15 bad records (wrong type 2, ")
    assert "on_bad_record: skip" in summary


def test_skipping_bad_records_uses_the_rest_and_lists_them(store, bad_folder, caplog):
    folder, expected = bad_folder
    ref = produce(store, {"kind": "beir", "path": str(folder)}, on_bad_record="skip")
    assert ref.meta["skipped"] == 15
    assert "15 bad records skipped (wrong type 2, " in caplog.text
    skipped = [json.loads(line) for line in (ref.path / "logs" / "skipped.jsonl").read_text().splitlines()]
    assert [f"{row['path']}:{row['line']}: {row['cause']}" for row in skipped] == expected
    data = Dataset.open(ref.path)
    assert [document.id for document in data.documents()] == ["d1", "d11"]
    assert {query.id: query.positives for query in data.queries("test")} == {"q1": {"d1": 1}, "q3": {"d11": 2}}


def test_a_flood_of_bad_records_is_cut_short_on_screen_and_kept_in_a_file(store, tmp_path):
    path = lines(tmp_path / "flood.jsonl", *["{"] * 60)
    with pytest.raises(DataError) as caught:
        produce(store, {"kind": "jsonl", "path": str(path)})
    assert len(caught.value.problems) == 52
    assert caught.value.problems[50].startswith("... and 10 more, all of them in ")
    listing = Path(caught.value.problems[50].split(" in ")[1])
    assert len(listing.read_text().splitlines()) == 60


def test_nothing_usable_is_an_error_even_when_bad_records_are_skipped(store, tmp_path):
    path = lines(tmp_path / "empty.jsonl", "{")
    with pytest.raises(DataError, match="no usable document"):
        produce(store, {"kind": "jsonl", "path": str(path)}, on_bad_record="skip")


# splits


def splits(store: Store, source: dict, **fields: object) -> dict[str, Split]:
    data = Dataset.open(produce(store, source, **fields).path)
    return {query.text: split for split in ("train", "dev", "test") for query in data.queries(split)}


def test_a_query_keeps_its_split_as_data_grows_and_shares_change(store, tmp_path):
    texts = [f"question number {number}" for number in range(400)]
    few = splits(store, pairs(tmp_path / "few.jsonl", texts[:200]), test_share=0.2, dev_share=0.1)
    many = splits(store, pairs(tmp_path / "many.jsonl", texts[::-1]), test_share=0.2, dev_share=0.1)
    assert {text: many[text] for text in few} == few
    assert 0.1 < list(many.values()).count("test") / 400 < 0.3
    more_dev = splits(store, pairs(tmp_path / "dev.jsonl", texts), test_share=0.2, dev_share=0.4)
    assert {text for text in texts if more_dev[text] == "test"} == {text for text in texts if many[text] == "test"}
    assert list(more_dev.values()).count("dev") > list(many.values()).count("dev")


def test_near_duplicates_and_groups_fall_on_one_side(store, tmp_path):
    rows = [{"query": f"What is item {n}{end}", "pos": f"answer {n}"} for n in range(60) for end in ("", "?", " !")]
    rows += [{"query": f"part {n} of {group}", "pos": "x", "group": f"group {group}"} for group in range(30) for n in range(3)]
    found = splits(store, {"kind": "jsonl", "path": str(lines(tmp_path / "p.jsonl", *rows))}, test_share=0.4)
    sides: dict[str, set] = {}
    for text, split in found.items():
        sides.setdefault(text.split(" of ")[-1] if text.startswith("part") else normalise(text), set()).add(split)
    assert all(len(side) == 1 for side in sides.values())
    assert len(sides) == 90
    assert set(found.values()) == {"train", "dev", "test"}


def test_a_training_query_that_is_also_a_test_query_goes(store, tmp_path):
    rows = [{"query": "Same words", "pos": "a", "split": "train"}, {"query": "same words?", "pos": "b", "split": "test"}]
    ref = produce(store, {"kind": "jsonl", "path": str(lines(tmp_path / "p.jsonl", *rows))})
    assert (ref.meta["queries_train"], ref.meta["queries_test"], ref.meta["queries_on_two_sides"]) == (0, 1, 1)


def test_shares_must_leave_something_to_train_on():
    with pytest.raises(ValidationError, match=r"dev_share \+ test_share must be below 1, got 1.1"):
        DataConfig.model_validate({"source": BEIR, "dev_share": 0.3, "test_share": 0.8})


# caps


def test_caps_keep_nested_subsets_of_each_split(store, tmp_path):
    source = pairs(tmp_path / "p.jsonl", [f"question {number}" for number in range(300)])
    shares = {"test_share": 0.3, "dev_share": 0.3}
    whole = splits(store, source, **shares)
    small = splits(store, source, **shares, max_test_queries=5, max_dev_queries=6, max_train_queries=7)
    large = splits(store, source, **shares, max_test_queries=20, max_dev_queries=6, max_train_queries=7)
    assert [list(small.values()).count(split) for split in ("test", "dev", "train")] == [5, 6, 7]
    assert small.items() <= large.items() <= whole.items()


def test_capping_documents_never_drops_an_answer_of_a_test_query(store, tmp_path):
    source = pairs(tmp_path / "p.jsonl", [f"question {number}" for number in range(200)])
    ref = produce(store, source, max_documents=60, test_share=0.2, dev_share=0.1)
    data = Dataset.open(ref.path)
    searchable = {document.id for document in data.corpus()}
    assert len(searchable) == 60
    assert all(query.positives.keys() <= searchable for split in ("dev", "test") for query in data.queries(split))
    assert all(data.document(name) for query in data.queries("train") for name in query.positives)
    tight = Dataset.open(produce(store, source, max_documents=1, test_share=0.2, dev_share=0.1).path)
    needed = {name for split in ("dev", "test") for query in tight.queries(split) for name in query.positives}
    assert {document.id for document in tight.corpus()} == needed


def test_documents_nobody_judged_go_beyond_the_cap(store):
    data = Dataset.open(produce(store, BEIR, max_documents=1).path)
    assert [document.id for document in data.corpus()] == ["d1"]
    assert {document.id for document in data.documents()} == {"d1", "d2", "d4"}
    assert data.queries("test")[0].negatives == ("d2",)


def test_answers_of_test_queries_are_searchable_whatever_the_source_says(store, tmp_path):
    path = lines(tmp_path / "p.jsonl", *({"query": side, "pos": f"for {side}", "split": side} for side in ("train", "test")))
    corpus = lines(tmp_path / "corpus.json", {"text": "a document"})
    ref = produce(store, {"kind": "jsonl", "path": str(path), "corpus": str(corpus), "searchable": "corpus"})
    assert {document.text for document in Dataset.open(ref.path).corpus()} == {"a document", "for test"}


# the artifact


def test_the_artifact_gives_back_what_the_source_said(store):
    data = Dataset.open(produce(store, BEIR).path)
    assert [document.id for document in data.documents()] == ["d1", "d2", "d3", "d4"]
    assert data.document("d1").content == "Tea\nTea is made of leaves and hot water."
    (query,) = data.queries("test")
    assert (query.id, query.text, query.split) == ("q1", "what is tea made of", "test")
    assert (query.positives, query.negatives) == ({"d1": 2}, ("d2",))
    assert not data.queries("dev")


def test_counts_are_whole_numbers_for_people(store):
    ref = produce(store, BEIR)
    assert all(type(count) is int for count in ref.meta.values())
    expected = {"documents": 4, "searchable": 4, "queries_train": 2, "queries_dev": 0, "queries_test": 1, "qrels": 3, "skipped": 0}
    assert expected.items() <= ref.meta.items()


def test_duplicates_are_counted(store, tmp_path):
    rows = [{"query": "One thing", "pos": ["Same.", "same"]}, {"query": "one thing!", "pos": "other"}]
    ref = produce(store, {"kind": "jsonl", "path": str(lines(tmp_path / "p.jsonl", *rows))})
    assert (ref.meta["duplicate_documents"], ref.meta["duplicate_queries"]) == (1, 1)


def test_the_same_records_give_the_same_bytes(tmp_path):
    for source in (BEIR, {"kind": "pydocs", "roots": [str(FIXTURES / "packages")]}):
        first, second = (produce(Store(tmp_path / name), source) for name in ("one", "two"))
        assert first.digest == second.digest


def test_held_out_documents_are_kept_from_training(store):
    data = Dataset.open(produce(store, {"kind": "pydocs", "roots": [str(FIXTURES / "packages")], "test_share": 0.5}).path)
    assert 0 < len(data.training_documents()) < len(data.documents())
    held = {document.id for document in data.documents()} - {document.id for document in data.training_documents()}
    assert held == {name for query in data.queries("test") for name in query.positives}


def test_opening_something_else_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match=r"expected a data artifact, but there is no documents\.arrow"):
        Dataset.open(tmp_path)


# the key


def test_the_key_follows_the_contents_of_the_files(store, tmp_path):
    source = pairs(tmp_path / "p.jsonl", ["one", "two"])
    section = DataConfig.model_validate({"source": source})
    first = store.key(PREPARE, section.resolved(), {}, seed=0)
    assert store.key(PREPARE, section.resolved().resolved(), {}, seed=0) == first
    pairs(tmp_path / "p.jsonl", ["one", "three"])
    assert store.key(PREPARE, section.resolved(), {}, seed=0) != first


def test_a_pinned_source_refuses_other_contents(tmp_path):
    source = pairs(tmp_path / "p.jsonl", ["one"])
    pinned = DataConfig.model_validate({"source": source}).resolved()
    pairs(tmp_path / "p.jsonl", ["two"])
    with pytest.raises(DataError, match=r"the files changed: .* remove data\.source_digest"):
        pinned.resolved()


@pytest.mark.parametrize(
    "changed",
    [
        {"on_bad_record": "skip"},
        {"held_out": "none"},
        {"dev_share": 0.06},
        {"test_share": 0.2},
        {"max_train_queries": 9},
        {"max_dev_queries": 9},
        {"max_test_queries": 9},
        {"max_documents": 9},
        {"source": BEIR | {"split_by_hash": True}},
    ],
)
def test_every_field_changes_the_key(store, changed):
    keys = {store.key(PREPARE, DataConfig.model_validate({"source": BEIR} | change), {}, seed=0) for change in ({}, changed)}
    assert len(keys) == 2


# the contract of a source


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([Query("q", "x", positives={"d": 1}), Query("q", "y", positives={"d": 1})], "unique"),
        ([Query("q", "x", positives={"other": 1})], "'other', which is no document"),
        ([Query("q", "x", positives={"d": 1}, negatives=("other",))], "'other', which is no document"),
        ([Query("q", "x")], "at least one positive"),
        ([Query("q", "x", positives={"d": 0})], "a grade above 0"),
        ([Query("q", "x", "validation", positives={"d": 1})], "expected split train, dev, test or None"),  # pyright: ignore
    ],
)
def test_a_source_that_breaks_its_contract_is_told(queries, message):
    with pytest.raises(ContractError, match=message):
        check_records(Records([Document("d", "text")], queries))


# examples


def mined(folder: Path, *rows: tuple[str, list[str], list[float]]) -> Path:
    folder.mkdir()
    columns = {
        "query_id": pa.array([row[0] for row in rows], pa.string()),
        "doc_ids": pa.array([row[1] for row in rows], pa.list_(pa.string())),
        "scores": pa.array([row[2] for row in rows], pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(columns), folder / "negatives.parquet")
    return folder


def test_examples_carry_ids_beside_texts(store):
    examples = read_examples(produce(store, BEIR).path)
    assert [example.query_id for example in examples] == ["q2", "q5"]
    assert examples[0].query == "what is coffee made of"
    assert (examples[0].positive_ids, examples[0].positives) == (("d2",), ("Coffee is made of roasted beans.",))
    assert (examples[0].negative_ids, examples[0].negatives) == (("d1",), ("Tea\nTea is made of leaves and hot water.",))
    assert examples[0].scores is None


def test_examples_take_mined_negatives_after_the_given_ones(store, tmp_path):
    negatives = mined(tmp_path / "n", ("q2", ["d3", "d2", "d1"], [0.5, 0.4, 0.3]), ("q5", ["d1", "d2"], [0.5, 0.25]))
    coffee, cocoa = read_examples(produce(store, BEIR).path, negatives)
    assert coffee.negative_ids == ("d1", "d3")
    assert "d2" not in coffee.negative_ids
    assert coffee.scores == pytest.approx((0.3, 0.5))
    assert (cocoa.negative_ids, cocoa.scores) == (("d1", "d2"), (0.5, 0.25))
    partly = mined(tmp_path / "partly", ("q2", ["d3"], [0.5]))
    assert read_examples(produce(store, BEIR).path, partly)[0].scores is None


def test_mined_negatives_of_other_data_are_refused(store, tmp_path):
    for number, row in enumerate([("q99", ["d1"], [0.5]), ("q2", ["d99"], [0.5])]):
        with pytest.raises(ContractError, match=r"name '[qd]99', which the data .* does not have"):
            read_examples(produce(store, BEIR).path, mined(tmp_path / str(number), row))


def test_positives_come_best_grade_first(store, tmp_path):
    folder = tmp_path / "graded"
    lines(folder / "corpus.jsonl", *({"_id": name, "text": name} for name in "abc"))
    lines(folder / "queries.jsonl", {"_id": "q", "text": "which"})
    lines(folder / "qrels" / "train.tsv", "q\ta\t1", "q\tb\t3", "q\tc\t2")
    (example,) = read_examples(produce(store, {"kind": "beir", "path": str(folder)}).path)
    assert example.positives == ("b", "c", "a")
