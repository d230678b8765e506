"""What stands around a text when it is embedded: templates by role and data set, filled in the same way in training and in use.

    plain      "Query:\\n"                                   before the text
    instruct   "Instruct: {instruction}\\nQuery: {text}"     the query's own instruction, or the one configured
    chat       any of these, as a user's turn of the tokenizer's own chat template

The prompt (what stands before the text) is attended to and, by default, left out of the pooling. A suffix (what stands after)
counts. A text that is too long loses its end; the prompt and the suffix never lose anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from ullme.components import Section
from ullme.errors import ConfigError, ContractError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from ullme.batches import TokenRow

__all__ = ["DatasetPrompts", "PromptConfig", "Prompts", "Role", "chat_parts", "end_texts_with", "places_of"]

Role = Literal["query", "document"]
TEXT, INSTRUCTION = "{text}", "{instruction}"
FOLLOWING = ("parse", "The", "1", "_x", "(a)")
"""How texts begin (and end), for the test that a prompt's last token does not depend on what follows."""
SHORTEST_TEXT = 4
"""Tokens that must be left for the text."""


def _checked(template: str | None) -> str | None:
    before, _, after = (template or "").partition(TEXT)
    if TEXT in after or INSTRUCTION in after or before.count(INSTRUCTION) > 1:
        raise ValueError(f"expected {TEXT} at most once, and {INSTRUCTION} at most once and before it; got {template!r}")
    return template


class DatasetPrompts(Section):
    """What one data set's texts take in place of the general templates; null: the general one."""

    query: str | None = None
    document: str | None = None
    instruction: str | None = None

    _templates = field_validator("query", "document")(_checked)


class PromptConfig(Section):
    """Templates by role. Without `{text}` in it, a template stands before the text."""

    query: str = "Query:\n"
    document: str = ""
    instruction: str = ""
    """What `{instruction}` means for a query that brings none of its own."""
    chat: bool = False
    """The filled template is a user's turn of the tokenizer's chat template, and the answer's opening follows it."""
    datasets: dict[str, DatasetPrompts] = Field(default_factory=dict)
    """By the name of a data set (`data.name`)."""

    _templates = field_validator("query", "document")(_checked)

    def around(self, role: Role, dataset: str = "", instruction: str = "") -> tuple[str, str]:
        """What stands before and after a text of this role, the instruction written in."""
        own = self.datasets.get(dataset, DatasetPrompts())
        template = getattr(self, role) if getattr(own, role) is None else getattr(own, role)
        before, _, after = template.partition(TEXT)
        said = instruction or (self.instruction if own.instruction is None else own.instruction)
        return before.replace(INSTRUCTION, said), after


class Prompts:
    """The templates of a configuration for one tokenizer: texts -> token rows.

    begin, end: ids that the tokenizer itself puts around every text; suffix: ids that the templates put after it; special: ids
    behind all of that.
    """

    def __init__(
        self, config: PromptConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int, *, special: Sequence[int] = ()
    ) -> None:
        self.config, self.max_tokens, self.special = config, max_tokens, tuple(special)
        self._tokenizer: Any = tokenizer
        self._fast = _private_copy(tokenizer)
        self.begin, self.end = _special_ids(tokenizer)
        self._opening, closing = chat_parts(tokenizer) if config.chat else ("", "")
        places: list[tuple[Role, str]] = [(role, name) for name in ("", *config.datasets) for role in ("query", "document")]
        after = {f"datasets.{name}.{role}" if name else role: config.around(role, name)[1] for role, name in places}
        if len(set(after.values())) > 1:
            raise ConfigError(
                f"backbone.prompts: what follows {TEXT} must be the same in every template, because a model folder has one "
                f"ending for all texts; got {', '.join(f'{where}: {text!r}' for where, text in after.items())}"
            )
        self._after = after["query"] + closing
        self.suffix = tuple(self._ids([self._after])[0])
        if self.suffix and self.end[: len(self.suffix)] == self.suffix:
            self.end = self.end[len(self.suffix) :]  # a saved folder's tokenizer puts the suffix there
        if self.special and self.end[-len(self.special) :] == self.special:
            self.end = self.end[: -len(self.special)]  # and the special tokens
        self._lengths: dict[str, int] = {}
        for role, name in places:
            self._frame(role, name)

    def tokenise(
        self,
        texts: Sequence[str],
        role: Role,
        *,
        dataset: str | Sequence[str] = "",
        instructions: Sequence[str] | None = None,
        max_tokens: int | None = None,
    ) -> list[TokenRow]:
        """Prompt + text + suffix as token rows of at most `max_tokens`; `lost` counts the text's tokens that were cut off.

        dataset: of all texts, or of each; instructions: one per text, empty = the configured one; max_tokens: shorter rows than
        usual, but for what the prompts take.

        Raises:
            ContractError: not as many instructions, or data sets, as texts.
        """
        places = places_of(texts, dataset, instructions)
        frames = {place: self._frame(role, *place) for place in set(places)}
        return self._rows(texts, [frames[place] for place in places], min(self.max_tokens, max_tokens or self.max_tokens))

    @property
    def ending(self) -> list[int]:
        """All that stands behind a text."""
        return [*self.suffix, *self.end, *self.special]

    def before(self, role: Role, *, dataset: str = "", instruction: str = "") -> str:
        """The string that stands before a text."""
        return self._opening + self.config.around(role, dataset, instruction)[0]

    def string(self, text: str, role: Role, *, dataset: str = "", instruction: str = "") -> str:
        """The whole string that is embedded for a text, before any truncation."""
        return self.before(role, dataset=dataset, instruction=instruction) + text + self._after

    def _rows(self, texts: Sequence[str], frames: Sequence[tuple[str, int]], max_tokens: int) -> list[TokenRow]:
        from ullme.batches import TokenRow

        if not texts:
            return []
        begin, ending = list(self.begin), self.ending
        rows = []
        strings = [before + text for text, (before, _) in zip(texts, frames, strict=True)]
        for ids, (_, prompt) in zip(self._ids(strings), frames, strict=True):
            room = max(max_tokens - len(begin) - len(ending), prompt - len(begin) + SHORTEST_TEXT)
            lost = max(0, len(ids) - room)
            kept = ids[:room] if lost else ids
            rows.append(TokenRow([*begin, *kept, *ending] if begin or ending else kept, prompt, lost))
        return rows

    def _frame(self, role: Role, dataset: str, instruction: str = "") -> tuple[str, int]:
        """What stands before a text, and how many tokens of prompt that makes."""
        before = self.before(role, dataset=dataset, instruction=instruction)
        if before not in self._lengths:
            self._lengths[before] = self._prompt_tokens(before, f"datasets.{dataset}.{role}" if dataset else role)
        return before, self._lengths[before]

    def _prompt_tokens(self, before: str, where: str) -> int:
        """Number of tokens of a prompt, those that begin every text included; 0 without a prompt.

        Raises:
            ConfigError: a text merges with what stands around it, or too few tokens are left for it.
        """
        alone = self._ids([before])[0] if before else []
        for text in FOLLOWING:
            together, ended = self._ids([before + text, before + text + self._after])
            if together[: len(alone)] != alone:
                raise ConfigError(
                    f"backbone.prompts.{where}: the tokenizer merges the end of {before!r} with the text that follows, so the "
                    "prompt could not be left out of the pooling; end it with a newline or a colon, not with a space"
                )
            if ended != [*together, *self.suffix]:
                raise ConfigError(
                    f"backbone.prompts.{where}: the tokenizer merges the end of a text with {self._after!r}, so the suffix could "
                    "not be kept when a text is cut; begin it with a newline or a special token"
                )
        taken = len(self.begin) + len(alone) + len(self.ending)
        if taken + SHORTEST_TEXT > self.max_tokens:
            raise ConfigError(
                f"backbone.max_tokens is {self.max_tokens}, but the {where} prompt alone takes {taken} tokens; expected at least "
                f"{SHORTEST_TEXT} more"
            )
        return len(self.begin) + len(alone) if before else 0

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, whole and without the tokenizer's own additions."""
        if self._fast is not None:
            return [encoding.ids for encoding in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)]
        return self._tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]


def places_of(texts: Sequence[str], dataset: str | Sequence[str], instructions: Sequence[str] | None) -> list[tuple[str, str]]:
    """(data set, instruction) of each text. dataset: of all, or of each; instructions: of each, None = the configured one.

    Raises:
        ContractError: not as many as texts.
    """
    datasets = [dataset] * len(texts) if isinstance(dataset, str) else dataset
    said = [""] * len(texts) if instructions is None else instructions
    for name, each in (("instructions", said), ("dataset", datasets)):
        if len(each) != len(texts):
            raise ContractError(f"{name}: expected one per text ({len(texts)}), got {len(each)}")
    return list(zip(datasets, said, strict=True))


def end_texts_with(tokenizer: PreTrainedTokenizerBase, begin: Sequence[int], end: Sequence[int]) -> None:
    """Make the tokenizer itself put these ids around every text, also where it cuts one: how a folder keeps its suffix.

    Raises:
        ConfigError: the tokenizer is not of the kind that can be told so.
    """
    from tokenizers.processors import TemplateProcessing

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError("backbone.prompts: a suffix needs a tokenizer of the tokenizers library, and this model has another")
    names = {number: f"id{number}" for number in (*begin, *end)}
    single = " ".join([*(names[number] for number in begin), "$A", *(names[number] for number in end)])
    tokens: Any = [
        {"id": name, "ids": [number], "tokens": [tokenizer.convert_ids_to_tokens(number) or name]} for number, name in names.items()
    ]
    backend.post_processor = TemplateProcessing(single=single, special_tokens=tokens) if tokens else TemplateProcessing(single="$A")


def _private_copy(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The tokenizer's engine without its state of truncation and padding, which calls from several threads would share."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    copy = type(backend).from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer puts before and after every text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: Any = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    raise ConfigError(
        "the tokenizer changes a text's own tokens when it adds its special ones, which a prompt could not be kept apart from"
    )


def chat_parts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template writes before and after a user's words, the answer's opening included.

    Raises:
        ConfigError: the tokenizer has no chat template, or one that changes what a user says.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("backbone.prompts.chat: this model's tokenizer has no chat template; set chat: false")
    mark = "ullme-text"
    turn = [{"role": "user", "content": mark}]
    whole = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    before, found, after = whole.partition(mark)
    if not found or mark in after:
        raise ConfigError("backbone.prompts.chat: the model's chat template does not write what a user says exactly once")
    begin: Any = tokenizer.bos_token
    if begin and before.startswith(begin) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        before = before.removeprefix(begin)  # the tokenizer adds it
    return before, after
