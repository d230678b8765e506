"""Questions with several answers, one of them right, by the probability of each (MMLU, arXiv 2009.03300)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from ullme.artifacts import sha256_file
from ullme.errors import ConfigError, DataError
from ullme.tasks._language import LanguageTask, Unit, json_lines, scored_rows, spread

if TYPE_CHECKING:
    from ullme.encoder import Encoder

__all__ = ["MultipleChoiceTask"]

LETTERS = "ABCDEFGHIJ"
FIELDS, FORM = ("question", "choices", "answer"), '{"question": ..., "choices": [...], "answer": place of the right one, from 0}'


class MultipleChoiceTask(LanguageTask):
    """Share of the questions whose right answer is the likeliest one.

    path: lines of {"question", "choices", "answer", "subject"}, the answer as its place from 0. answers: `letter` (the choices
    stand in the question, as in the paper) or `text` (log-probability per character of each choice, for models too small to
    read a list). examples: a file of the same form, of which the first `shots` on the question's subject stand before it.
    max_questions: so many, spread evenly; null: all.
    """

    answers: Literal["letter", "text"] = "letter"
    examples: Path | None = None
    shots: int = Field(default=0, ge=0)
    max_questions: int | None = Field(default=None, ge=1)
    examples_digest: str = ""

    @model_validator(mode="after")
    def _shots_stand_in_a_file(self) -> MultipleChoiceTask:
        if bool(self.shots) != (self.examples is not None):
            raise ValueError(f"shots: {self.shots} and examples: {self.examples}: expected both or neither; set both")
        return self

    def resolved(self) -> MultipleChoiceTask:
        """A copy that names the contents of both files."""
        if self.examples is not None and not self.examples.is_file():
            raise ConfigError(f"evaluation.tasks: {self.label}: no such file: {self.examples}")
        digest = sha256_file(self.examples) if self.examples is not None else ""
        copy: Any = super().resolved()
        return copy.model_copy(update={"examples_digest": digest})

    def units(self, encoder: Encoder) -> Sequence[Unit]:
        """One row per answer; the question, and what stands before it, is given."""
        from ullme.batches import TokenRow

        questions, examples = _questions(self.path), _questions(self.examples) if self.examples is not None else []
        found = []
        for place in spread(len(questions), self.max_questions):
            asked = questions[place]
            shots = [shot for shot in examples if shot.get("subject") == asked.get("subject")][: self.shots]
            said = "".join(f"{self._asked(shot)} {self._answers(shot)[shot['answer']]}\n\n" for shot in shots)
            given = encoder.tokenizer(said + self._asked(asked))["input_ids"]
            answers = [f" {answer}" for answer in self._answers(asked)]
            written = encoder.tokenizer(answers, add_special_tokens=False)["input_ids"]
            rows = [TokenRow([*given, *ids], len(given)) for ids in written]
            found.append(Unit(f"line {place + 1}", rows, asked["answer"], [len(answer) for answer in answers]))
        return found

    def measure(self, encoder: Encoder, units: Sequence[Unit], batch_tokens: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """accuracy."""
        rows = [row for unit in units for row in unit.rows]
        values = scored_rows(encoder, rows, lambda b: encoder.sequence_logprobs(b)[0], batch_tokens=batch_tokens, name=self.label)
        right, start = [], 0
        for unit in units:
            scores = values[start : start + len(unit.rows)] / (unit.characters if self.answers == "text" else 1)
            right.append(float(np.argmax(scores) == unit.right))
            start += len(unit.rows)
        return {"accuracy": float(np.mean(right))}, {"accuracy": np.array(right)}

    def _asked(self, record: Mapping[str, Any]) -> str:
        """The question, up to where its answer begins."""
        listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, record["choices"], strict=False))
        return f"Question: {record['question']}{listed if self.answers == 'letter' else ''}\nAnswer:"

    def _answers(self, record: Mapping[str, Any]) -> list[str]:
        choices = [str(choice) for choice in record["choices"]]
        return list(LETTERS[: len(choices)]) if self.answers == "letter" else choices


def _questions(path: Path) -> list[dict[str, Any]]:
    records = json_lines(path, FIELDS, FORM)
    for number, record in enumerate(records, start=1):
        if not 2 <= len(record["choices"]) <= len(LETTERS) or record["answer"] not in range(len(record["choices"])):
            raise DataError(f"{path}:{number}: expected {FORM}, with 2 to {len(LETTERS)} choices")
    return records
