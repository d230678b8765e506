"""Pairs, triplets and lists of positives and negatives in Parquet, in the columns that the `jsonl` source has as keys.

    query, positive                     a pair
    anchor, positive, negative          a triplet; also negative_1, negative_2, ...
    query, pos (list), neg (list)       lists; also instruction (or prompt), split and group
    id, text, title, parent, section    documents, in a table of the corpus: all but the text are optional

A bad record is named `file:row`, the first row being 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ullme.records import Problems, Records, Source, digest_files
from ullme.sources._pairs import Pairs
from ullme.sources._rows import CORPUS, PAIRS, Columns, Paths, files_of, rows


class Parquet(Source):
    """Tables of queries with their right (and wrong) passages; rows mean what lines mean in the `jsonl` source.

    Tables are read in batches of rows, and of their columns only those that are used.

    path: a file, several, or a folder, of which every *.parquet is read; may be left out where there is a corpus.
    corpus: the same, for tables of more documents to search. Ids may be texts or whole numbers.
    columns: what the tables call what is expected here, such as `{query: question, text: body}`.
    searchable: `all` passages, or only those of the `corpus` tables; answers of test queries always are.
    """

    path: Paths | None = None
    corpus: Paths | None = None
    columns: Columns = Field(default_factory=dict)
    searchable: Literal["all", "corpus"] = "all"

    @model_validator(mode="after")
    def _something_is_named(self) -> Parquet:
        if self.path is None and self.corpus is None:
            raise ValueError("expected `path`, `corpus` or both, got neither")
        return self

    def fingerprint(self) -> str:
        """Digest of the contents of every file."""
        corpus = ((f"corpus-{number:06d}", path) for number, path in enumerate(_files(self.corpus)))
        return digest_files([*corpus, *((f"{number:06d}", path) for number, path in enumerate(_files(self.path)))])

    def read(self, problems: Problems) -> Records:
        """Every usable query and passage."""
        pairs = Pairs(searchable=self.searchable == "all")
        for path in _files(self.corpus):
            pairs.read_corpus(rows(path, CORPUS, self.columns, problems))
        for path in _files(self.path):
            pairs.read(rows(path, PAIRS, self.columns, problems))
        return Records(list(pairs.documents.values()), list(pairs.queries()), {"pairs": pairs.lines})


def _files(paths: tuple[Path, ...] | None) -> list[Path]:
    return files_of(paths or (), ".parquet", "Parquet")
