"""Documents on disk: read in any way, they are the ones that were written."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ullme import documents as module
from ullme.documents import DOCUMENTS_FILE, Documents, write_documents
from ullme.errors import ArtifactError
from ullme.records import Document

WRITTEN = [
    Document(
        f"d{number}",
        f"text {number}\n\tof \x00 ünïcode 𝄞" if number % 3 else "",
        "title" * (number % 2),
        searchable=number % 4 > 0,
        held_out=number % 5 == 0,
        parent="whole" * (number % 7 == 0),
        section="A > B",
        dataset="other" if number > 30 else "",
        metadata={"year": number, "tags": ["a", "b"]} if number % 2 else {},
    )
    for number in range(40)
]


@pytest.fixture(params=[1, 7, 40, 1024])
def written(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Documents:
    """The same documents in batches of several sizes."""
    monkeypatch.setattr(module, "BATCH_ROWS", request.param)
    write_documents(tmp_path, iter(WRITTEN))
    return Documents.open(tmp_path)


def test_a_walk_and_single_rows_give_what_was_written(written: Documents) -> None:
    assert len(written) == 40
    assert list(written) == WRITTEN == [written[place] for place in range(40)]
    assert written[-1] == WRITTEN[-1]
    assert [vars_of(document) for document in written] == [vars_of(document) for document in WRITTEN]
    with pytest.raises(IndexError):
        written[40]


def vars_of(document: Document) -> dict[str, object]:
    return asdict(document)


@pytest.mark.parametrize("places", [[], [3], [0, 1, 2], [5, 17, 39], [39, 2, 2, 11], list(range(40)), list(range(39, -1, -1))])
def test_some_of_them_in_any_order(written: Documents, places: list[int]) -> None:
    some, expected = written.take(places), [WRITTEN[place] for place in places]
    assert list(some) == expected == [some[place] for place in range(len(some))]
    assert some.ids() == [document.id for document in expected]
    assert list(some[1:3]) == expected[1:3]
    assert list(some.where("searchable", equals=True)) == [document for document in expected if document.searchable]
    assert list(some.take(range(len(some))[::2])) == expected[::2]


def test_ids_are_found_and_others_left_out(written: Documents) -> None:
    some = written.take([4, 9, 30])
    assert some.places({"d9", "d30", "d5", "unknown"}) == {"d9": 1, "d30": 2}
    assert written.named(["d30", "d2"]) == {"d2": WRITTEN[2], "d30": WRITTEN[30]}
    assert written.named([]) == {}


def test_equal_documents_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_documents(tmp_path / name, WRITTEN)
    assert (tmp_path / "one" / DOCUMENTS_FILE).read_bytes() == (tmp_path / "two" / DOCUMENTS_FILE).read_bytes()


def test_no_document_at_all(tmp_path: Path) -> None:
    write_documents(tmp_path, [])
    assert list(Documents.open(tmp_path)) == []


def test_what_earlier_versions_wrote_is_read(tmp_path: Path) -> None:
    rows = [{"id": f"d{n}", "text": f"text {n}", "title": "", "searchable": True, "held_out": n % 2 == 0} for n in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "documents.parquet", row_group_size=700)
    found = Documents.open(tmp_path)
    assert len(found) == 3000
    assert found[1500] == list(found)[1500] == Document("d1500", "text 1500", held_out=True)
    assert found.where("held_out", equals=True).ids() == [f"d{n}" for n in range(0, 3000, 2)]


def test_damage_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"there is no documents\.arrow; run the data stage again"):
        Documents.open(tmp_path)
    (tmp_path / DOCUMENTS_FILE).write_bytes(b"no table")
    with pytest.raises(ArtifactError, match=r"documents\.arrow: not a table of documents .* run the data stage again"):
        Documents.open(tmp_path)


def test_places_of_numpy_are_places(written: Documents) -> None:
    assert written[np.int64(3)] == WRITTEN[3]
