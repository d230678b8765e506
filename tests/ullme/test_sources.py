"""Every file of ullme/sources/ keeps the contract; then what is particular to each kind."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from ullme.components import component_class, kinds, resolve
from ullme.data import check_records
from ullme.errors import DataError
from ullme.records import Problems, Records, Source, normalise
from ullme.sources.pydocs import PyDocs

FIXTURES = Path(__file__).parent / "fixtures"
HEAVY = {
    "huggingface_hub",
    "trafilatura",
    "pypdfium2",
    "torch",
    "transformers",
    "peft",
    "faiss",
    "mteb",
    "sentence_transformers",
    "mlflow",
    "prefect",
    "pyarrow",
}


LOCAL = [kind for kind in kinds("ullme.sources") if kind != "hub"]
"""A hub has no folder to point at; test_hub_source.py serves one on this machine."""


def specification(kind: str, folder: Path = FIXTURES) -> dict:
    text = (FIXTURES / "sources" / f"{kind}.yaml").read_text().replace("FIXTURES", str(folder))
    return yaml.safe_load(text)


def source(**fields: object) -> Source:
    found = resolve("ullme.sources", fields)
    assert isinstance(found, Source)
    return found


def read(**fields: object) -> tuple[Records, list[str]]:
    problems = Problems()
    records = source(**fields).read(problems)
    check_records(records)
    return records, [str(problem) for problem in problems.found]


def lines(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# the contract, for each file of the folder


@pytest.mark.parametrize("kind", LOCAL)
def test_every_kind_reads_its_fixture_into_valid_records(kind):
    assert issubclass(component_class("ullme.sources", kind), Source)
    records, problems = read(**specification(kind))
    assert records.documents
    assert records.queries
    assert not problems


@pytest.mark.parametrize("kind", LOCAL)
def test_every_kind_reads_the_same_twice(kind):
    assert read(**specification(kind)) == read(**specification(kind))


@pytest.mark.parametrize("kind", LOCAL)
def test_every_kind_fingerprints_contents_and_not_places(kind, tmp_path):
    for name in ("here", "there"):
        subprocess.run(["cp", "-r", str(FIXTURES), str(tmp_path / name)], check=True)
    here, there = source(**specification(kind, tmp_path / "here")), source(**specification(kind, tmp_path / "there"))
    assert here.fingerprint() == there.fingerprint() == here.fingerprint()
    for file in sorted((tmp_path / "there").rglob("*.*")):
        if file.suffix in {".py", ".jsonl", ".tsv", ".parquet", ".md"} and "__pycache__" not in file.parts:
            file.write_bytes(file.read_bytes() + b"\n")
    assert here.fingerprint() != there.fingerprint()


@pytest.mark.parametrize("kind", LOCAL)
def test_every_kind_answers_a_wrong_path_in_one_line(kind, tmp_path):
    wrong = source(**specification(kind, tmp_path / "missing"))
    for call in (wrong.fingerprint, lambda: wrong.read(Problems())):
        with pytest.raises(DataError, match="expected") as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1
        assert "missing" in str(caught.value)


def test_source_modules_import_nothing_heavy():
    modules = ", ".join(f"ullme.sources.{kind}" for kind in kinds("ullme.sources"))
    code = f"import sys, ullme.data, {modules}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=with_path()
    ).stdout.split()
    assert not HEAVY & set(loaded)


def with_path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


# pydocs


@pytest.fixture(scope="module")
def stdlib() -> Records:
    return read(kind="pydocs", candidates="test")[0]


def test_pydocs_gives_enough_held_out_candidates_and_queries(stdlib):
    searchable = [document for document in stdlib.documents if document.searchable]
    assert len(searchable) >= 1200
    assert sum(query.split == "test" for query in stdlib.queries) >= 300
    assert sum(query.split == "train" for query in stdlib.queries) >= 1500
    assert all(document.held_out for document in searchable)


def test_pydocs_puts_no_summary_and_no_source_into_two_splits(stdlib):
    source_of = {document.id: " ".join(document.text.split()) for document in stdlib.documents}
    summaries: dict[str, set] = {}
    sources: dict[str, set] = {}
    for query in stdlib.queries:
        summaries.setdefault(normalise(query.text), set()).add(query.split)
        for document in query.positives:
            sources.setdefault(source_of[document], set()).add(query.split)
    assert all(len(splits) == 1 for splits in summaries.values())
    assert all(len(splits) == 1 for splits in sources.values())
    assert set(sources) == set(source_of.values())


def test_pydocs_splits_by_module_and_holds_demo_answers_out(stdlib):
    split_of = {document.id: document.held_out for document in stdlib.documents}
    assert split_of["shutil.copytree"]
    assert any(name.endswith("datetime.date.fromisoformat") and held for name, held in split_of.items())
    by_module: dict[str, set] = {}
    for query in stdlib.queries:
        by_module.setdefault(query.group, set()).add(query.split)
    assert all(len(splits) == 1 for splits in by_module.values())


def test_pydocs_documents_parse_and_have_lost_their_docstring(stdlib):
    for document in stdlib.documents:
        (definition,) = ast.parse(document.text).body
        assert isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef), document.id


def test_pydocs_candidates_decide_what_is_searchable_and_not_what_is_held_out():
    every, tested = (read(**specification("pydocs"), candidates=candidates)[0].documents for candidates in ("all", "test"))
    assert all(document.searchable for document in every)
    assert [document.searchable for document in tested] == [document.held_out for document in tested]
    assert [document.held_out for document in every] == [document.held_out for document in tested]
    assert 0 < sum(document.held_out for document in every) < len(every)


MODULE = '''
class Stove:
    """A class is no function."""

    @property
    def heat(self):
        """Return the present heat."""
        # a comment stays
        return self._heat

    @heat.setter
    def heat(self, value):
        """Set the present heat."""
        self._heat = value

    def clean(self):
        """Clean the stove thoroughly."""
        raise NotImplementedError("a subclass does it")

    def light(self): "Light the stove's fire."; return self.heat > 0
\x0c
def dig(hole):
    """dig(hole) -> int

    Dig a ``hole`` deeper by one.

    And more.
    """

    def inner():
        """An inner function belongs to its outer one."""
        return hole + 1
    return inner()

def todo():
    """Water all the plants."""

def short():
    """Too short."""
    return 1
'''


def functions(tmp_path: Path, text: str = MODULE, **fields: object) -> dict[str, tuple[str, str]]:
    (tmp_path / "house.py").write_text(text)
    records = read(kind="pydocs", roots=[str(tmp_path)], **fields)[0]
    text_of = {document.id: document.text for document in records.documents}
    return {query.id.removeprefix("q:"): (query.text, text_of[query.id.removeprefix("q:")]) for query in records.queries}


def test_pydocs_takes_functions_with_a_summary_and_real_code(tmp_path):
    found = functions(tmp_path)
    assert list(found) == ["house.Stove.heat", "house.Stove.heat#2", "house.Stove.light", "house.dig"]
    assert found["house.Stove.heat"] == (
        "Return the present heat.",
        "@property\ndef heat(self):\n    # a comment stays\n    return self._heat",
    )
    assert found["house.Stove.light"] == ("Light the stove's fire.", "def light(self): return self.heat > 0")
    assert found["house.dig"][0] == "Dig a hole deeper by one."
    assert found["house.dig"][1].startswith("def dig(hole):\n    def inner():\n")
    assert "belongs to its outer one" in found["house.dig"][1]


def test_pydocs_limits_decide_what_is_taken(tmp_path):
    assert "house.short" in functions(tmp_path, min_words=2)
    longer = MODULE + 'def rake(leaves):\n    """Rake all the leaves that fell in autumn."""\n    return sum(leaves)\n'
    assert list(functions(tmp_path, longer, min_words=6)) == ["house.rake"]
    assert "house.dig" not in functions(tmp_path, max_source_chars=100)
    assert "house.dig" not in functions(tmp_path, max_summary_chars=24)


def test_pydocs_skips_tests_and_files_that_do_not_parse(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "house_test.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("def broken(:\n")
    (tmp_path / "latin.py").write_bytes(b"name = '\xe9'\n")
    assert {name.split(".")[0] for name in functions(tmp_path)} == {"house"}


def test_pydocs_equal_summaries_and_equal_sources_are_positives_of_each_other(tmp_path):
    text = (
        'def a(x):\n    """Add one to it."""\n    return x + 1\n'
        'def b(x):\n    """add one to it"""\n    return 1 + x\n'
        'class C:\n    def a(x):\n        """Increase the number given."""\n        return  x + 1\n'
    )
    (tmp_path / "house.py").write_text(text)
    records = read(kind="pydocs", roots=[str(tmp_path)])[0]
    assert [query.text for query in records.queries] == ["Increase the number given.", "Add one to it."]
    assert all(set(query.positives) == {"house.a", "house.b", "house.C.a"} for query in records.queries)


def test_pydocs_leaves_the_training_side_of_a_shared_text_out(tmp_path):
    text = 'def f(x):\n    """Do the same thing everywhere."""\n    return x\n'
    plain = PyDocs(kind="pydocs", test_share=0.5, dev_share=0)
    names = [f"module{number}" for number in range(8)]
    held = [name for name in names if plain.split_of(name) == "test"]
    assert 0 < len(held) < len(names)
    for name in names:
        (tmp_path / f"{name}.py").write_text(text)
    records = read(kind="pydocs", roots=[str(tmp_path)], test_share=0.5, dev_share=0)[0]
    assert [document.id for document in records.documents] == [f"{name}.f" for name in held]
    assert [query.split for query in records.queries] == ["test"]
    assert records.counts["left_out_of_two_splits"] == len(names) - len(held)


def test_pydocs_a_root_that_is_a_package_splits_by_what_lies_below_it(tmp_path):
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert list(functions(package)) == [f"mine.house.{name}" for name in ("Stove.heat", "Stove.heat#2", "Stove.light", "dig")]


def test_pydocs_salt_and_shares_decide_the_split():
    names = [f"module{number}" for number in range(200)]
    plain = PyDocs(kind="pydocs")
    splits = [plain.split_of(name) for name in names]
    assert 0.2 < splits.count("test") / 200 < 0.4
    assert splits != [PyDocs(kind="pydocs", salt="other").split_of(name) for name in names]
    assert plain.split_of("_pydatetime") == plain.split_of("_datetime") == plain.split_of("datetime")
    with pytest.raises(ValidationError, match="below 1"):
        PyDocs(kind="pydocs", test_share=0.6, dev_share=0.4)


# beir


def test_beir_reads_splits_grades_and_negatives():
    records, problems = read(kind="beir", path=str(FIXTURES / "beir"))
    assert not problems
    queries = {query.id: query for query in records.queries}
    assert {name: query.split for name, query in queries.items()} == {"q1": "test", "q2": "train", "q5": "train"}
    assert queries["q1"].positives == {"d1": 2}
    assert queries["q1"].negatives == ("d2",)
    assert queries["q2"].negatives == ("d1",)
    assert records.counts == {"queries_without_positives": 2, "queries_in_two_splits": 1, "train_pairs": 0}
    assert {document.id: document.content for document in records.documents}["d3"] == "Only a title"


def test_beir_another_file_can_serve_as_a_split():
    records, _ = read(kind="beir", path=str(FIXTURES / "beir"), splits={"test": "graded"})
    assert {query.id: (query.split, dict(query.positives)) for query in records.queries} == {
        "q1": ("test", {"d1": 3}),
        "q5": ("test", {"d4": 1}),
    }
    with pytest.raises(DataError, match=r"expected wrong\.tsv for splits\.test, got graded, test, train"):
        read(kind="beir", path=str(FIXTURES / "beir"), splits={"test": "wrong"})


def test_beir_can_leave_the_split_to_the_hash():
    records, _ = read(kind="beir", path=str(FIXTURES / "beir"), split_by_hash=True)
    assert {query.split for query in records.queries} == {None}
    assert next(query for query in records.queries if query.id == "q1").positives == {"d1": 2}


def test_beir_training_pairs_share_the_corpus_where_texts_are_equal():
    records, _ = read(**specification("beir"))
    documents = {document.id: document for document in records.documents}
    cocoa = next(query for query in records.queries if query.text == "how do I brew cocoa")
    assert "d4" in cocoa.positives
    assert cocoa.split == "train"
    assert [documents[name].searchable for name in cocoa.positives] == [False, True]


def test_beir_names_what_its_folder_lacks(tmp_path):
    lines(tmp_path / "corpus.jsonl")
    with pytest.raises(DataError, match=r"got no queries.jsonl \(found: corpus.jsonl\)"):
        read(kind="beir", path=str(tmp_path))
    lines(tmp_path / "queries.jsonl")
    lines(tmp_path / "qrels" / "validation.tsv")
    with pytest.raises(DataError, match=r"got validation; name yours: splits: \{test: NAME\}"):
        read(kind="beir", path=str(tmp_path))


def test_beir_judgements_of_a_bad_record_are_not_reported_again(tmp_path):
    lines(tmp_path / "corpus.jsonl", {"_id": "d1", "text": ""}, {"_id": "d2", "text": "good"})
    lines(tmp_path / "queries.jsonl", {"_id": "q1", "text": "one"}, {"_id": "q2", "text": "two"}, {"_id": "q3", "text": 3})
    lines(tmp_path / "qrels" / "test.tsv", "q1\td1\t1", "q1\td2\t1", "q2\td1\t1", "q3\td2\t1")
    records, problems = read(kind="beir", path=str(tmp_path))
    assert len(problems) == 2
    assert [(query.id, dict(query.positives)) for query in records.queries] == [("q1", {"d2": 1})]


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("scifact", {"documents": 5183, "train": 809, "dev": 0, "test": 300, "qrels": 919 + 339, "problems": 0}),
        ("cranfield", {"documents": 1398, "train": 0, "dev": 0, "test": 225, "qrels": 1611, "problems": 2}),
        ("cosqa", {"documents": 6267, "train": 0, "dev": 500, "test": 500, "qrels": 1000, "problems": 0}),
        ("squad_sent", {"documents": 6795, "train": 0, "dev": 0, "test": 1000, "qrels": 1001, "problems": 0}),
        ("nl2bash", {"documents": 10624, "train": 0, "dev": 0, "test": 993, "qrels": 997, "problems": 0}),
    ],
)
def test_beir_reads_real_collections(shared_data, name, counts):
    records, problems = read(kind="beir", path=str(shared_data / name))
    found = {split: sum(query.split == split for query in records.queries) for split in ("train", "dev", "test")}
    qrels = sum(len(query.positives) for query in records.queries)
    assert counts == {"documents": len(records.documents), **found, "qrels": qrels, "problems": len(problems)}


def test_beir_reads_real_grades(shared_data):
    records, _ = read(kind="beir", path=str(shared_data / "cranfield"), splits={"test": "graded"})
    assert {grade for query in records.queries for grade in query.positives.values()} == {1, 2, 3, 4}


# jsonl


def test_jsonl_reads_pairs_triplets_and_lists():
    records, problems = read(**specification("jsonl"))
    assert not problems
    content = {document.id: document.content for document in records.documents}
    found = {query.text: query for query in records.queries}
    texts = {text: ([content[d] for d in query.positives], [content[d] for d in query.negatives]) for text, query in found.items()}
    assert texts["how do I brew green tea"] == (["Use water of eighty degrees.", "Do not boil it."], ["Use boiling water."])
    assert texts["how do I brew black tea"] == (["Use boiling water."], ["Use ice.", "Use milk.", "Use oil."])
    cocoa = found["how do I brew cocoa"]
    assert next(iter(cocoa.positives)) == "p1"
    assert cocoa.instruction == "Find a recipe"
    assert {"p1", "p2"} < set(content)
    assert records.counts["pairs"] == 4


def test_jsonl_ids_depend_on_the_text_alone(tmp_path):
    first = {"query": "a question", "pos": ["an answer"]}
    one, _ = read(kind="jsonl", path=str(lines(tmp_path / "one.jsonl", first)))
    two, _ = read(kind="jsonl", path=str(lines(tmp_path / "two.jsonl", {"query": "another", "pos": "more"}, first)))
    assert one.queries[0].id in {query.id for query in two.queries}
    assert one.documents[0] in two.documents


def test_jsonl_takes_several_files_and_refuses_an_empty_folder(tmp_path):
    paths = [str(lines(tmp_path / f"{name}.jsonl", {"query": name, "pos": "answer"})) for name in "ab"]
    assert [query.text for query in read(kind="jsonl", path=paths)[0].queries] == ["a", "b"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"a folder with \*\.jsonl files"):
        read(kind="jsonl", path=str(tmp_path / "empty"))


def test_jsonl_searchable_corpus_keeps_other_passages_for_training():
    records, _ = read(**specification("jsonl"), searchable="corpus")
    searchable = {document.content for document in records.documents if document.searchable}
    assert searchable == {"Milk\nHeat the milk first.", "A passage nobody asked for.", "A passage without an id."}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"pos": ["x"]}, "missing field (expected 'query' or 'anchor', got 'pos')"),
        ({"query": "q", "anchor": "q", "pos": ["x"]}, "field given twice ('query' and 'anchor' mean the same)"),
        ({"query": ["q"], "pos": ["x"]}, "wrong type ('query' must be a string, got list)"),
        ({"query": " ", "pos": ["x"]}, "empty text ('query')"),
        ({"query": "q"}, "no positive (expected 'positive' or 'pos' with at least one passage)"),
        ({"query": "q", "pos": []}, "no positive (expected 'positive' or 'pos' with at least one passage)"),
        ({"query": "q", "pos": ["x", None]}, "wrong type ('pos[1]' must be a string, got NoneType)"),
        ({"query": "q", "pos": {"x": 1}}, "wrong type ('pos' must be a string or a list of strings, got dict)"),
        ({"query": "q", "pos": "x", "negative_1": ""}, "empty text ('negative_1')"),
        (
            {"query": "q", "pos": "x", "neg": ["a"], "neg_scores": [1, 2]},
            "wrong length ('neg_scores' has 2 numbers for 1 passages)",
        ),
        ({"query": "q", "pos": "x", "pos_scores": ["high"]}, "wrong type ('pos_scores' must be a list of numbers)"),
        ({"query": "q", "pos": "x", "split": "validation"}, "unknown split (expected train, dev or test, got 'validation')"),
        ({"query": "first", "pos": "x", "split": "dev"}, "two splits for one query (test before, now dev)"),
        ({"query": "q", "pos": "x", "prompt": 3}, "wrong type ('prompt' must be a string, got int)"),
        ({"query": "a\x00b", "pos": "x"}, "NUL character ('query' at position 1)"),
        ({"query": "q", "pos": "x\ud800"}, "lone surrogate ('pos' has \\ud800 without its other half)"),
    ],
)
def test_jsonl_says_what_is_wrong_with_a_record(tmp_path, record, message):
    path = lines(tmp_path / "pairs.jsonl", {"query": "first", "pos": "x", "split": "test"}, record)
    records, problems = read(kind="jsonl", path=str(path))
    assert problems == [f"{path}:2: {message}"]
    assert [query.text for query in records.queries] == ["first"]


def test_jsonl_a_corpus_alone_is_documents_only(tmp_path):
    corpus = lines(tmp_path / "corpus.jsonl", {"id": "a#1", "text": "one", "parent": "a", "section": "Top > One"}, {"text": "two"})
    records, problems = read(kind="jsonl", corpus=str(corpus))
    assert not problems
    assert not records.queries
    assert [(document.parent, document.section) for document in records.documents] == [("a", "Top > One"), ("", "")]
    with pytest.raises(ValidationError, match="expected `path`, `corpus` or both, got neither"):
        source(kind="jsonl")


METADATA = {"language": "en", "year": 2024, "draft": False, "tags": ["api", "guide"], "none": None}


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def beir_folder(folder: Path, documents: list[dict]) -> Path:
    write_lines(folder / "corpus.jsonl", [{"_id": row["id"], **row} for row in documents])
    write_lines(folder / "queries.jsonl", [{"_id": "q", "text": "a question"}])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("q\ta\t1\n")
    return folder


@pytest.mark.parametrize("kind", ["beir", "jsonl", "parquet"])
def test_metadata_travel_with_a_document(kind: str, tmp_path: Path) -> None:
    documents = [{"id": "a", "text": "first", "metadata": METADATA}, {"id": "b", "text": "second"}]
    if kind == "beir":
        spec = {"path": str(beir_folder(tmp_path, documents))}
    elif kind == "jsonl":
        spec = {"corpus": str(write_lines(tmp_path / "corpus.jsonl", documents))}
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(documents), tmp_path / "corpus.parquet")
        spec = {"corpus": str(tmp_path / "corpus.parquet")}
    records, problems = read(kind=kind, **spec)
    found = {document.id: dict(document.metadata) for document in records.documents}
    assert not problems
    assert found == {"a": {name: value for name, value in METADATA.items() if value is not None}, "b": {}}


def test_metadata_may_be_the_json_of_an_object_in_a_table(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"id": "a", "text": "first", "metadata": '{"year": 2024}'}, {"id": "b", "text": "second", "metadata": "no JSON"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus.parquet")
    records, problems = read(kind="parquet", corpus=str(tmp_path / "corpus.parquet"))
    assert [dict(document.metadata) for document in records.documents] == [{"year": 2024}]
    assert len(problems) == 1
    assert ":2: wrong type ('metadata' must be an object, got str)" in problems[0]


@pytest.mark.parametrize(
    ("metadata", "detail"),
    [
        ([1], "'metadata' must be an object, got list"),
        ({"place": {"lat": 1}}, "'metadata.place' must be a text, a number, true, false or a list of them"),
        ({"tags": ["a", ["b"]]}, "'metadata.tags' must be a text"),
    ],
)
def test_bad_metadata_are_named_by_line(metadata: object, detail: str, tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "first"}, {"id": "b", "text": "second", "metadata": metadata}]
    records, problems = read(kind="jsonl", corpus=str(write_lines(tmp_path / "corpus.jsonl", rows)))
    assert [document.id for document in records.documents] == ["a"]
    assert len(problems) == 1
    assert f"corpus.jsonl:2: wrong type ({detail}" in problems[0]


def test_a_file_of_a_folder_has_its_place_as_metadata(tmp_path: Path) -> None:
    (tmp_path / "guide").mkdir()
    (tmp_path / "guide" / "Install.MD").write_text("# Install\n\nRun the command and wait for it.\n")
    records, _ = read(kind="text", path=str(tmp_path))
    assert {tuple(document.metadata.items()) for document in records.documents} == {
        (("file", "guide/Install.MD"), ("folder", "guide"), ("ending", "md"))
    }
