"""Indexes of several files: built within a limit of memory, or gone on with when documents came and went."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from corpora import clustered, in_shards, kind_of, names, unit

from indexes import _budget, _corpus, _memory
from indexes import build as building
from indexes._budget import Budget
from indexes.build import build
from indexes.index import Index
from ullme.errors import ConfigError
from ullme.neighbours import MISSING_ROW, ExactSearcher

DIM = 32
KINDS = ["flat", "hnsw", "ivf", "ivfpq", "rabitq"]
MODEL = "a" * 64


def shards_of(ids, vectors):
    return lambda: iter([(list(ids[:100]), vectors[:100].astype(np.float16)), (list(ids[100:]), vectors[100:].astype(np.float16))])


def make(out, spec, ids, vectors, earlier=(), *, seed=7, fingerprint=MODEL):
    out.mkdir()
    return build(kind_of(spec), shards_of(ids, vectors), out=out, fingerprint=fingerprint, seed=seed, earlier=earlier)


@pytest.fixture
def cut(monkeypatch):
    """Files of at most 128 rows, whatever the memory."""
    monkeypatch.setattr(_corpus, "BLOCK_ROWS", 64)
    monkeypatch.setattr(building.Budget, "of", lambda kind, count, dim: Budget(count, 128, frugal=True))


# Within a limit


@pytest.mark.parametrize("spec", ["flat", {"kind": "ivf", "codes": "fp32"}, {"kind": "rabitq", "min_recall": 0.9}])
def test_several_files_answer_like_one(spec, built, cut, monkeypatch):
    vectors, queries = clustered(600, DIM), clustered(640, DIM)[600:]
    several = built(spec, vectors)
    monkeypatch.undo()
    one = built(spec, vectors)
    assert [len(list(path.glob("index*.faiss"))) for path in (several, one)] == [5, 1]
    found, expected = (Index.open(path).search(queries, 10) for path in (several, one))
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)
    some = np.arange(3, 600, 7)
    found, expected = (Index.open(path).search(queries, 10, among=some) for path in (several, one))
    np.testing.assert_array_equal(found.rows, expected.rows)


def test_a_kind_that_reads_everything_is_refused_before_it_starts(tmp_path):
    with pytest.raises(
        ConfigError, match=r"flat of 200 vectors of 32 numbers takes 2.56e-05 GB, .* the limit is 1e-05 GB; take ivfpq"
    ):
        make(tmp_path / "index", {"kind": "flat", "max_memory_gb": 1e-5}, names(200), clustered(200, DIM))
    with pytest.raises(ConfigError, match=r"expected at least \d.* GB to read 200 vectors of 32 numbers, got 0.001; raise it"):
        make(tmp_path / "other", {"kind": "ivf", "max_memory_gb": 1e-3}, names(200), clustered(200, DIM))
    assert not [file for folder in ("index", "other") for file in (tmp_path / folder).iterdir()]


def test_files_are_cut_and_samples_are_drawn_as_memory_allows(monkeypatch):
    monkeypatch.setattr(_budget, "resident", lambda: 100 * 2**20)
    held = 3 * 2**24
    kind = kind_of({"kind": "ivf", "codes": "fp32", "max_memory_gb": (100 * 2**20 + held + 2**30) / 1e9})
    budget = Budget.of(kind, 10_000_000, 256)
    assert abs(budget.rows * kind.bytes_per_vector(256) - 2**28) < 2**14 * kind.bytes_per_vector(256)
    assert budget.rows % 2**14 == 0
    assert budget.points == 2**30 // 6 // (4 * 256)
    assert Budget.of(kind_of("ivf"), 10_000_000, 256) == Budget(10_000_000, 10_000_000, frugal=False)


MEASURED = """
import sys
from pathlib import Path
import numpy as np
from indexes.build import build
from ullme.components import resolve
vectors = np.load(sys.argv[1], mmap_mode="r")
def shards():
    for start in range(0, len(vectors), 20_000):
        part = np.load(sys.argv[1], mmap_mode="r")[start : start + 20_000]
        yield [str(row) for row in range(start, start + len(part))], part
kind = resolve("indexes", {"kind": sys.argv[2], "max_memory_gb": float(sys.argv[4])})
build(kind, shards, out=Path(sys.argv[3]), fingerprint="a" * 64, seed=0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ivf", "ivfpq", "rabitq"])
def test_building_stays_below_a_third_of_the_vectors(kind, tmp_path):
    rows, dim, limit = 400_000, 512, 0.27
    table = np.lib.format.open_memmap(tmp_path / "vectors.npy", mode="w+", dtype=np.float32, shape=(rows, dim))
    for start in range(0, rows, 10_000):
        table[start : start + 10_000] = clustered(10_000, dim, seed=start)
    table.flush()
    del table
    (tmp_path / "out").mkdir()
    arguments = [str(tmp_path / "vectors.npy"), kind, str(tmp_path / "out"), str(limit)]
    with subprocess.Popen([sys.executable, "-c", MEASURED, *arguments], stderr=subprocess.PIPE, text=True) as process:
        watched, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                peak = max(peak, watched.memory_info().rss)
            time.sleep(0.02)
        assert process.returncode == 0, process.communicate()[1]
    assert rows * dim * 4 >= 3 * limit * 1e9
    assert peak < limit * 1e9, f"{peak / 1e9:.3f} GB"
    assert Index.open(tmp_path / "out").count == rows


# Gone on with


def changed(count=600):
    """(ids, vectors) of before and of after: 20 documents edited, 10 deleted, 15 new."""
    before, edits = clustered(count, DIM), clustered(count, DIM, seed=9)
    ids, now = names(count), before.copy()
    now[50:70] = edits[50:70]
    keep = np.r_[0:200, 210:count]
    return (ids, before), ([*(ids[row] for row in keep), *(f"new-{row}" for row in range(15))], np.r_[now[keep], edits[:15]])


@pytest.mark.parametrize("kind", KINDS)
def test_what_changed_is_a_segment_of_its_own(kind, tmp_path):
    before, now = changed()
    spec = {"kind": kind, "min_recall": 0.9} if kind != "flat" else kind
    make(tmp_path / "one", spec, *before)
    meta = make(tmp_path / "two", spec, *now, [tmp_path / "one"])
    assert (meta["count"], meta["taken_over"], meta["segments"]) == (605, 570, 2)
    assert (tmp_path / "two/index.faiss").samefile(tmp_path / "one/index.faiss")
    index = Index.open(tmp_path / "two", fingerprint=MODEL)
    assert sorted(index.ids) == sorted(now[0])
    assert len(index) == len(set(index.ids)) == 605
    everything = index.search(now[1][:3], 605)
    assert all(len(set(row) - {MISSING_ROW}) == sum(place != MISSING_ROW for place in row) for row in everything.rows.tolist())
    found = index.search(now[1], 1).rows[:, 0]
    assert np.mean([index.ids[row] == name for row, name in zip(found, now[0], strict=True)]) > 0.97
    assert meta["recall_at_10"] > 0.85


def test_a_plain_index_of_several_files_is_exact(tmp_path):
    before, now = changed()
    make(tmp_path / "one", "flat", *before)
    meta = make(tmp_path / "two", "flat", *now, [tmp_path / "one"])
    assert meta["recall_at_100"] == 1
    index, exact = Index.open(tmp_path / "two"), ExactSearcher(now[1].astype(np.float16).astype(np.float32), now[0])
    for k in (1, 10, 700):
        found, expected = index.search(before[1], k), exact.search(before[1], k)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)
        assert [[index.ids[row] for row in rows if row != MISSING_ROW] for rows in found.rows[:, :10]] == [
            [now[0][row] for row in rows if row != MISSING_ROW] for rows in expected.rows[:, :10]
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_where_everything_near_was_deleted_the_next_are_found(kind, tmp_path):
    vectors = clustered(600, DIM)
    query = vectors[:1]
    near = np.argsort(-(vectors @ query[0]))[:100]
    keep = np.setdiff1d(np.arange(600), near)
    ids = names(600)
    make(tmp_path / "one", kind, ids, vectors)
    make(tmp_path / "two", kind, [ids[row] for row in keep], vectors[keep], [tmp_path / "one"])
    index = Index.open(tmp_path / "two")
    found = index.search(query, 5)
    assert (found.rows != MISSING_ROW).all()
    wanted = {ids[row] for row in keep[np.argsort(-(vectors[keep] @ query[0]))[:5]]}
    assert len(wanted & {index.ids[row] for row in found.rows[0]}) >= 4
    among = index.search(query, 5, among=np.arange(0, 500, 2))
    assert set(among.rows[0].tolist()) <= set(range(0, 500, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_which_next_to_nothing_is_left_gives_what_there_is(kind, cut, tmp_path):
    """The five files hold 128 documents each, the last 88; of the second three stay, of the third none."""
    vectors, ids = clustered(600, DIM), names(600)
    spec = {"kind": kind, "max_stale": 0.9}
    make(tmp_path / "one", spec, ids, vectors)
    keep = np.r_[0:128, 130, 180, 250, 384:600]
    meta = make(tmp_path / "two", spec, [ids[row] for row in keep], vectors[keep], [tmp_path / "one"])
    assert (meta["taken_over"], meta["segments"]) == (len(keep), 5)
    index = Index.open(tmp_path / "two")
    for row in (130, 180, 250, 5, 599):
        assert index.ids[index.search(vectors[row : row + 1], 1).rows[0, 0]] == ids[row]
    found = index.search(vectors[120:260], 50).rows
    assert found.max() < len(keep)
    assert all(len(set(row) - {MISSING_ROW}) == (np.array(row) != MISSING_ROW).sum() for row in found.tolist())


def test_what_later_files_are_read_with_is_what_the_first_was_built_of(tmp_path):
    """faiss reckons with a table that grows with the lists, of which fewer documents alone would have fewer."""
    vectors, ids = clustered(8_500, 64), names(8_500)
    spec = {"kind": "ivfpq", "pieces": 64, "refine": None, "max_stale": 0.5}
    first = make(tmp_path / "one", spec, ids[:8_000], vectors[:8_000])
    meta = make(tmp_path / "two", spec, ids[2_000:8_100], vectors[2_000:8_100], [tmp_path / "one"])
    assert (meta["taken_over"], meta["segments"], meta["factory"]) == (6_000, 2, first["factory"])
    assert Index.open(tmp_path / "two").count == 6_100


def test_a_second_change_replaces_the_segment_of_the_first(tmp_path):
    before, now = changed()
    make(tmp_path / "one", "flat", *before)
    make(tmp_path / "two", "flat", *now, [tmp_path / "one"])
    later = (now[0][5:], now[1][5:])
    meta = make(tmp_path / "three", "flat", *later, [tmp_path / "two", tmp_path / "one"])
    assert (meta["segments"], meta["taken_over"]) == (2, 565)
    assert sorted(Index.open(tmp_path / "three").ids) == sorted(later[0])
    back = make(tmp_path / "four", "flat", *before, [tmp_path / "three"])
    assert back["count"] == 600
    assert sorted(Index.open(tmp_path / "four").ids) == sorted(before[0])


def test_nothing_new_and_much_gone(tmp_path):
    (ids, vectors), _ = changed()
    make(tmp_path / "one", "flat", ids, vectors)
    meta = make(tmp_path / "two", "flat", ids[:550], vectors[:550], [tmp_path / "one"])
    assert (meta["segments"], meta["taken_over"], meta["count"]) == (1, 550, 550)
    assert make(tmp_path / "three", "flat", ids[:400], vectors[:400], [tmp_path / "two"])["taken_over"] == 0  # more than max_stale
    assert not list((tmp_path / "three").glob("index-*"))


def test_what_does_not_fit_is_built_anew(tmp_path, caplog):
    before, now = changed()
    make(tmp_path / "one", "ivf", *before)
    earlier = [tmp_path / "one"]
    assert make(tmp_path / "model", "ivf", *now, earlier, fingerprint="b" * 64)["taken_over"] == 0
    assert make(tmp_path / "seed", "ivf", *now, earlier, seed=8)["taken_over"] == 0
    assert make(tmp_path / "kind", {"kind": "ivf", "codes": "fp16"}, *now, earlier)["taken_over"] == 0
    assert make(tmp_path / "never", {"kind": "ivf", "max_stale": 0}, *now, earlier)["taken_over"] == 0
    assert make(tmp_path / "fits", "ivf", *now, [tmp_path / "missing", tmp_path / "kind", *earlier])["taken_over"] == 570
    content = bytearray((tmp_path / "one/index.faiss").read_bytes())
    content[-1] ^= 1
    (tmp_path / "one/index.faiss").unlink()  # another name of the same file stands in `fits`
    (tmp_path / "one/index.faiss").write_bytes(content)
    assert make(tmp_path / "damaged", "ivf", *now, earlier)["taken_over"] == 0
    assert "nothing is taken over from a damaged one" in caplog.text
    assert Index.open(tmp_path / "fits").count == 605


def test_it_is_built_anew_where_recall_would_fall_below_the_goal(tmp_path, caplog):
    """Codes that were learned where the first documents lie are bad at others."""
    caplog.set_level("INFO")
    weights = np.repeat([1, 0.02], DIM // 2)
    old, other = unit(clustered(3_000, DIM) * weights), unit(clustered(700, DIM, seed=4) * weights[::-1])
    now = ([*names(3_000), *(f"new-{row}" for row in range(700))], np.r_[old, other])
    for goal, taken in ((0.5, 3_000), (0.58, 0)):
        spec = {"kind": "ivfpq", "lists": 8, "pieces": 8, "refine": None, "min_recall": goal}
        make(tmp_path / f"one-{goal}", spec, names(3_000), old)
        meta = make(tmp_path / f"two-{goal}", spec, *now, [tmp_path / f"one-{goal}"])
        assert meta["taken_over"] == taken
        assert meta["recall_at_10"] >= goal
        assert Index.open(tmp_path / f"two-{goal}").count == 3_700
    assert "index ivfpq: built anew, since recall@10 fell to 0.5" in caplog.text


def test_an_index_of_the_first_format_opens(built):
    import pyarrow as pa

    from ullme.artifacts import sha256_file

    vectors = clustered(200, DIM)
    path = built("flat", in_shards(vectors))
    with pa.OSFile(str(path / "ids.arrow"), "wb") as sink:
        table = pa.table({"id": pa.array(names(200))})
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    card = json.loads((path / "index.json").read_text())
    old = {key: card[key] for key in card.keys() - {"segments", "rows", "built", "asked"}} | {"format": 1}
    old["files"]["ids.arrow"] = sha256_file(path / "ids.arrow")
    (path / "index.json").write_text(json.dumps(old))
    assert Index.open(path).search(vectors, 1).rows[:, 0].tolist() == list(range(200))
    assert build(
        kind_of("flat"), in_shards(vectors), out=Path(path), fingerprint=MODEL, seed=7, earlier=[path]
    )["taken_over"] == 0  # fmt: skip


def test_pages_of_mapped_files_are_given_back(tmp_path):
    np.save(tmp_path / "table.npy", np.ones(4_000_000))
    table = np.load(tmp_path / "table.npy", mmap_mode="r")
    before = _memory.resident()
    assert table.sum() == 4_000_000
    assert _memory.resident() > before + 20e6
    _memory.forget()
    assert _memory.resident() < before + 5e6
    assert table.sum() == 4_000_000
