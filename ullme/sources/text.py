"""A folder of text, Markdown, HTML and PDF files, cut into passages that know the file they come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from ullme.artifacts import digest_of
from ullme.errors import DataError
from ullme.passages import passages
from ullme.records import Document, Problems, Records, Source, digest_files, objects
from ullme.sources._articles import EXTRACTORS, Unreadable, extractor_versions, read_article
from ullme.sources._pairs import Pairs
from ullme.sources._rows import existing


def _within(pattern: str) -> str:
    if not pattern or PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts:
        raise ValueError(f"expected a pattern within the folder, such as '**/*.md', got '{pattern}'")
    return pattern


Patterns = tuple[Annotated[str, AfterValidator(_within)], ...]


class Text(Source):
    """Every .txt, .md, .html, .htm and .pdf file of a folder and the folders below it, those whose name begins with a dot aside.

    HTML and PDF need `pip install 'ullme[documents]'`. A file becomes passages of whole paragraphs below one heading
    (`ullme.passages`): `guide/install.md#3` is the third of `guide/install.md`, which is its parent; its title is the file's
    and its section the headings above it. A file that gives no text is a bad record.

    path: the folder.
    chunk_tokens: longest passage. overlap_tokens: how much of a passage's end the next one of its section repeats.
    include, exclude: globs of files or folders, from the folder.
    labels: queries with their answers, one JSON object a line: {"query": ..., "positives": ["guide.md", "guide.md#3"]} and
        optionally split, group, instruction. A file's name means all its passages.
    """

    path: Path
    chunk_tokens: int = Field(default=256, ge=16)
    overlap_tokens: int = Field(default=32, ge=0)
    include: Patterns = ("**/*",)
    exclude: Patterns = ()
    labels: Path | None = None

    @model_validator(mode="after")
    def _overlap_leaves_something(self) -> Text:
        if self.overlap_tokens > self.chunk_tokens // 2:
            raise ValueError(
                f"overlap_tokens must be at most half of chunk_tokens ({self.chunk_tokens}), got {self.overlap_tokens}"
            )
        return self

    def fingerprint(self) -> str:
        """Digest of every file's name and contents, and of the versions of what reads them."""
        folder = _Folder(self)
        labels = [("labels", existing(self.labels, "JSON Lines"))] if self.labels else []
        return digest_of(
            [folder.versions, digest_files([*labels, *((f"file/{name}", path) for name, path in folder.files.items())])]
        )

    def read(self, problems: Problems) -> Records:
        """Every passage, and the queries of `labels`."""
        folder = _Folder(self)
        pairs = Pairs(searchable=True)
        for document in folder.documents(problems):
            pairs.documents[document.id] = document
        if self.labels:
            pairs.read_labels(objects(existing(self.labels, "JSON Lines"), problems), folder.find)
        counts = {"files": len(folder.passages), "files_of_other_kinds": folder.others}
        return Records(list(pairs.documents.values()), list(pairs.queries()), counts)


@dataclass
class _Folder:
    """The files of a folder by their path within it, and what became of them. others: how many are of no kind that is read.

    Raises:
        DataError: no folder, none of its files can be read, or what reads them is not installed.
    """

    section: Text
    files: dict[str, Path] = field(init=False)
    others: int = field(init=False)
    versions: dict[str, str] = field(init=False)
    passages: dict[str, list[str]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        root = self.section.path.expanduser()
        if not root.is_dir():
            raise DataError(f"{self.section.path}: expected a folder of documents, found none there; check data.source.path")
        included, excluded = _matching(root, self.section.include), _matching(root, self.section.exclude)
        found = sorted(
            (path.relative_to(root).as_posix(), path)
            for path in root.rglob("*")
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
            if not included.isdisjoint({path, *path.parents}) and excluded.isdisjoint({path, *path.parents})
        )
        self.files = {name: path for name, path in found if path.suffix.lower() in EXTRACTORS}
        self.others = len(found) - len(self.files)
        if not self.files:
            raise DataError(
                f"{self.section.path}: expected files ending with {', '.join(EXTRACTORS)}, got none "
                f"({self.others} others); check data.source: path, include and exclude"
            )
        self.versions = extractor_versions(path.suffix.lower() for path in self.files.values())

    def documents(self, problems: Problems) -> Iterator[Document]:
        """The passages of every file in order; what gives none is a problem."""
        for name, path in self.files.items():
            self.passages[name] = []
            try:
                article = read_article(path)
            except Unreadable as error:
                problems.add(path, 1, error.cause, error.detail)
                continue
            for part in article.parts:
                for text in passages(
                    part.blocks, chunk_tokens=self.section.chunk_tokens, overlap_tokens=self.section.overlap_tokens
                ):
                    self.passages[name].append(f"{name}#{len(self.passages[name]) + 1}")
                    yield Document(
                        self.passages[name][-1], text, article.title, parent=name, section=part.section, metadata=of_file(name)
                    )

    def find(self, name: str) -> list[str] | None:
        """The passages that a label names: a file's, or the one. None: there is no such file or passage."""
        if name in self.passages:
            return self.passages[name]
        parent = name.rpartition("#")[0]
        if parent not in self.passages:
            return None
        known = self.passages[parent]
        return [name] if name in known else [] if not known else None


def of_file(name: str) -> dict[str, str]:
    """What a search can filter by: folder and ending of a file."""
    path = PurePosixPath(name)
    return {"file": name, "folder": path.parent.as_posix(), "ending": path.suffix.lower().removeprefix(".")}


def _matching(root: Path, patterns: tuple[str, ...]) -> set[Path]:
    return {path for pattern in patterns for path in root.glob(pattern)}
