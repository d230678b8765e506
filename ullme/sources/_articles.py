"""One `Article` from a file of text, Markdown, HTML or PDF, by the usual extractor of each.

.txt           paragraphs between blank lines
.md            markdown-it-py: sections by heading, code blocks kept apart
.html .htm     trafilatura: the page's main content as Markdown, then as above (Barbaresi 2021, aclanthology.org/2021.acl-demo.15)
.pdf           pypdfium2: the text of each page, in the sections of the document's outline where it has one
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ullme.errors import DataError
from ullme.passages import PATH_SEPARATOR, Article, Block, Part, page_label
from ullme.records import normalise

if TYPE_CHECKING:
    from markdown_it.token import Token

__all__ = ["EXTRACTORS", "Unreadable", "extractor_versions", "read_article"]

CONTROL = re.compile(r"[\x01-\x08\x0b\x0e-\x1f\x7f]")
FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)\n(?:---|\.\.\.)[ \t]*\n", re.DOTALL)
FRONT_TITLE = re.compile(r"^title:[ \t]*(.+?)[ \t]*$", re.MULTILINE)
LINK = re.compile(r"!?\[([^\[\]]*)\]\([^()\s]*(?:\s+\"[^\"]*\")?\)")
TAG = re.compile(r"<!--.*?-->|<[^<>]+>", re.DOTALL)
NUMBERING = re.compile(r"^(?:\d+\.)*\d+\.?\s+")
ANCHOR = re.compile(r"^[§#]\s*|\s*[¶#]$")
PROGRAM_TITLE = re.compile(r"^Microsoft Word - |\.(?:docx?|dvi|indd|odt|pdf|pptx?|qxd|rtf|tex|xlsx?)$|^untitled$", re.IGNORECASE)
PACKAGES = {".html": "trafilatura", ".htm": "trafilatura", ".pdf": "pypdfium2", ".md": "markdown-it-py"}


class Unreadable(Exception):
    """A file that gives no text. cause: the phrase it is counted under. detail: what is particular to it."""

    def __init__(self, cause: str, detail: str = "") -> None:
        self.cause, self.detail = cause, detail
        super().__init__(cause)


def extractor_versions(suffixes: Iterable[str]) -> dict[str, str]:
    """The packages that read these kinds of file, with their versions: another version may extract another text.

    Raises:
        DataError: one is not installed.
    """
    versions = {}
    for suffix in sorted(set(suffixes) & PACKAGES.keys()):
        package = PACKAGES[suffix]
        if importlib.util.find_spec(package.replace("-py", "").replace("-", "_")) is None:
            raise DataError(
                f"data.source (text): expected the package {package} to read {suffix} files, it is not installed; "
                f"pip install 'ullme[documents]', or leave them out with data.source.exclude: ['**/*{suffix}']"
            )
        versions[package] = importlib.metadata.version(package)
    return versions


def read_article(path: Path) -> Article:
    """The document in a file.

    Raises:
        Unreadable: the file is empty, binary, encrypted, damaged, or holds no text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Unreadable("cannot be read", error.strerror or str(error)) from error
    if not data.strip():
        raise Unreadable("empty file")
    article = EXTRACTORS[path.suffix.lower()](data)
    if not any(block.text.strip() for part in article.parts for block in part.blocks):
        raise Unreadable("no text", "a scanned PDF needs text recognition first" if path.suffix.lower() == ".pdf" else "")
    return article


def _text(data: bytes) -> str:
    if b"\x00" in data:
        raise Unreadable("binary file", f"NUL at byte {data.index(0)}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable("invalid UTF-8", f"byte 0x{data[error.start]:02x} at position {error.start}") from error
    return _clean(text)


def _clean(text: str) -> str:
    """Without control characters, halves of surrogate pairs and foreign line ends."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x0c", "\n\n").replace("\x00", "")
    return CONTROL.sub("", text).encode("utf-8", "replace").decode("utf-8")


def _paragraphs(text: str) -> tuple[Block, ...]:
    return tuple(Block(paragraph) for paragraph in re.split(r"\n[ \t]*\n", text) if paragraph.strip())


def plain_article(data: bytes) -> Article:
    """A text file: one part without a heading."""
    return Article("", (Part("", _paragraphs(_text(data))),))


def markdown_article(data: bytes) -> Article:
    """A Markdown file: its title is that of the front matter, or its first heading."""
    return _from_markdown(_text(data))


def html_article(data: bytes) -> Article:
    """A page: its title is the first heading of the main content, or what the browser shows."""
    import trafilatura

    if b"\x00" in data[:1024]:
        raise Unreadable("binary file", f"NUL at byte {data.index(0)}")
    tree = trafilatura.load_html(data)
    if tree is None:
        raise Unreadable("no HTML")
    shown = " ".join((tree.findtext(".//title") or "").split())
    text = trafilatura.extract(tree, output_format="markdown", include_comments=False, include_tables=True, favor_recall=True)
    article = _from_markdown(_clean(text or ""))
    return article if article.title else Article(_clean(shown), article.parts)


def _from_markdown(text: str) -> Article:
    front = FRONT_MATTER.match(text)
    title = ""
    if front:
        found = FRONT_TITLE.search(front.group(1))
        title = found.group(1).strip("\"'") if found else ""
        text = text[front.end() :]
    parts: list[tuple[list[str], list[Block]]] = [([], [])]
    depths: list[int] = []
    for depth, heading, block in _markdown_blocks(text):
        if block is not None:
            parts[-1][1].append(block)
            continue
        first = len(parts) == 1 and not depths
        if (first and not title and (depth == 1 or not parts[0][1])) or (title and normalise(heading) == normalise(title)):
            title = title or heading
            continue
        while depths and depths[-1] >= depth:
            depths.pop()
        path = [*parts[-1][0][: len(depths)], heading]
        depths.append(depth)
        parts.append((path, []))
    return Article(title, tuple(Part(PATH_SEPARATOR.join(path), tuple(blocks)) for path, blocks in parts if blocks))


def _markdown_blocks(text: str) -> Iterator[tuple[int, str, Block | None]]:
    """(depth, heading, None) of each heading and (0, "", block) of whatever else stands at the top level, in order."""
    from markdown_it import MarkdownIt

    lines = text.split("\n")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for number, token in enumerate(tokens):
        if token.level or token.map is None or token.nesting < 0:
            continue
        if token.type == "heading_open":
            heading = ANCHOR.sub("", _plain(tokens[number + 1])).replace(PATH_SEPARATOR, " / ")
            if heading:
                yield int(token.tag[1:]), heading, None
        elif token.type in ("fence", "code_block"):
            yield 0, "", Block(token.content.strip("\n"), code=True)
        else:
            source = "\n".join(lines[token.map[0] : token.map[1]])
            source = TAG.sub("", source) if token.type == "html_block" else LINK.sub(r"\1", LINK.sub(r"\1", source))
            if source.strip():
                yield 0, "", Block(source)


def _plain(inline: Token) -> str:
    """The words of a heading, without its markup."""
    words = "".join(
        child.content if child.type in ("text", "code_inline") else " " for child in inline.children or [] if child.nesting == 0
    )
    return " ".join(words.split())


def pdf_article(data: bytes) -> Article:
    """A PDF: one part for each page, or for what stands on it below a heading of the outline."""
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        locked = "password" in str(error).casefold()
        raise Unreadable(
            "encrypted PDF" if locked else "damaged PDF", "save a copy without a password" if locked else str(error)
        ) from error
    try:
        title = _clean(str(document.get_metadata_value("Title"))).strip()
        outline = _outline(document)
        pages = [_clean(re.sub(r"\ufffe(?:\r\n)?", "", _page_text(document, page))) for page in range(len(document))]
    except pypdfium2.PdfiumError as error:
        raise Unreadable("damaged PDF", str(error)) from error
    finally:
        document.close()
    return Article("" if PROGRAM_TITLE.search(title) else title, tuple(_sections(pages, outline)))


def _page_text(document: Any, page: int) -> str:
    return document[page].get_textpage().get_text_range(errors="replace")


def _outline(document: Any) -> dict[int, list[list[str]]]:
    """Page -> paths of the headings that begin on it, in order."""
    found: dict[int, list[list[str]]] = {}
    path: list[str] = []
    for bookmark in document.get_toc():
        heading = " ".join(_clean(bookmark.get_title()).split()).replace(PATH_SEPARATOR, " / ")
        target = bookmark.get_dest()
        page = target.get_index() if target else None
        if not heading or page is None:
            continue
        path = [*path[: bookmark.level], heading]
        found.setdefault(page, []).append(path)
    return found


def _sections(pages: list[str], outline: dict[int, list[list[str]]]) -> Iterator[Part]:
    """The pages, cut where a line is the next heading of the outline; the heading itself is left out of the text."""
    path: list[str] = []
    for number, text in enumerate(pages):
        coming = outline.get(number, [])
        lines: list[str] = []
        for line in text.split("\n"):
            said = _unnumbered(line)
            place = next((at for at, entry in enumerate(coming) if said and _unnumbered(entry[-1]) == said), None)
            if place is None:
                lines.append(line)
                continue
            yield from _page_part(path, number, lines)
            path, coming, lines = coming[place], coming[place + 1 :], []
        yield from _page_part(path, number, lines)
        path = coming[-1] if coming else path


def _unnumbered(heading: str) -> str:
    return normalise(NUMBERING.sub("", heading.strip()))


def _page_part(path: list[str], number: int, lines: list[str]) -> Iterator[Part]:
    text = "\n".join(lines)
    if any(sign.isalpha() for sign in text):  # more than the page's number
        yield Part(PATH_SEPARATOR.join([*path, page_label(number + 1)]), _paragraphs(text))


EXTRACTORS: dict[str, Callable[[bytes], Article]] = {
    ".txt": plain_article,
    ".md": markdown_article,
    ".html": html_article,
    ".htm": html_article,
    ".pdf": pdf_article,
}
