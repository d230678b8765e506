"""Which data set each query of a phase comes from, and what several data sets are to data, mining and training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from test_data import lines, pairs
from toys import json_lines, tiny_encoder

from ullme.artifacts import ArtifactRef, Store
from ullme.backbone import BACKBONE, BackboneConfig
from ullme.data import PREPARE, DataConfig, Dataset, Example, read_examples
from ullme.errors import DataError
from ullme.mining import MINE, MiningConfig
from ullme.mixture import Mixture, MixtureConfig
from ullme.objectives.contrastive import Contrastive
from ullme.prompts import DatasetPrompts, PromptConfig
from ullme.representations import Representations
from ullme.sampling import Sampler
from ullme.training import TRAIN, PhaseConfig, TrainConfig

SIZES = {"large": 90, "middle": 30, "small": 6}


def examples(sizes: dict[str, int] = SIZES) -> list[Example]:
    return [
        Example(f"{name}:{n}", f"{name} query {n}", (f"{name}:p{n}",), (f"{name} passage {n}",), dataset=name)
        for name, count in sizes.items()
        for n in range(count)
    ]


def mixture(steps: int = 40, batch_size: int = 4, **config: Any) -> Mixture:
    return Mixture(examples(), MixtureConfig.model_validate(config), batch_size, steps)


def sampler(mixed: dict[str, Any] | None = None, **phase: Any) -> Sampler:
    settings = {"objective": "contrastive", "steps": 40, "batch_size": 4, "num_negatives": 0, "mixture": mixed or {}, **phase}
    return Sampler(examples(), PhaseConfig.model_validate(settings), 3)


# Shares


@pytest.mark.parametrize("homogeneous", [True, False])
def test_data_sets_take_part_by_their_size_at_every_moment(homogeneous: bool) -> None:
    found = mixture(steps=63, homogeneous=homogeneous)
    drawn = Counter[str]()
    for step in range(63):
        drawn.update(name for name, _ in found.drawn(step))
        for name, size in SIZES.items():
            assert abs(drawn[name] - drawn.total() * size / 126) <= (4 if homogeneous else 1) + 1e-9


def test_temperature_and_weights_change_the_shares() -> None:
    assert mixture().shares == pytest.approx({name: size / 126 for name, size in SIZES.items()})
    roots = {name: size**0.5 for name, size in SIZES.items()}
    assert mixture(temperature=2).shares == pytest.approx({name: root / sum(roots.values()) for name, root in roots.items()})
    assert mixture(temperature=1e9).shares == pytest.approx(dict.fromkeys(SIZES, 1 / 3))
    chosen = mixture(datasets={"small": {"weight": 5}, "middle": {}})
    assert chosen.shares == pytest.approx({"middle": 0.5, "small": 0.5})


def test_a_homogeneous_batch_has_one_data_set_and_a_mixed_one_several() -> None:
    alone, mixed = sampler(), sampler({"homogeneous": False})
    sets = [{alone.examples[place].dataset for place in alone.positions(step)} for step in range(40)]
    assert all(len(found) == 1 for found in sets)
    assert set().union(*sets) == set(SIZES)
    assert any(len({mixed.examples[place].dataset for place in mixed.positions(step)}) > 1 for step in range(5))


@pytest.mark.parametrize("homogeneous", [True, False])
def test_every_data_set_is_read_in_epochs_with_nothing_left_over(homogeneous: bool) -> None:
    found = sampler({"homogeneous": homogeneous, "temperature": 1e9}, steps=200)
    streams: dict[str, list[int]] = {name: [] for name in SIZES}
    for step in range(200):
        for place in found.positions(step):
            streams[found.examples[place].dataset].append(place)
    for name, size in SIZES.items():
        epochs = [streams[name][start : start + size] for start in range(0, len(streams[name]) - size + 1, size)]
        assert len(epochs) > 1
        assert all(sorted(epoch) == found.mixture.places[name] for epoch in epochs)


def test_steps_do_not_depend_on_the_order_in_which_they_are_asked_for() -> None:
    for mixed in ({}, {"homogeneous": False}, {"temperature": 3.0}):
        first, second = sampler(mixed), sampler(mixed)
        assert [first.positions(s) for s in range(40)] == [second.positions(s) for s in reversed(range(40))][::-1]


def test_what_is_left_over_is_said() -> None:
    said = mixture(steps=10, batch_size=6).said()
    assert "large: 42 queries drawn from 90 (0.47 epochs, 48 are never drawn)" in said
    assert "small: 6 queries drawn from 6 (1.00 epochs)" in said


def test_a_data_set_that_is_not_there_or_has_one_query_is_refused() -> None:
    with pytest.raises(DataError, match=r"mixture\.datasets names 'smal'.* large, middle, small"):
        sampler({"datasets": {"smal": {}}})
    with pytest.raises(DataError, match="at least 2 train queries in data set 'lonely', got 1"):
        Mixture(examples({"lonely": 1, "many": 5}), MixtureConfig(), 4, 10)


def test_a_data_set_smaller_than_a_batch_gives_smaller_batches() -> None:
    found = sampler({"temperature": 1e9}, batch_size=10)
    sizes = {found.examples[places[0]].dataset: len(places) for step in range(40) if (places := found.positions(step))}
    assert sizes == {"large": 10, "middle": 10, "small": 6}


# What a batch says


def test_every_text_has_the_prompt_of_its_data_set() -> None:
    own = {"small": DatasetPrompts(query="small ask:\n", document="small text:\n")}
    encoder = tiny_encoder(prompts=PromptConfig(query="q:\n", datasets=own), max_tokens=64)
    found = sampler({"homogeneous": False, "temperature": 1e9}).batch(0, encoder)
    texts = [str(encoder.tokenizer.decode(row.ids)) for row in (*found.queries, *found.documents)]
    assert any(text.startswith("small ask:\nsmall query") for text in texts)
    assert all(text.startswith("small text:\n") for text in texts if "small passage" in text)
    assert not any(text.startswith("small") for text in texts if "large" in text)
    assert found.dataset == ""


def test_the_data_set_of_a_homogeneous_batch_is_named_where_there_are_several() -> None:
    encoder = tiny_encoder()
    found = sampler()
    assert {found.batch(step, encoder).dataset for step in range(20)} == set(SIZES)
    assert sampler({"datasets": {"small": {}}}).batch(0, encoder).dataset == ""


def test_in_batch_negatives_can_be_off_for_one_data_set() -> None:
    encoder = tiny_encoder()
    found = sampler({"homogeneous": False, "temperature": 1e9, "datasets": {"small": {"in_batch": False}, "large": {}}})
    batch = found.batch(0, encoder)
    assert batch.own_only is not None
    assert batch.own_only.tolist() == [identifier.startswith("small") for identifier in batch.query_ids]
    assert 0 < batch.own_only.sum() < len(batch.query_ids)


@pytest.mark.parametrize("way", [{}, {"symmetric": True}, {"all_pairs": True}, {"in_batch": False}])
def test_a_query_without_in_batch_negatives_has_its_own_candidates_alone(way: dict[str, bool]) -> None:
    """Two queries with a hard negative each; the first compares with the batch, the second does not."""
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(6, 8, dtype=torch.float64), dim=1)
    queries, documents = unit[:2], unit[2:]
    candidates, known = torch.tensor([[0, 2], [1, 3]]), torch.zeros(2, 4, dtype=torch.bool)
    objective = Contrastive(**way)

    def value(own_only: torch.Tensor | None) -> float:
        return float(objective.batch_loss(Representations(queries, documents, candidates, known, own_only), None)["contrastive"])

    def of(similarity: torch.Tensor, target: int) -> torch.Tensor:
        return -(similarity / 0.05).log_softmax(0)[target]

    similarity = queries @ documents.T
    alone = of(similarity[1, [1, 3]], 0)
    if way.get("in_batch") is False:
        together = of(similarity[0, [0, 2]], 0)
    elif way.get("all_pairs"):
        others = torch.cat([similarity[0], queries[0] @ queries[1:].T, queries @ documents[0], documents[0] @ documents[[1, 3]].T])
        together = of(others, 0)
        alone = of(torch.cat([similarity[1, [1, 3]], (queries[1] @ documents[1]).reshape(1)]), 0)
    else:
        together = of(similarity[0], 0)
    expected = (together + alone) / 2
    if way.get("symmetric"):
        backward = (of(queries @ documents[0], 0) + of((queries[1] @ documents[1]).reshape(1), 0)) / 2
        expected = (expected + backward) / 2
    assert value(torch.tensor([False, True])) == pytest.approx(float(expected), rel=1e-12)
    assert value(torch.tensor([False, False])) == value(None)


# From sources to a trained model


def triplets(path: Path, count: int, *more: dict[str, str]) -> dict[str, Any]:
    rows = ({"query": f"class of thing {n}", "pos": f"a thing {n} it is", "neg": f"no thing {n} at all"} for n in range(count))
    return {"kind": "jsonl", "path": str(lines(path, *rows, *more))}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ArtifactRef:
    """Own pairs, and an auxiliary data set of triplets that repeats one of the own test questions."""
    folder = tmp_path_factory.mktemp("mixture")
    own = pairs(folder / "own.jsonl", [f"question about topic {n} of many" for n in range(60)])
    section = DataConfig.model_validate({"source": own, "test_share": 0.3})
    first = Store(folder / "first").produce(PREPARE, section.resolved(), {}, seed=0)
    asked = Dataset.open(first.path).queries("test")[0]
    more = triplets(folder / "triplets.jsonl", 20, {"query": asked.text, "pos": "leaked"})
    section = DataConfig.model_validate({"source": own, "test_share": 0.3, "auxiliary": {"classes": more}})
    return Store(folder / "store").produce(PREPARE, section.resolved(), {}, seed=0)


def test_auxiliary_data_is_trained_on_and_neither_indexed_nor_tested(data: ArtifactRef) -> None:
    found = Dataset.open(data.path)
    assert {document.dataset for document in found.documents()} == {"", "classes"}
    assert all(not document.dataset for document in found.corpus())
    assert {query.dataset for query in found.queries("train")} == {"", "classes"}
    assert {query.dataset for query in found.queries("test")} == {""}
    assert {example.dataset for example in read_examples(data.path)} == {"jsonl", "classes"}
    assert data.meta["queries_train_classes"] == 21
    assert data.meta["queries_on_two_sides"] == 1, "the question that is also asked in testing"
    assert sum(query.dataset == "classes" for query in found.queries("train")) == 20


def test_negatives_are_mined_within_a_data_set(data: ArtifactRef, tmp_path: Path) -> None:
    found = Store(tmp_path).produce(MINE, MiningConfig(), {"data": data}, seed=0)
    rows = pq.read_table(found.path / "negatives.parquet").to_pylist()
    assert {row["query_id"].startswith("classes:") for row in rows} == {True, False}
    for row in rows:
        assert row["doc_ids"]
        assert {name.startswith("classes:") for name in row["doc_ids"]} == {row["query_id"].startswith("classes:")}
    assert "teacher_ndcg_at_10_bm25_classes" in found.meta


def test_training_names_the_data_set_of_every_step(data: ArtifactRef, tmp_path: Path) -> None:
    store = Store(tmp_path)
    model = store.produce(BACKBONE, BackboneConfig(model="tiny:llama", dtype="float32", max_tokens=32), {}, seed=0)
    phase = {"objective": "contrastive", "steps": 6, "batch_size": 4, "num_negatives": 1, "mixture": {"temperature": 1e9}}
    section = TrainConfig.model_validate({"phases": [phase], "adapter": {"rank": 2, "alpha": 4}})
    trained = store.produce(TRAIN, section, {"data": data, "model": model}, seed=1)
    rows = json_lines(trained.path / "logs/metrics.jsonl")
    named = [[name for name in row if name.startswith("loss/contrastive/")] for row in rows]
    assert named == [["loss/contrastive/jsonl"], ["loss/contrastive/classes"]] * 3
    assert all(row[name[0]] == row["loss/contrastive"] for row, name in zip(rows, named, strict=True))
    changed = section.model_copy(update={"phases": (section.phases[0].model_copy(update={"mixture": MixtureConfig()}),)})
    assert store.key(TRAIN, changed, {"data": data, "model": model}, seed=1) != trained.path.name


def test_other_auxiliary_contents_are_other_data(tmp_path: Path) -> None:
    own, more = pairs(tmp_path / "own.jsonl", ["one", "two", "three"]), triplets(tmp_path / "more.jsonl", 3)
    plain = DataConfig.model_validate({"source": own}).resolved()
    section = DataConfig.model_validate({"source": own, "auxiliary": {"more": more}})
    first = section.resolved()
    triplets(tmp_path / "more.jsonl", 4)
    assert len({plain.source_digest, first.source_digest, section.resolved().source_digest}) == 3
    with pytest.raises(DataError, match="the files changed"):
        first.resolved()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"auxiliary": {"jsonl": {"kind": "pydocs"}}}, "'jsonl' is what the run's own data set is called"),
        ({"auxiliary": {"a b": {"kind": "pydocs"}}}, "should match pattern"),
    ],
)
def test_names_that_cannot_be_told_apart_are_refused(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        DataConfig.model_validate({"source": pairs(tmp_path / "own.jsonl", ["one"]), **fields})


def test_an_auxiliary_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = {"kind": "jsonl", "path": str(tmp_path / "nowhere.jsonl")}
    section = DataConfig.model_validate({"source": pairs(tmp_path / "own.jsonl", ["one"]), "auxiliary": {"more": missing}})
    with pytest.raises(DataError, match=r"data\.auxiliary\.more: .*nowhere\.jsonl: expected a JSON Lines file"):
        section.resolved()


def test_an_auxiliary_source_without_train_queries_is_refused(tmp_path: Path) -> None:
    rows = ({"query": f"q {n}", "pos": f"p {n}", "split": "test"} for n in range(3))
    tests = {"kind": "jsonl", "path": str(lines(tmp_path / "tests.jsonl", *rows))}
    section = DataConfig.model_validate({"source": pairs(tmp_path / "own.jsonl", ["one", "two"]), "auxiliary": {"tests": tests}})
    with pytest.raises(DataError, match=r"data\.auxiliary\.tests: expected train queries to learn from, got none among 3"):
        Store(tmp_path / "store").produce(PREPARE, section.resolved(), {}, seed=0)
