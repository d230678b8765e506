"""Queries that the LLM itself writes for documents nobody has asked about (as InPars and Promptagator do, arXiv 2202.05144).

    logs/synthetic.jsonl   every query that was written, in order: document, text, how likely it is given its own passage and
                           its rivals, and whether it was kept or why not

A query is kept if its own passage is what it was most likely written for: mean log p(query | passage) is higher for it than for
each of the passages that BM25 holds for the nearest (a round trip: Alberti et al. 2019, arXiv 1906.05416; with the query likelihood
of Ponte and Croft 1998 in place of a reader).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from ullme.artifacts import Draft, Inputs, Stage, write_atomic
from ullme.components import Section
from ullme.data import Dataset, counted, write_tables
from ullme.errors import DataError
from ullme.journal import Journal
from ullme.progress import Progress
from ullme.records import SPLITS, Document, Query, hash_share, normalise

if TYPE_CHECKING:
    from ullme.encoder import Encoder
    from ullme.lexical import BM25Searcher

__all__ = ["SYNTHESISE", "SyntheticConfig", "synthesise"]

logger = logging.getLogger(__name__)

PASSAGE = "{passage}"
KEPT, EMPTY, ASKED, LIKELIER = "kept", "empty", "asked already", "another passage is likelier"


class SyntheticRuntime(Section):
    """Speed and memory; none of it changes a query beyond rounding."""

    batch_tokens: int = Field(default=8192, ge=1)
    """Padded tokens per forward pass where queries are rated."""


class SyntheticConfig(Section):
    """How the LLM is asked, and which of its queries are kept."""

    max_documents: int | None = Field(default=1000, ge=1)
    """Documents that get queries, those of lowest hash; null: all that training may see."""
    per_document: int = Field(default=1, ge=1)
    prompt: str = "Write one short question that a person could ask and that this text answers.\n\nText: {passage}\n\nQuestion:"
    chat: bool = True
    """The prompt is a user's turn of the tokenizer's chat template; false for models without one."""
    passage_tokens: int = Field(default=192, ge=8)
    """Longest passage that is read; the rest is cut."""
    query_tokens: int = Field(default=32, ge=4)
    """Longest query; only its first line counts."""
    temperature: float = Field(default=0.7, ge=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    rivals: int = Field(default=4, ge=0)
    """Passages nearest to the query by BM25 that its own must be likelier than; 0 keeps every query."""
    batch_documents: int = Field(default=16, ge=1)
    """Documents that are written for at once, and share their random numbers."""
    runtime: SyntheticRuntime = SyntheticRuntime()

    @field_validator("prompt")
    @classmethod
    def _has_its_place_once(cls, value: str) -> str:
        if value.count(PASSAGE) != 1:
            raise ValueError(f"expected a text with {PASSAGE} in it once, got {value!r}")
        return value


def synthesise(section: SyntheticConfig, inputs: Inputs, draft: Draft) -> None:
    """Stage: data + model -> the same data with train queries that the model wrote.

    A run that was interrupted goes on after the last batch of documents that it finished.

    Raises:
        DataError: no document to write for, or no query that was kept. ConfigError: the model cannot write.
    """
    from ullme.encoder import Encoder

    data = Dataset.open(inputs["data"])
    chosen = [document for document in data.training_documents() if not document.dataset and document.content.strip()]
    if not chosen:
        raise DataError("synthetic: no document that training may see; there is nothing to write queries for")
    if section.max_documents is not None:
        chosen = sorted(chosen, key=lambda document: (hash_share(document.id, "synthetic"), document.id))[: section.max_documents]
    with Journal(draft.scratch / "written.jsonl") as journal:
        rows = [row for batch in journal.entries for row in batch]
        done = len({row["document"] for row in rows})
        if done < len(chosen):
            encoder = Encoder.load(inputs["model"])
            writer = _Writer(section, encoder, data, draft.seed, before=[row["query"] for row in rows])
            with Progress(len(chosen), "write queries", unit="document", initial=done) as progress:
                for batch in writer.batches(chosen, done):
                    new = writer.write(batch)
                    journal.append(new)
                    rows += new
                    progress.advance(len(batch))
    _publish(section, data, rows, draft)


class _Writer:
    """The LLM, asked for queries and rating them."""

    def __init__(self, section: SyntheticConfig, encoder: Encoder, data: Dataset, seed: int, *, before: Sequence[str]) -> None:
        from ullme.lexical import BM25Searcher

        self._section, self._encoder, self._seed = section, encoder, seed
        self._known = {normalise(query.text) for split in SPLITS for query in data.queries(split)} | set(map(normalise, before))
        self._data, self._pool = data, data.training_documents()
        self._search: BM25Searcher | None = None
        if section.rivals:
            self._search = BM25Searcher(document.content for document in self._pool)

    def batches(self, documents: Sequence[Document], done: int) -> Iterator[Sequence[Document]]:
        """Those that are still to do; a batch is written down whole, so all attempts cut them alike."""
        for start in range(done, len(documents), self._section.batch_documents):
            yield documents[start : start + self._section.batch_documents]

    def write(self, documents: Sequence[Document]) -> list[dict[str, Any]]:
        """The queries of some documents, rated."""
        section, tokenizer = self._section, self._encoder.tokenizer
        passages = [self._cut(document) for document in documents]
        prompts = [section.prompt.replace(PASSAGE, passage) for passage in passages for _ in range(section.per_document)]
        seed = int(hash_share(f"{documents[0].id}:{self._seed}", "write") * 2**31)
        texts = self._encoder.generate(
            prompts,
            chat=section.chat and bool(getattr(tokenizer, "chat_template", None)),
            max_new_tokens=section.query_tokens,
            temperature=section.temperature,
            top_p=section.top_p,
            seed=seed,
        )
        rows = []
        for place, text in enumerate(texts):
            document = documents[place // section.per_document]
            said = " ".join((text.strip().splitlines() or [""])[0].split())
            rows.append({"document": document.id, "query": said, "outcome": self._refused(said)})
        self._rate([row for row in rows if row["outcome"] == KEPT])
        return rows

    def _cut(self, document: Document) -> str:
        tokenizer: Any = self._encoder.tokenizer
        ids = tokenizer(document.content, add_special_tokens=False, truncation=True, max_length=self._section.passage_tokens)
        return tokenizer.decode(ids["input_ids"], skip_special_tokens=True)

    def _refused(self, said: str) -> str:
        if not any(letter.isalnum() for letter in said):
            return EMPTY
        known = normalise(said)
        outcome = ASKED if known in self._known else KEPT
        self._known.add(known)
        return outcome

    def _rate(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write down how likely each query is given its passage and its rivals, and drop those that suit another better."""
        import torch

        from ullme.batches import TokenRow, chunk_by_tokens

        if self._search is None or not rows:
            return
        tokenizer: Any = self._encoder.tokenizer
        found = self._search.search([row["query"] for row in rows], self._section.rivals + 1)
        candidates, pairs = [], []
        for row, places in zip(rows, found.rows, strict=True):
            near = [self._pool[place].id for place in places.tolist() if place >= 0]
            names = [row["document"], *[name for name in near if name != row["document"]][: self._section.rivals]]
            asked = tokenizer(row["query"], add_special_tokens=False)["input_ids"]
            candidates.append(names)
            for name in names:
                given = tokenizer(f"{self._cut(self._data.document(name))}\n")["input_ids"]
                pairs.append(TokenRow([*given, *asked], len(given)))
        means = [0.0] * len(pairs)
        with torch.inference_mode():
            for chunk in chunk_by_tokens([len(pair) for pair in pairs], self._section.runtime.batch_tokens):
                total, tokens = self._encoder.sequence_logprobs(self._encoder.collate([pairs[place] for place in chunk]))
                for place, value in zip(chunk, (total / tokens).tolist(), strict=True):
                    means[place] = value
        start = 0
        for row, names in zip(rows, candidates, strict=True):
            own, *others = means[start : start + len(names)]
            start += len(names)
            row["logprob"] = round(own, 4)
            row["rivals"] = {name: round(value, 4) for name, value in zip(names[1:], others, strict=True)}
            if others and max(others) >= own:
                row["outcome"] = LIKELIER


def _publish(section: SyntheticConfig, data: Dataset, rows: Sequence[dict[str, Any]], draft: Draft) -> None:
    numbers: Counter[str] = Counter()
    written = []
    for row in rows:
        if row["outcome"] == KEPT:
            name = f"synthetic:{row['document']}:{numbers[row['document']]}"
            numbers[row["document"]] += 1
            written.append(Query(name, row["query"], "train", {row["document"]: 1}))
    outcomes = Counter(row["outcome"] for row in rows)
    said = ", ".join(f"{outcome} {number}" for outcome, number in outcomes.most_common())
    if not written:
        raise DataError(
            f"synthetic: none of {len(rows)} queries was kept ({said}); look at {draft.scratch / 'written.jsonl'}, and set rivals "
            "lower, or another prompt or model"
        )
    logger.info("synthetic: %d queries for %d documents: %s", len(rows), len(numbers), said)
    queries = [query for split in SPLITS for query in data.queries(split)] + written
    documents = data.documents()
    shutil.rmtree(draft.path, ignore_errors=True)
    logs = draft.path / "logs"
    logs.mkdir(parents=True)
    write_tables(draft.path, documents, queries, data.name)
    lines = "".join(json.dumps({**row, "prompt": section.prompt}, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(logs / "synthetic.jsonl", lines)
    draft.meta = {**counted(documents, queries), "synthetic_written": len(rows), "synthetic_kept": len(written)}


SYNTHESISE = Stage("synthesise", "data", 1, synthesise)
