"""Long documents cut into passages: whole paragraphs first, then sentences, then words; never across a section.

What a format's extractor gives is one `Article`, whatever the format was. A passage depends on its own section alone, so
editing one section leaves every other passage as it was, and so does the model: tokens are counted without a tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = ["Article", "Block", "Part", "count_tokens", "headings", "page_label", "passages", "sentences"]

PATH_SEPARATOR = " > "
PAGE = re.compile(r"page \d+")
# Words, digits one by one, runs of signs, line ends with the indentation that follows, wider gaps within a line.
PIECE = re.compile(r"[^\W\d_]+|\d|[^\w\s]+|_+|\s*\n\s*|[ \t]{2,}")
LETTERS_PER_TOKEN, SIGNS_PER_TOKEN = 8, 2
# After a full stop (not the one of a list's `1.`) and before what can begin a sentence; after a paragraph; before an item of
# a list or a row of a table.
SENTENCE_END = re.compile(
    r"(?<=[.!?])(?<!\s\d\.)(?<!\A\d\.)[\"'”’)\]]*\s+(?=[\"'“‘(\[`*_]*[^\W_a-z])|(?<=[。！？])"
    r"|\n(?:[ \t]*\n)+|\n(?=[ \t]*(?:[-*+•|]|\d+[.)])(?:\s|$))|\n(?=[ \t]*\|)"
)
LINE_END = re.compile(r"\n+")
WORD_END = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Block:
    """A paragraph, a list, a table, or a block of code. Code is cut between lines, anything else between sentences."""

    text: str
    code: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """What stands below one heading. section: the headings above it, outermost first, joined by ` > `."""

    section: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Article:
    """A document of any format: its title ("" where it has none) and its parts in order."""

    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A text that is not cut further. before: what stands between it and the piece ahead of it in a passage."""

    text: str
    tokens: int
    before: str = "\n\n"


def page_label(number: int) -> str:
    """How a page stands in a section."""
    return f"page {number}"


def headings(section: str) -> list[str]:
    """The headings of a section, outermost first; a page is none."""
    return [heading for heading in section.split(PATH_SEPARATOR) if heading and not PAGE.fullmatch(heading)]


def count_tokens(text: str) -> int:
    """About as many tokens as an LLM makes of English text or code, from its letters and signs alone.

    A word is one token for each 8 letters begun, a digit is one, a run of signs one for each 2, an indentation one; letters
    outside ASCII count by bytes. On English prose, Python and Markdown that is within 15% of SmolLM2's tokenizer (a test
    compares them). The parts of a text count at least as much as the whole.
    """
    total = 0
    for match in PIECE.finditer(text):
        piece = match.group()
        if piece.isspace() or piece.isdigit():
            total += 1
        elif not piece[0].isalpha():
            total += -(-len(piece.encode()) // SIGNS_PER_TOKEN)
        elif piece.isascii():
            total += -(-len(piece) // LETTERS_PER_TOKEN)
        else:
            size = len(piece.encode())
            total += -(-size // (3 if size < 3 * len(piece) else 2))
    return total


def sentences(text: str) -> list[str]:
    """The sentences of a text, items of lists and rows of tables too, as they stand in it."""
    return [sentence for _, sentence in _cut(text, SENTENCE_END)]


def passages(blocks: Iterable[Block], *, chunk_tokens: int, overlap_tokens: int) -> list[str]:
    """The text of one section as passages of at most `chunk_tokens`, in order.

    Blocks are packed whole as long as they fit; one that is longer than a passage is cut between sentences (code: lines),
    and a sentence that is longer still between words. A passage begins with up to `overlap_tokens` of the end of the former
    one, fewer where the next piece would not fit beside them.
    """
    made: list[str] = []
    text, size = "", 0
    for piece in _pieces(blocks, chunk_tokens):
        between = count_tokens(piece.before)
        if text and size + between + piece.tokens > chunk_tokens:
            made.append(text)
            text = _end_of(text, min(overlap_tokens, chunk_tokens - between - piece.tokens))
            size = count_tokens(text)
        text, size = (text + piece.before + piece.text, size + between + piece.tokens) if text else (piece.text, piece.tokens)
    return [*made, text] if text else made


def _pieces(blocks: Iterable[Block], limit: int) -> Iterator[Piece]:
    for block in blocks:
        text = block.text.strip("\n").rstrip()
        if not text.strip():
            continue
        ways = (LINE_END, WORD_END) if block.code else (SENTENCE_END, WORD_END)
        yield from _fitting(Piece(text, count_tokens(text)), limit, ways)


def _fitting(piece: Piece, limit: int, ways: tuple[re.Pattern[str], ...]) -> Iterator[Piece]:
    """The piece itself if it fits, else what the first way makes of it, each cut further where it must be."""
    if piece.tokens <= limit:
        yield piece
    elif not ways:
        step = max(1, limit // 2)  # no character counts for more than two tokens
        for start in range(0, len(piece.text), step):
            text = piece.text[start : start + step]
            yield Piece(text, count_tokens(text), "" if start else piece.before)
    else:
        for number, (before, text) in enumerate(_cut(piece.text, ways[0])):
            yield from _fitting(Piece(text, count_tokens(text), before if number else piece.before), limit, ways[1:])


def _cut(text: str, end: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """(what stood before it, part) of each part; closing quotes and brackets stay with the sentence they close."""
    before, start = "", 0
    for match in end.finditer(text):
        gap = match.group()
        closing = gap[: len(gap) - len(gap.lstrip("\"'”’)]"))]
        stop = match.start() + len(closing)
        if text[start:stop].strip():
            yield before, text[start:stop]
            before, start = gap[len(closing) :], match.end()
    if text[start:].strip():
        yield before, text[start:]


def _end_of(text: str, room: int) -> str:
    """The longest end of a text that fits: from the beginning of a sentence, else of a line, else of a word."""
    if room <= 0:
        return ""
    for end in (SENTENCE_END, LINE_END, WORD_END):
        longest = ""
        for match in reversed(list(end.finditer(text))):
            rest = text[match.end() :]
            if count_tokens(rest) > room:
                break
            longest = rest
        if longest.strip():
            return longest
    return ""
