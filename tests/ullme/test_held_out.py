"""Queries made from documents: what becomes one, what leaves the embedded text, and that growth changes nothing else."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from ullme.artifacts import ArtifactRef, Store
from ullme.data import PREPARE, DataConfig, Dataset, check_records
from ullme.held_out import HeldOut, hold_out
from ullme.passages import sentences
from ullme.records import Document, Query, Records, normalise
from ullme.splits import side_share

PROSE = (
    "The kettle stands on the left side of the stove. It is filled with water every single morning. "
    "Nobody knows who bought it first."
)


def held(documents: Sequence[Document], mode: HeldOut = "auto") -> tuple[dict[str, Document], dict[str, Query], dict[str, int]]:
    """(documents by id, queries by text, counts)."""
    records, counts = hold_out(Records(list(documents), []), mode)
    check_records(records)
    assert [document.id for document in records.documents] == [document.id for document in documents]
    return {document.id: document for document in records.documents}, {query.text: query for query in records.queries}, counts


def passages(parent: str, *sections: tuple[str, str], title: str = "") -> list[Document]:
    return [
        Document(f"{parent}#{number}", text, title, parent=parent, section=section)
        for number, (section, text) in enumerate(sections, start=1)
    ]


# titles


def test_a_title_becomes_the_query_of_its_document_and_is_no_longer_embedded():
    documents, queries, counts = held([Document("d", "Boil the water.", "Making tea")])
    assert counts == {"held_out_titles": 1, "held_out_sentences": 0}
    assert documents["d"].content == "Boil the water."
    assert documents["d"].section == "Making tea"
    assert queries["Making tea"].positives == {"d": 1}
    assert queries["Making tea"].group == "d"


def test_headings_become_queries_that_all_passages_below_them_answer():
    given = passages(
        "guide.md",
        ("", "Intro."),
        ("Install > On a Linux machine", "One."),
        ("Install > On a Linux machine", "Two."),
        ("Install > Windows", "Three."),
        title="The guide",
    )
    documents, queries, _ = held(given)
    assert {text: list(query.positives) for text, query in queries.items()} == {
        "The guide": ["guide.md#1"],
        "On a Linux machine": ["guide.md#2", "guide.md#3"],
        "The guide: Windows": ["guide.md#4"],
    }
    assert {query.group for query in queries.values()} == {"guide.md"}
    assert documents["guide.md#2"].section == "The guide > Install > On a Linux machine"
    assert not any("guide" in document.content for document in documents.values())


def test_a_page_of_a_pdf_is_no_heading():
    given = passages("a.pdf", ("page 1", "One."), ("page 2", "Two."), ("1 The third chapter > page 3", "Three."), title="A report")
    queries = held(given)[1]
    assert {text: len(query.positives) for text, query in queries.items()} == {"A report": 2, "1 The third chapter": 1}


def test_a_short_heading_without_a_title_and_a_title_without_text_ask_nothing():
    _, queries, _ = held([*passages("a.md", ("Usage", "Too short."), ("On the road", "Go.")), Document("t", "", "Only a title")])
    assert list(queries) == ["On the road"]
    assert held([Document("t", "", "Only a title")])[0]["t"].content == "Only a title"
    assert held([Document("t", "Text.", "***")])[1] == {}


def test_a_title_that_several_share_is_one_query_with_all_of_their_passages():
    given = [Document(f"d{number}", f"Text {number}.", "Getting started" if number else "getting Started!") for number in range(6)]
    queries = held(given)[1]
    (query,) = queries.values()
    assert set(query.positives) == {document.id for document in given}
    assert query.group == min((document.id for document in given), key=side_share)


# sentences


def test_without_a_title_one_sentence_becomes_the_query_of_its_passage():
    documents, queries, counts = held([Document("d", PROSE)])
    assert counts == {"held_out_titles": 0, "held_out_sentences": 1}
    ((text, query),) = queries.items()
    assert text in sentences(PROSE)
    assert text not in documents["d"].text
    assert [sentence for sentence in sentences(PROSE) if sentence != text] == sentences(documents["d"].text)
    assert query.positives == {"d": 1}


def test_a_sentence_that_two_passages_repeat_leaves_both_and_both_answer():
    first, second = "Some words that are only here, in the first one.", "Other words that are only here, in the second one."
    shared = "This is the sentence at the end and the beginning."
    found = set()
    for number in range(30):
        given = passages(f"{number}.txt", ("", f"{first[:-1]} {number}. {shared}"), ("", f"{shared} {second[:-1]} {number}."))
        documents, queries, _ = held(given)
        (text,) = queries
        found.add(text == shared)
        if text == shared:
            assert len(queries[text].positives) == 2
        assert not any(text in document.text for document in documents.values())
    assert found == {True, False}


def test_only_prose_that_can_be_spared_is_taken():
    for text in (
        "One sentence that is all there is here.",
        "x = 1\ny = compute(x, 2, 3, 4, 5, 6, 7)",
        "Too short. So is this. And this.",
    ):
        documents, queries, counts = held([Document("d", text)])
        assert (documents["d"].text, queries, counts["held_out_sentences"]) == (text, {}, 0)


def test_what_surrounds_a_sentence_stays_as_it_was():
    text = f"First paragraph, which is here.\n\n{PROSE}\n\n    code = stays()\n"
    for number in range(20):
        documents, queries, _ = held([Document("d", text.replace("left", f"left{number}"))])
        (taken,) = queries
        assert documents["d"].text.endswith("\n\n    code = stays()\n")
        assert documents["d"].text.startswith("First paragraph, which is here.\n\n") or taken.startswith("First")
        assert "  " not in documents["d"].text.replace("    code", "")


def test_documents_that_share_most_sentences_give_one_query():
    common = " ".join(f"This is sentence {number} of the licence that everybody has." for number in range(40))
    given = [Document(f"d{number}", f"{common} And one of its own, number {number} of ten.") for number in range(10)]
    queries = held(given)[1]
    assert len(queries) <= 2
    assert max(len(query.positives) for query in queries.values()) >= 9


def test_a_long_document_gives_a_sentence_for_every_sixteen_passages_each_on_a_side_of_its_own(monkeypatch: pytest.MonkeyPatch):
    texts = [
        ("", f"{PROSE} This is the passage that has the number {number}.".replace("left", f"left{number}")) for number in range(100)
    ]
    documents, queries, counts = held(passages("book.txt", *texts))
    assert counts["held_out_sentences"] == 6
    answers = [answer for query in queries.values() for answer in query.positives]
    assert len(answers) == len(set(answers))
    for text, query in queries.items():
        assert not any(text in documents[answer].text for answer in query.positives)
    assert len({query.group for query in queries.values()}) == 6
    assert held(passages("book.txt", *texts[:31]))[2]["held_out_sentences"] == 1
    monkeypatch.setattr("ullme.held_out.MOST_SENTENCES", 4)
    assert held(passages("book.txt", *texts))[2]["held_out_sentences"] == 4


# modes


def test_modes_choose_what_is_taken():
    given = [Document("t", PROSE, "A title"), Document("s", PROSE.replace("o", "u"))]
    assert held(given)[2] == {"held_out_titles": 1, "held_out_sentences": 1}
    assert held(given, "titles")[2] == {"held_out_titles": 1, "held_out_sentences": 0}
    assert held(given, "sentences")[2] == {"held_out_titles": 0, "held_out_sentences": 2}
    assert held(given, "sentences")[0]["t"].title == "A title"
    assert held(given, "none")[0] == {document.id: document for document in given}


# growth


def corpus(generator: random.Random, parents: Iterable[int]) -> list[Document]:
    """Documents that depend on their number alone, some of them with titles that others have too."""
    documents = []
    for parent in parents:
        own = random.Random(parent)
        title = own.choice(["", "", f"Title {parent} of many", "A shared title"])
        sections = [f"Heading {own.randint(0, 30)} here" if own.random() < 0.4 else "" for _ in range(3)]
        texts = [
            " ".join(f"Word{own.randint(0, 99)} is what sentence {own.randint(0, 99)} is about." for _ in range(4))
            for _ in sections
        ]
        documents += passages(f"p{parent}", *zip(sections, texts, strict=True), title=title)
    generator.shuffle(documents)
    return documents


@pytest.mark.parametrize("mode", ["auto", "titles", "sentences"])
@pytest.mark.parametrize("seed", range(5))
def test_a_new_document_changes_no_other_and_takes_no_query_away(seed, mode):
    generator = random.Random(seed)
    few, queries_before, _ = held(corpus(generator, range(40)), mode)
    many, queries_after, _ = held(corpus(generator, range(60)), mode)
    assert {name: many[name] for name in few} == few
    for text, query in queries_before.items():
        later = queries_after[text]
        assert later.id == query.id
        assert query.positives.items() <= later.positives.items()
        assert side_share(later.group) <= side_share(query.group)
        if later.positives == query.positives:
            assert later == query
    without = [document for document in corpus(generator, range(40)) if document.parent != "p7"]
    assert {name: document for name, document in few.items() if document.parent != "p7"} == held(without, mode)[0]


# the data stage


def produce(tmp_path: Path, *rows: dict[str, str], **fields: object) -> ArtifactRef:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = DataConfig.model_validate({"source": {"kind": "jsonl", "corpus": str(path)}, **fields}).resolved()
    return Store(tmp_path / "store").produce(PREPARE, section, {}, seed=0)


ROWS = [
    {
        "id": f"d{number}#{part}",
        "parent": f"d{number}",
        "title": f"Subject {number}",
        "text": f"Part {part} of it.",
        "section": section,
    }
    for number in range(60)
    for part, section in enumerate(("", f"How number {number} is made", f"Where number {number} is kept"))
]


def test_documents_alone_get_queries_and_are_told_what_they_are_worth(tmp_path, caplog):
    ref = produce(tmp_path, *ROWS)
    assert (ref.meta["held_out_titles"], ref.meta["held_out_sentences"]) == (180, 0)
    (line,) = [record.message for record in caplog.records if "has no queries" in record.message]
    assert "180 titles and headings and 0 sentences" in line
    assert "not scores on users' questions" in line
    data = Dataset.open(ref.path)
    assert all(document.title == "" and document.parent and document.section.startswith("Subject") for document in data.documents())
    sides: dict[str, set[str]] = {}
    for split in ("train", "dev", "test"):
        for query in data.queries(split):
            assert normalise(query.text) not in normalise(data.document(next(iter(query.positives))).content)
            for name in query.positives:
                sides.setdefault(data.document(name).parent, set()).add(split)
    assert all(len(side) == 1 for side in sides.values())
    assert ref.meta["queries_test"] > 0


def test_the_section_decides_and_queries_of_the_source_come_first(tmp_path, caplog):
    none = produce(tmp_path, *ROWS, held_out="none")
    assert [none.meta[f"queries_{split}"] for split in ("train", "dev", "test")] == [0, 0, 0]
    assert Dataset.open(none.path).document("d3#1").title == "Subject 3"
    assert "gives no test queries" in caplog.text
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"query": "q", "pos": "Part 1 of it."}\n')
    source = {"kind": "jsonl", "path": str(pairs), "corpus": str(tmp_path / "corpus.jsonl")}
    section = DataConfig.model_validate({"source": source}).resolved()
    ref = Store(tmp_path / "store").produce(PREPARE, section, {}, seed=0)
    assert (ref.meta["held_out_titles"], ref.meta["held_out_sentences"]) == (0, 0)
    assert Dataset.open(ref.path).document("d3#1").title == "Subject 3"
