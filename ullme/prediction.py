"""Texts as rows of tokens some of which the LLM predicts: hidden ones (MNTP), or each after those before it (GEM).

A token at place i is predicted from the state at i - 1, as everywhere in an LLM.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from ullme.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ullme.batches import TokenRow
    from ullme.encoder import Encoder

__all__ = ["Doubling", "MaskStyle", "Masking", "PredictedRow", "Prediction", "mask", "mask_id"]

MaskStyle = Literal["bert", "all"]
MASKED, RANDOM = 0.8, 0.1
"""Of the tokens that style `bert` chooses: how many become the mask, how many another token; the others stay (arXiv 1810.04805)."""


@dataclass(frozen=True)
class PredictedRow:
    """A text as the model sees it; places: Int[m] of the tokens that are predicted, none of them the first; targets: Int[m]."""

    ids: np.ndarray
    places: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


class Prediction(Protocol):
    """How an objective reads texts."""

    def rows(self, texts: Sequence[TokenRow], encoder: Encoder, random: np.random.Generator) -> list[PredictedRow]:
        """One row per text, in order. texts: as they are embedded, prompt and special tokens included."""
        ...


@dataclass(frozen=True)
class Masking:
    """Some of the tokens are hidden and predicted (MNTP, LLM2Vec, arXiv 2404.05961, section 2.2).

    share: of a text's tokens. style: `bert` (80% mask, 10% another token, 10% as they are) or `all` (mask). token: the mask.
    """

    share: float
    style: MaskStyle
    token: str

    def rows(self, texts: Sequence[TokenRow], encoder: Encoder, random: np.random.Generator) -> list[PredictedRow]:
        """Each text with tokens hidden."""
        tokenizer = encoder.tokenizer
        hidden, vocabulary = mask_id(tokenizer, self.token), len(tokenizer)
        kept = {*tokenizer.all_special_ids, *encoder.special_ids}
        return [
            mask(row.ids, self, mask_id=hidden, vocabulary=vocabulary, kept=kept, random=random, prompt=row.prompt) for row in texts
        ]


def mask(
    ids: Sequence[int] | np.ndarray,
    masking: Masking,
    *,
    mask_id: int,
    vocabulary: int,
    kept: Collection[int],
    random: np.random.Generator,
    prompt: int = 0,
) -> PredictedRow:
    """Hide each token with probability `share`, but for the prompt's, the first, which nothing precedes, and those in `kept`."""
    original = np.asarray(ids, dtype=np.int64)
    chosen = random.random(len(original)) < masking.share
    chosen[: max(1, prompt)] = False
    chosen &= ~np.isin(original, list(kept))
    shown = original.copy()
    draw, other = random.random(len(original)), random.integers(0, vocabulary, len(original))
    masked = chosen & ((draw < MASKED) | (masking.style == "all"))
    replaced = chosen & ~masked & (draw < MASKED + RANDOM)
    shown[masked], shown[replaced] = mask_id, other[replaced]
    places = np.flatnonzero(chosen)
    return PredictedRow(shown, places, original[places])


def mask_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of the mask: the tokenizer's own mask token where it has one, else of `token`.

    Raises:
        ConfigError: the token is several, or unknown.
    """
    own = getattr(tokenizer, "mask_token_id", None)
    if isinstance(own, int):
        return own
    found = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(found) != 1 or found[0] == getattr(tokenizer, "unk_token_id", None):
        raise ConfigError(
            f"mntp.mask_token: expected one token of this model, but {token!r} is {len(found)}; try another character"
        )
    return int(found[0])


@dataclass(frozen=True)
class Doubling:
    """Texts as GEM's language-model loss reads them: as they are, or, `share` of them, as text, special tokens, text again."""

    share: float

    def rows(self, texts: Sequence[TokenRow], encoder: Encoder, random: np.random.Generator) -> list[PredictedRow]:
        """Every token of text and repetition is predicted but the first and those of the prompt; special tokens are not.

        Raises:
            ConfigError: the encoder has no special tokens.
        """
        special = encoder.special_ids
        if not special:
            raise ConfigError(
                "objective gem reads texts through special tokens, and the model has none; set backbone.pooling: special"
            )
        made = []
        for row, doubled in zip(texts, random.random(len(texts)) < self.share, strict=True):
            text = np.asarray(row.ids[: len(row.ids) - len(special)], dtype=np.int64)
            begin = max(row.prompt, len(encoder.prompts.begin))
            ids = np.concatenate([text, special, text[begin:]]) if doubled else text
            predicted = ids < special[0]
            predicted[: max(1, row.prompt)] = False
            places = np.flatnonzero(predicted)
            made.append(PredictedRow(ids, places, ids[places]))
        return made
