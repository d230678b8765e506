"""Functions of the running Python's standard library: a corpus with known answers that every machine has.

The query is the summary of a function's docstring; the document is its source without that docstring, so the answer
cannot be found by looking for the question's own words in a comment about it.
"""

from __future__ import annotations

import ast
import os
import platform
import re
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ullme.artifacts import digest_of
from ullme.errors import DataError
from ullme.records import SPLITS, Document, Problems, Query, Records, Source, Split, digest_files, hash_share, normalise

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "turtledemo"}
SIGNATURE = re.compile(r"^[\w.]+\([^()]*\)\s*(->\s*[\w.\[\], |]+?)?\s*(--?\s+|:\s+|\.\s*|$)")
FIELD_LINE = re.compile(r"^\s*(>>>|:\w|@\w|\.\. |[-=*~]{3,}|\w+:\s*$)")
SENTENCE = re.compile(r"(?<=[a-z0-9)'\"`][.!?])\s+(?=[A-Z])")
Share = Annotated[float, Field(ge=0, le=0.9)]


class PyDocs(Source):
    """Docstring summary -> function, split by top-level module.

    A module's split is a plain hash of its name with `salt`; the default salt was chosen for the size of the test part and
    for having some well-known modules in it, before any model was measured. Functions with the same summary or the same
    source (spacing aside) are positives of each other. Where such a group spans two splits, its members in the split that
    matters less (train before dev before test) are left out, so no summary and no source stands in two splits.

    roots: folders with Python packages to use in place of the standard library; each entry of a folder is one module.
    candidates: `all` functions are searchable, or those of the `test` modules only. Either way training never sees a
    function of a test module, not even as a negative.
    """

    roots: tuple[Path, ...] = ()
    candidates: Literal["test", "all"] = "all"
    test_share: Share = 0.3
    dev_share: Share = 0.07
    salt: str = "441"
    min_words: Annotated[int, Field(ge=1)] = 3
    max_summary_chars: Annotated[int, Field(ge=20)] = 300
    max_source_chars: Annotated[int, Field(ge=100)] = 8000

    @model_validator(mode="after")
    def _shares_leave_something(self) -> PyDocs:
        if self.dev_share + self.test_share >= 1:
            raise ValueError(f"dev_share + test_share must be below 1, got {self.dev_share + self.test_share:g}")
        return self

    def fingerprint(self) -> str:
        """Digest of the Python version and of every file that is read."""
        roots = list(enumerate(self._roots()))
        files = [(f"{number}/{path.relative_to(root).as_posix()}", path) for number, root in roots for path in _python_files(root)]
        return digest_of([platform.python_version(), digest_files(files)])

    def read(self, problems: Problems) -> Records:  # noqa: ARG002 - code that does not parse is passed over, as Python itself does
        """Every function that has a usable summary and real code, grouped and split."""
        found = [function for root in self._roots() for path in _python_files(root) for function in self._functions(root, path)]
        functions = _with_unique_ids(found)
        if not functions:
            where = ", ".join(str(root) for root in self._roots())
            raise DataError(f"{where}: expected Python functions with docstrings, found none; point `roots` at other folders")
        groups = _groups(functions)
        documents, queries, moved = [], [], 0
        for group in groups:
            side = SPLITS[max(SPLITS.index(self.split_of(function.module)) for function in group)]
            kept = [function for function in group if self.split_of(function.module) == side]
            moved += len(group) - len(kept)
            searchable = self.candidates == "all" or side == "test"
            for function in kept:
                documents.append(
                    Document(
                        function.id,
                        function.source,
                        "",
                        searchable=searchable,
                        held_out=side == "test",
                        metadata={"module": function.module},
                    )
                )
            positives = {function.id: 1 for function in kept}
            asked: set[str] = set()
            for function in kept:
                if normalise(function.summary) not in asked:
                    asked.add(normalise(function.summary))
                    queries.append(Query(f"q:{function.id}", function.summary, side, positives, group=function.module))
        counts = {"functions": len(functions), "modules": len({f.module for f in functions}), "left_out_of_two_splits": moved}
        return Records(sorted(documents, key=lambda document: document.id), sorted(queries, key=lambda query: query.id), counts)

    def split_of(self, module: str) -> Split:
        """The split that a top-level module belongs to; a private twin (`_pydatetime`, `_strptime`) goes by its public name."""
        share = hash_share(module.removeprefix("_py").lstrip("_"), self.salt)
        return "test" if share < self.test_share else "dev" if share < self.test_share + self.dev_share else "train"

    def _roots(self) -> list[Path]:
        roots = [root.expanduser() for root in self.roots] or [Path(os.__file__).parent]
        for root in roots:
            if not root.is_dir():
                raise DataError(f"{root}: expected a folder with Python packages (data.source.roots), found none; check the path")
        return roots

    def _functions(self, root: Path, path: Path) -> Iterator[Function]:
        try:
            with tokenize.open(path) as handle:
                text = handle.read()
            tree = ast.parse(text)
        except (SyntaxError, ValueError, UnicodeDecodeError):
            return
        parts = path.relative_to(root).with_suffix("").parts
        package = [root.name] if (root / "__init__.py").is_file() else []
        name = ".".join(part for part in (*package, *parts) if part != "__init__")
        module = ".".join([*package, parts[0]])
        lines = [line + "\n" for line in text.split("\n")]  # str.splitlines would also split at form feeds
        for qualified, node in _definitions(tree, ""):
            summary = self._summary(ast.get_docstring(node) or "")
            if not summary or not _has_code(node):
                continue
            source = _without_docstring(node, lines)
            if len(source) <= self.max_source_chars:
                yield Function(f"{name}.{qualified}", module, summary, source)

    def _summary(self, docstring: str) -> str:
        """The docstring's first paragraph (its first sentence, if that is too long) on one line; "" when it says nothing."""
        for paragraph in re.split(r"\n\s*\n", docstring.strip()):
            lines = paragraph.splitlines()
            end = next((number for number, line in enumerate(lines) if FIELD_LINE.match(line)), len(lines))
            text = SIGNATURE.sub("", " ".join(" ".join(lines[:end]).replace("`", "").split()))
            if not text:
                continue
            if len(text) > self.max_summary_chars:
                text = SENTENCE.split(text)[0]
            words = re.findall(r"[^\W\d_]{2,}", text)
            return text if len(words) >= self.min_words and len(text) <= self.max_summary_chars else ""
        return ""


@dataclass(frozen=True)
class Function:
    """One function: `module` is the top-level one."""

    id: str
    module: str
    summary: str
    source: str


FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def _python_files(root: Path) -> list[Path]:
    found = []
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in SKIPPED_FOLDERS and not name.startswith("."))
        found += [Path(folder, name) for name in sorted(files) if name.endswith(".py")]
    return found


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, FunctionNode]]:
    """Functions and methods in order, those inside other functions left out (they are part of these)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FunctionNode):
            yield prefix + child.name, child
        else:
            yield from _definitions(child, f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix)


def _has_code(node: FunctionNode) -> bool:
    """Whether anything but placeholders follows the docstring."""

    def placeholder(statement: ast.stmt) -> bool:
        if isinstance(statement, ast.Pass) or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
            return True
        if not isinstance(statement, ast.Raise):
            return False
        raised = statement.exc.func if isinstance(statement.exc, ast.Call) else statement.exc
        return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"

    return not all(placeholder(statement) for statement in node.body)


def _without_docstring(node: FunctionNode, lines: list[str]) -> str:
    """Source of the function from its first decorator on, dedented, comments kept, its own docstring cut out."""
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    docstring = node.body[0]
    assert docstring.end_lineno is not None
    assert docstring.end_col_offset is not None
    assert node.end_lineno is not None
    before = lines[docstring.lineno - 1].encode()[: docstring.col_offset].decode()
    after = lines[docstring.end_lineno - 1].encode()[docstring.end_col_offset :].decode().lstrip(" \t;")
    tail = lines[docstring.end_lineno : node.end_lineno]
    if before.strip() or (after.strip() and not after.startswith("#")):
        middle = [before + after]
    else:
        middle = []
        while tail and not tail[0].strip():
            tail = tail[1:]
    body = [*lines[start - 1 : docstring.lineno - 1], *middle, *tail]
    margin = body[0][: len(body[0]) - len(body[0].lstrip())]
    return "".join(line.removeprefix(margin) for line in body).rstrip()


def _with_unique_ids(functions: list[Function]) -> list[Function]:
    """A name that is defined again (getter and setter, one definition per platform) gets `#2`, `#3`, ..."""
    seen: Counter[str] = Counter()
    unique = []
    for function in functions:
        seen[function.id] += 1
        number = seen[function.id]
        unique.append(function if number == 1 else replace(function, id=f"{function.id}#{number}"))
    return unique


def _groups(functions: list[Function]) -> list[list[Function]]:
    """Functions connected by an equal summary or an equal source, in order of first appearance."""
    leader = list(range(len(functions)))

    def find(member: int) -> int:
        while leader[member] != member:
            leader[member] = leader[leader[member]]
            member = leader[member]
        return member

    first: dict[tuple[str, str], int] = {}
    for member, function in enumerate(functions):
        for key in (("summary", normalise(function.summary)), ("source", " ".join(function.source.split()))):
            other, own = find(first.setdefault(key, member)), find(member)
            leader[max(other, own)] = min(other, own)
    groups: dict[int, list[Function]] = defaultdict(list)
    for member, function in enumerate(functions):
        groups[find(member)].append(function)
    return list(groups.values())
