"""Merged models: what the weights become, what comes along, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import PROMPTS, tiny_encoder

from ullme import merging
from ullme.backbone import BackboneConfig, embedder
from ullme.encoder import Encoder, EncoderConfig
from ullme.errors import ArtifactError, ConfigError
from ullme.latent import LatentAttention
from ullme.merging import Recipe, coefficients, merge
from ullme.publishing import model_fingerprint
from ullme.tiny import tiny_causal_lm
from ullme.training import LoraConfig

TEXTS = ["alpha", "a longer text about lambda and sigma", "two words"]
EVEN = Recipe("average", (1, 1))


def written(folder: Path, *, seed: int = 0, dtype: str = "float32", family: str = "llama", **config: Any) -> Path:
    """A model folder with the random weights of a seed."""
    model, tokenizer = tiny_causal_lm(family, seed=seed)
    settings = {"max_tokens": 48, "base": f"tiny:{family}", "prompts": PROMPTS, "dtype": dtype, **config}
    Encoder(model.to(getattr(torch, dtype)), tokenizer, EncoderConfig(**settings)).save(folder)
    return folder


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models of one architecture."""
    root = tmp_path_factory.mktemp("parents")
    return [written(root / f"seed-{seed}", seed=seed) for seed in range(3)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in sorted(folder.rglob("*.safetensors")) for key, tensor in load_file(file).items()}


def same_bits(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name].contiguous().view(torch.uint8), theirs[name].contiguous().view(torch.uint8)) for name in ours
    )


# What the weights become


@pytest.mark.parametrize("recipe", [EVEN, Recipe("average", (0.3, 0.7)), Recipe("slerp", (0.4, 0.6)), Recipe("average", (1, 1, 1))])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_merged_with_itself_is_itself_bit_for_bit(recipe: Recipe, dtype: str, tmp_path: Path) -> None:
    model = written(tmp_path / "model", dtype=dtype)
    tensors = load_file(model / "model.safetensors")
    next(iter(tensors.values()))[0, :4] = torch.tensor([-0.0, 0.0, 1e-30, 3e38])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    merge([model] * len(recipe.weights), tmp_path / "out", recipe)
    assert same_bits(weights(tmp_path / "out"), weights(model))


def test_two_models_give_their_mean(parents: Sequence[Path], tmp_path: Path) -> None:
    merge(parents[:2], tmp_path / "out", EVEN)
    first, second, got = weights(parents[0]), weights(parents[1]), weights(tmp_path / "out")
    assert got.keys() == first.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, ((first[name].double() + second[name].double()) / 2).float())


def test_weights_are_shares_in_the_order_of_the_folders(parents: Sequence[Path], tmp_path: Path) -> None:
    merge(parents, tmp_path / "out", Recipe("average", (2, 1, 1)))
    models, got = [weights(parent) for parent in parents], weights(tmp_path / "out")
    for name, tensor in got.items():
        expected = 0.5 * models[0][name] + 0.25 * models[1][name] + 0.25 * models[2][name]
        torch.testing.assert_close(tensor, expected, atol=1e-7, rtol=1e-6)


def test_pieces_do_not_show(parents: Sequence[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe("slerp", (1, 2))
    merge(parents[:2], tmp_path / "whole", recipe)
    monkeypatch.setattr(merging, "PIECE", 100)
    merge(parents[:2], tmp_path / "pieces", recipe)
    for name, tensor in weights(tmp_path / "pieces").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "whole")[name], atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("method", ["slerp", "average"])
def test_the_ends_are_the_models_themselves(end: int, method: Any, parents: Sequence[Path], tmp_path: Path) -> None:
    merge(parents[:2], tmp_path / "out", Recipe(method, (1 - end, end)))
    assert same_bits(weights(tmp_path / "out"), weights(parents[end]))


def between(vectors: Sequence[torch.Tensor], recipe: Recipe) -> torch.Tensor:
    rows = torch.stack([vector.double() for vector in vectors])
    return torch.tensor(coefficients(recipe, rows @ rows.T), dtype=torch.float64) @ rows


@pytest.mark.parametrize("t", [0.25, 0.5, 0.9])
def test_on_the_arc_of_orthogonal_vectors_the_length_stays_and_the_angle_grows_evenly(t: float) -> None:
    first, second = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 2.0])
    found = between([first, second], Recipe("slerp", (1 - t, t)))
    assert float(found.norm()) == pytest.approx(2)
    assert math.acos(float(found @ first.double()) / 4) == pytest.approx(t * math.pi / 2)
    mean = between([first, second], Recipe("average", (1 - t, t)))
    assert float(mean.norm()) < 2


def test_slerp_is_shoemakes_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    angle = math.acos(float(first @ second / (first.norm() * second.norm())))
    expected = (math.sin(0.7 * angle) * first + math.sin(0.3 * angle) * second) / math.sin(angle)
    torch.testing.assert_close(between([first, second], Recipe("slerp", (0.7, 0.3))), expected)


@pytest.mark.parametrize(
    ("first", "second"), [([1.0, 0.0], [1.0, 1e-3]), ([1.0, 1.0], [-1.0, -1.0]), ([0.0, 0.0], [1.0, 2.0]), ([3.0, 0.0], [5.0, 0.0])]
)
def test_where_there_is_no_arc_slerp_goes_straight(first: list[float], second: list[float]) -> None:
    ends = torch.tensor([first, second], dtype=torch.float64)
    torch.testing.assert_close(between(list(ends), Recipe("slerp", (0.75, 0.25))), 0.75 * ends[0] + 0.25 * ends[1])


def test_slerp_of_three_goes_from_the_first_two_to_the_third() -> None:
    one, two, three = torch.eye(3, dtype=torch.float64)
    halfway = between([one, two], Recipe("slerp", (1, 1)))
    expected = between([halfway, three], Recipe("slerp", (2, 1)))
    torch.testing.assert_close(between([one, two, three], Recipe("slerp", (1, 1, 1))), expected)
    torch.testing.assert_close(
        between([one, two, three], Recipe("slerp", (1, 0, 1))), between([one, three], Recipe("slerp", (1, 1)))
    )


def test_shards_and_number_types_are_those_of_the_first(parents: Sequence[Path], tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    encoder = Encoder.load(parents[0], device="cpu")
    encoder.save(sharded)
    (sharded / "model.safetensors").unlink()
    encoder.model.to(torch.bfloat16).save_pretrained(sharded, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    merge([sharded, parents[1]], tmp_path / "out", EVEN)
    first, got = weights(sharded), weights(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in got.items()} == {name: tensor.dtype for name, tensor in first.items()}
    files = {file.name for file in sharded.glob("model*")}
    assert {file.name for file in (tmp_path / "out").glob("model*")} == files
    for name, tensor in got.items():
        assert torch.equal(tensor, ((first[name].double() + weights(parents[1])[name].double()) / 2).bfloat16())
    Encoder.load(tmp_path / "out", device="cpu")


# What comes along


@pytest.mark.parametrize(
    "config", [{}, {"dim": 24}, {"pooling": "last"}, {"attention": "causal"}], ids=["plain", "dim", "last", "causal"]
)
def test_the_folder_opens_here_and_in_sentence_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folders = [written(tmp_path / f"seed-{seed}", seed=seed, **config) for seed in range(2)]
    merge(folders, tmp_path / "out", EVEN)
    encoder = Encoder.load(tmp_path / "out", device="cpu")
    vectors = encoder.encode(TEXTS)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert (theirs.encode(TEXTS, prompt_name="query", show_progress_bar=False) * vectors).sum(1).min() >= 0.99999
    assert encoder.config == Encoder.load(folders[0], device="cpu").config
    assert all(not np.allclose(vectors, Encoder.load(folder, device="cpu").encode(TEXTS), atol=1e-3) for folder in folders)


def test_trained_pooling_is_merged_too(tmp_path: Path) -> None:
    latents: Any = {"count": 16, "heads": 4}
    for seed in range(2):
        config = BackboneConfig(
            model="tiny:llama", dtype="float32", pooling="latent_attention", max_tokens=48, latents=latents
        ).resolved()
        encoder = embedder(config)
        assert isinstance(encoder.pooler, LatentAttention)
        for parameter in encoder.pooler.parameters():
            torch.nn.init.normal_(parameter, std=0.1 + seed)
        encoder.save(tmp_path / f"seed-{seed}")
    merge([tmp_path / "seed-0", tmp_path / "seed-1"], tmp_path / "out", EVEN)
    (file,) = (tmp_path / "out" / "1_LatentAttention").glob("*.safetensors")
    pooling = [load_file(tmp_path / name / "1_LatentAttention" / file.name) for name in ("seed-0", "seed-1", "out")]
    assert any(not torch.equal(pooling[0][name], pooling[1][name]) for name in pooling[0])
    for name, tensor in pooling[2].items():
        torch.testing.assert_close(tensor, (pooling[0][name] + pooling[1][name]) / 2)
    assert Encoder.load(tmp_path / "out", device="cpu").encode(TEXTS).shape == (3, 64)


def test_the_card_names_the_parents_and_no_place_of_this_machine(parents: Sequence[Path], tmp_path: Path) -> None:
    done = merge(parents[:2], tmp_path / "out", Recipe("slerp", (3, 1)))
    card = (tmp_path / "out" / "README.md").read_text()
    for number, parent in enumerate(parents[:2], start=1):
        assert done.parents[parent] == model_fingerprint(parent)
        assert f"| parent {number}, {parent.name} | `{model_fingerprint(parent)}` |" in card
    assert "slerp of 2 models, weights 0.75, 0.25" in card
    assert 'SentenceTransformer("out")' in card
    assert str(tmp_path) not in card
    assert done.tensors == len(weights(parents[0]))
    assert done.size == sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())


def test_what_belongs_to_one_training_stays_behind(parents: Sequence[Path], tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    shutil.copytree(parents[0], trained)
    for name in ("adapter/adapter_model.safetensors", "logs/scores.json", "manifest.json"):
        (trained / name).parent.mkdir(exist_ok=True)
        (trained / name).write_bytes(b"{}")
    merge([trained, parents[1]], tmp_path / "out", EVEN)
    merge([parents[0], parents[1]], tmp_path / "plain", EVEN)
    names = [
        {file.relative_to(folder).as_posix() for file in folder.rglob("*")} for folder in (tmp_path / "out", tmp_path / "plain")
    ]
    assert names[0] == names[1]
    assert not {"adapter", "logs", "manifest.json"} & names[0]


# What is refused


def edited(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def grown(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(65)
    save_file(tensors, folder / "model.safetensors")


def shrunk(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edited("ullme.json", lambda it: it.update(pooling="last")), 'ullme.json: pooling: "mean" and "last"'),
        (edited("ullme.json", lambda it: it["prompts"].update(query="Q: ")), r'ullme.json: prompts: query: "Query:\n" and "Q: "'),
        (
            edited("ullme.json", lambda it: it["prompts"]["datasets"].update(base={"query": "B:"})),
            "ullme.json: prompts: datasets: base: none and 1 entries",
        ),
        (edited("ullme.json", lambda it: it.update(dim=8)), "ullme.json: dim: none and 8"),
        (edited("config.json", lambda it: it.update(num_hidden_layers=3)), "config.json: num_hidden_layers: 2 and 3"),
        (edited("config.json", lambda it: it.pop("hidden_act")), 'config.json: hidden_act: "silu" and none'),
        (
            edited("tokenizer.json", lambda it: it["model"]["vocab"].update(a=999)),
            "tokenizer.json: model: vocab: a: ",
        ),
        (lambda folder: (folder / "1_Pooling" / "config.json").unlink(), "1_Pooling/config.json: 3 entries and none"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ x }}"), "chat_template.jinja: none and 7 bytes"),
        (grown, "tensor model.norm.weight: [64] and [65]"),
        (shrunk, "tensor model.norm.weight: [64] and none"),
    ],
)
def test_the_first_difference_is_named_in_one_line(
    change: Callable[[Path], None], words: str, parents: Sequence[Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(parents[1], other)
    change(other)
    with pytest.raises(ConfigError) as caught:
        merge([parents[0], other], tmp_path / "out", EVEN)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{other} cannot be merged with {parents[0]}: {words}")
    assert line.endswith("; merge models of one LLM that were saved with the same settings")
    assert not (tmp_path / "out").exists()


def test_what_changes_no_vector_may_differ(parents: Sequence[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(parents[1], other)
    edited("ullme.json", lambda it: it.update(attn_implementation="eager"))(other)
    edited("config.json", lambda it: it.update(transformers_version="9", dtype="float16"))(other)
    edited("tokenizer.json", lambda it: it.update(truncation={"max_length": 7}))(other)
    (other / "generation_config.json").unlink()
    merge([parents[0], other], tmp_path / "out", EVEN)


def test_another_base_is_warned_of(parents: Sequence[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = tmp_path / "other"
    shutil.copytree(parents[1], other)
    edited("ullme.json", lambda it: it.update(base="another"))(other)
    merge([parents[0], other], tmp_path / "out", EVEN)
    assert "'tiny:llama'" in caplog.text
    assert "'another'" in caplog.text


def test_other_architectures_are_refused(parents: Sequence[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: "):
        merge([parents[0], written(tmp_path / "other", family="qwen3")], tmp_path / "out", EVEN)


def test_adapters_kept_apart_are_refused(parents: Sequence[Path], tmp_path: Path) -> None:
    encoder = tiny_encoder(prompts=PROMPTS, lora=LoraConfig(rank=2))
    encoder.save(tmp_path / "apart")
    with pytest.raises(ConfigError, match=r"expected weights that hold their adapters, got some kept apart \(embedding\)"):
        merge([tmp_path / "apart", parents[0]], tmp_path / "out", EVEN)
    encoder.merge_adapter()
    encoder.save(tmp_path / "merged")
    merge([tmp_path / "merged", parents[0]], tmp_path / "out", EVEN)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["average", "slerp"])
def test_weights_that_are_not_finite_are_refused_and_nothing_is_left(
    value: float, method: Any, parents: Sequence[Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(parents[1], other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"tensor model\.norm\.weight of .* and .*: expected finite numbers"):
        merge([parents[0], other], tmp_path / "out", Recipe(method, (1, 1)))
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_whole_numbers_must_be_the_same(parents: Sequence[Path], tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for place, folder in enumerate(folders):
        shutil.copytree(parents[place], folder)
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {"counts": torch.tensor([1, 2])}, folder / "model.safetensors")
    merge(folders, tmp_path / "out", EVEN)
    assert weights(tmp_path / "out")["counts"].tolist() == [1, 2]
    tensors["counts"] = torch.tensor([1, 3])
    save_file(tensors, folders[1] / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"tensor counts of .*: expected the same torch.int64 values everywhere"):
        merge(folders, tmp_path / "again", EVEN)


def test_folders_that_are_no_models_of_ours(parents: Sequence[Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere: expected a model folder with ullme\.json"):
        merge([parents[0], tmp_path / "nowhere"], tmp_path / "out", EVEN)
    other = tmp_path / "other"
    shutil.copytree(parents[1], other)
    (other / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes()[:500])
    with pytest.raises(ArtifactError, match=r"model\.safetensors: not a safetensors file, or cut short"):
        merge([parents[0], other], tmp_path / "out", EVEN)


def test_nothing_is_written_over(parents: Sequence[Path], tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ConfigError, match="expected a new or empty folder"):
        merge(parents[:2], tmp_path, EVEN)
    (tmp_path / "note").unlink()
    out = tmp_path / "empty"
    out.mkdir()
    merge(parents[:2], out, EVEN)
    with pytest.raises(ConfigError, match="expected a new or empty folder"):
        merge(parents[:2], out, EVEN)


@pytest.mark.parametrize("given", [(1,), (0, 0), (-1, 2), (math.nan, 1), (math.inf, 1)])
def test_weights_that_make_no_sense(given: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="weights: expected two or more numbers from 0"):
        Recipe("average", given)
