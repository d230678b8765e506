"""The `text` source: files of every kind become passages; what gives no text is a problem, never a traceback."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from ullme.data import check_records
from ullme.errors import DataError
from ullme.passages import count_tokens
from ullme.records import Document, Problems, Records
from ullme.sources._articles import Unreadable, read_article
from ullme.sources.text import Text

GUIDE = """# The guide

What stands before any heading.

## Install

Install it with the package manager of your choice.

### On Linux

Use the one that came with it.

## Remove

Remove it in the same way.
"""


def read(folder: Path, **fields: object) -> tuple[Records, list[str]]:
    problems = Problems()
    records = Text.model_validate({"kind": "text", "path": folder, **fields}).read(problems)
    check_records(records)
    return records, [str(problem).replace(f"{folder}/", "") for problem in problems.found]


def write(folder: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def pdf(*pages: str, outline: dict[str, int] | None = None, title: str = "", locked: bool = False) -> bytes:
    """A PDF of these pages. outline: heading -> page from 0. locked: needs a password that nobody knows."""
    marks = list((outline or {}).items())
    first_page, first_mark = 6, 6 + 2 * len(pages)
    kids = " ".join(f"{first_page + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R /Outlines 5 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        f"<< /Title ({title}) >>",
        f"<< /Type /Outlines /First {first_mark} 0 R /Last {first_mark + len(marks) - 1} 0 R >>" if marks else "<< >>",
    ]
    for number, text in enumerate(pages):
        lines = "".join(f"({line}) Tj 0 -14 Td " for line in text.split("\n"))
        content = f"BT /F1 12 Tf 50 750 Td {lines}ET"
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents {first_page + 2 * number + 1} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>",
            f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
        ]
    for place, (heading, page) in enumerate(marks):
        around = f"/Next {first_mark + place + 1} 0 R " if place + 1 < len(marks) else ""
        objects.append(f"<< /Title ({heading}) /Parent 5 0 R {around}/Dest [{first_page + 2 * page} 0 R /Fit] >>")
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode()
    secret = (
        f" /Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <{'17' * 32}> /U <{'2b' * 32}> >> /ID [<00> <00>]" if locked else ""
    )
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    return (
        data
        + (
            f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
            f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R /Info 4 0 R{secret} >>\nstartxref\n{len(data)}\n%%EOF\n"
        ).encode()
    )


def places(records: Records) -> dict[str, str]:
    return {document.id: document.section for document in records.documents}


# what a file becomes


def test_markdown_becomes_passages_below_its_headings(tmp_path):
    records, problems = read(write(tmp_path, docs__guide_md=GUIDE))
    assert not problems
    assert {document.parent for document in records.documents} == {"docs/guide.md"}
    assert {document.title for document in records.documents} == {"The guide"}
    assert places(records) == {
        "docs/guide.md#1": "", "docs/guide.md#2": "Install", "docs/guide.md#3": "Install > On Linux", "docs/guide.md#4": "Remove",
    }  # fmt: skip
    assert records.documents[2].content == "The guide\nUse the one that came with it."


def test_markdown_without_markup_that_nobody_reads(tmp_path):
    text = (
        "---\ntitle: 'From the front matter'\n---\n[![build](https://ci.example/badge.svg)](https://ci.example)\n\n"
        "# A *second* `title`\n\nSee [the manual](https://example.org/manual).\n<!-- nothing -->\n\n"
        "```python\n# no heading\nx = [a](b)\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    )
    records, _ = read(write(tmp_path, a_md=text))
    assert [document.title for document in records.documents] == ["From the front matter"] * 2
    first, second = records.documents
    assert (first.text, second.section) == ("build", "A second title")
    assert second.text == "See the manual.\n\n# no heading\nx = [a](b)\n\n| a | b |\n|---|---|\n| 1 | 2 |"


def test_a_page_keeps_its_main_content_and_its_headings(tmp_path):
    folder = Path(__file__).parent / "fixtures" / "folder"
    records, problems = read(folder, include=["more"])
    assert not problems
    assert {document.title for document in records.documents} == {"Making coffee"}
    assert list(places(records).values()) == ["", "With a filter", "In a pot"]
    assert not any("Home" in document.text or "rights" in document.text for document in records.documents)


def test_a_pdf_is_read_page_by_page_in_the_sections_of_its_outline(tmp_path):
    data = pdf(
        "A report on tea\n1 Leaves\nThey grow on a bush.",
        "They are picked by hand.\n2 Water\nIt must be soft.",
        "It must be fresh, too.",
        outline={"1 Leaves": 0, "Water": 1},
        title="A report on tea",
    )
    records, problems = read(write(tmp_path, tea_pdf=data))
    assert not problems
    assert {document.title for document in records.documents} == {"A report on tea"}
    assert [(document.section, document.text) for document in records.documents] == [
        ("page 1", "A report on tea"),
        ("1 Leaves > page 1", "They grow on a bush."),
        ("1 Leaves > page 2", "They are picked by hand."),
        ("Water > page 2", "It must be soft."),
        ("Water > page 3", "It must be fresh, too."),
    ]


def test_a_title_that_a_word_processor_made_up_is_none(tmp_path):
    records, _ = read(write(tmp_path, a_pdf=pdf("Some text.", title="Microsoft Word - draft7.doc")))
    assert records.documents[0].title == ""


def test_a_real_pdf(tmp_path):
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.figure import Figure

    with PdfPages(tmp_path / "plot.pdf", metadata={"Title": "Yearly rain"}) as pages:
        figure = Figure()
        figure.text(0.1, 0.5, "It rained on ninety days of the year.")
        pages.savefig(figure)
    (document,) = read(tmp_path)[0].documents
    assert (document.title, document.section, document.text) == ("Yearly rain", "page 1", "It rained on ninety days of the year.")


def test_text_is_cut_to_the_limit_with_an_overlap(tmp_path):
    text = " ".join(f"Sentence number {number} stands here." for number in range(100))
    records, _ = read(write(tmp_path, a_txt=text), chunk_tokens=64, overlap_tokens=16)
    assert len(records.documents) > 10
    assert all(count_tokens(document.text) <= 64 for document in records.documents)
    assert len(read(tmp_path, chunk_tokens=64, overlap_tokens=0)[0].documents) < len(records.documents)
    assert len(read(tmp_path, chunk_tokens=128, overlap_tokens=16)[0].documents) < len(records.documents)


def test_editing_a_section_changes_the_passages_of_no_other(tmp_path):
    other = "Nothing happens here. " * 200
    write(tmp_path, guide_md=GUIDE, other_txt=other)

    def texts(records: Records) -> list[tuple[str, str, str, str]]:
        return [(d.parent, d.section, d.title, d.text) for d in records.documents if d.section != "Install"]

    before = texts(read(tmp_path, chunk_tokens=32, overlap_tokens=8)[0])
    changed = GUIDE.replace("of your choice", "that you know. It takes a minute. " * 40)
    after = texts(read(write(tmp_path, guide_md=changed), chunk_tokens=32, overlap_tokens=8)[0])
    assert after == before
    assert len(before) > 20


# which files


def test_include_and_exclude_choose_files_and_folders(tmp_path):
    write(tmp_path, a_md="a", docs__b_md="b", docs__drafts__c_md="c", docs__d_TXT="d", docs__e_json="{}", _git__f_md="f")

    def names(**fields: object) -> list[str]:
        return [document.parent for document in read(tmp_path, **fields)[0].documents]

    assert names() == ["a.md", "docs/b.md", "docs/d.TXT", "docs/drafts/c.md"]
    assert names(include=["docs"]) == names(include=["docs/**"]) == ["docs/b.md", "docs/d.TXT", "docs/drafts/c.md"]
    assert names(include=["*.md", "docs/*.TXT"]) == ["a.md", "docs/d.TXT"]
    assert names(exclude=["docs/drafts"]) == names(exclude=["**/drafts"]) == ["a.md", "docs/b.md", "docs/d.TXT"]
    assert read(tmp_path)[0].counts == {"files": 4, "files_of_other_kinds": 1}
    with pytest.raises(DataError, match=r"expected files ending with \.txt, \.md, .* got none \(1 others\)"):
        read(tmp_path, include=["**/*.json"])
    for pattern in ("", "/tmp/*", "../x"):
        with pytest.raises(ValidationError, match="expected a pattern within the folder"):
            read(tmp_path, exclude=[pattern])
    with pytest.raises(ValidationError, match="overlap_tokens must be at most half"):
        read(tmp_path, overlap_tokens=200)


def test_files_that_give_no_text_are_problems(tmp_path):
    write(
        tmp_path, binary_txt=b"text\x00more", blank_md=" \n\n", damaged_pdf=b"%PDF-1.4 and then nothing", empty_html=b"",
        good_txt="A good one.", hollow_html="<html><body></body></html>", image_pdf=pdf(""), latin_md=b"caf\xe9",
        locked_pdf=pdf("Secret.", locked=True), only_md="# A heading\n",
    )  # fmt: skip
    records, problems = read(tmp_path)
    assert [document.parent for document in records.documents] == ["good.txt"]
    assert problems == [
        "binary.txt:1: binary file (NUL at byte 4)",
        "blank.md:1: empty file",
        "damaged.pdf:1: damaged PDF (Failed to load document (PDFium: Data format error).)",
        "empty.html:1: empty file",
        "hollow.html:1: no text",
        "image.pdf:1: no text (a scanned PDF needs text recognition first)",
        "latin.md:1: invalid UTF-8 (byte 0xe9 at position 3)",
        "locked.pdf:1: encrypted PDF (save a copy without a password)",
        "only.md:1: no text",
    ]


def test_what_the_system_refuses_to_read_is_a_problem(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(Unreadable) as caught:
        read_article(tmp_path / "a.txt")
    assert (caught.value.cause, caught.value.detail) == ("cannot be read", "Is a directory")


def test_a_missing_extractor_is_one_line_that_says_how_to_get_it(tmp_path, monkeypatch):
    write(tmp_path, a_pdf=pdf("Text."), b_md="Text.")
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    section = Text.model_validate({"kind": "text", "path": tmp_path})
    for call in (section.fingerprint, lambda: section.read(Problems())):
        with pytest.raises(DataError, match=r"package pypdfium2 to read \.pdf files.*pip install 'ullme\[documents\]'") as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1
    assert read(tmp_path, exclude=["**/*.pdf"])[0].documents


def test_the_fingerprint_follows_names_contents_and_extractors(tmp_path, monkeypatch):
    def fingerprint() -> str:
        return Text.model_validate({"kind": "text", "path": tmp_path}).fingerprint()

    write(tmp_path, a_md="a", b_json="{}")
    before = fingerprint()
    write(tmp_path, b_json="{1}")
    assert fingerprint() == before
    (tmp_path / "a.md").rename(tmp_path / "c.md")
    renamed = fingerprint()
    assert renamed != before
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99")
    assert fingerprint() != renamed


# labels


def labelled(folder: Path, *lines: str) -> tuple[Records, list[str]]:
    write(folder, labels_jsonl="\n".join(lines))
    return read(folder, labels=folder / "labels.jsonl")


def test_labels_name_files_and_passages(tmp_path):
    write(tmp_path, guide_md=GUIDE, notes_txt="A note.")
    records, problems = labelled(
        tmp_path,
        '{"query": "how to install", "positives": ["guide.md#2", "notes.txt"], "split": "dev", "instruction": "Find"}',
        '{"query": "what is it", "positives": ["guide.md"], "group": "g"}',
    )
    assert not problems
    first, second = records.queries
    assert (list(first.positives), first.split, first.instruction) == (["guide.md#2", "notes.txt#1"], "dev", "Find")
    assert (list(second.positives), second.split, second.group) == ([f"guide.md#{n}" for n in range(1, 5)], None, "g")


def test_labels_that_name_nothing_are_problems_and_those_of_a_bad_file_are_no_news(tmp_path):
    write(tmp_path, guide_md=GUIDE, empty_txt="")
    records, problems = labelled(
        tmp_path,
        '{"query": "one", "positives": ["guide.md#9"]}',
        '{"query": "two", "positives": ["other.md"]}',
        '{"query": "three", "positives": []}',
        '{"query": "four", "positives": ["empty.txt", "empty.txt#2"]}',
        '{"query": "five", "positives": ["guide.md#1"], "split": "validation"}',
    )
    assert not records.queries
    assert problems == [
        "empty.txt:1: empty file",
        "labels.jsonl:1: unknown document ('guide.md#9' is neither a file that was read nor a passage of one)",
        "labels.jsonl:2: unknown document ('other.md' is neither a file that was read nor a passage of one)",
        "labels.jsonl:3: no positive (expected 'positives' with at least one passage)",
        "labels.jsonl:5: unknown split (expected train, dev or test, got 'validation')",
    ]


def test_sections_are_shown_and_never_embedded(tmp_path):
    write(tmp_path, a_md="# Title\n\n## Heading\n\nText.")
    document: Document = read(tmp_path)[0].documents[0]
    assert document.content == "Title\nText."
