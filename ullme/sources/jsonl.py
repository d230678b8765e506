"""Pairs, triplets and lists of positives and negatives in JSON Lines, as FlagEmbedding and sentence-transformers write them.

    {"query": "...", "positive": "..."}                                      a pair
    {"anchor": "...", "positive": "...", "negative": "..."}                  a triplet; also negative_1, negative_2, ...
    {"query": "...", "pos": ["...", ...], "neg": ["...", ...], "prompt": "..."}   lists

Optional in each: `instruction` (or `prompt`), `split` (train, dev or test), `group` (queries of one group stay on one side
of the split). `pos_scores` and `neg_scores` are checked and not used. Other keys are ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from ullme.records import Problems, Records, Source, digest_files, objects
from ullme.sources._pairs import Pairs
from ullme.sources._rows import Paths, existing, files_of

JSONL = "JSON Lines"


class Jsonl(Source):
    """Files of queries with their right (and wrong) passages.

    Lines with the same query (and instruction) become one query with all their passages. A passage's id is a hash of its
    text, unless the corpus has the same text under an id of its own. A passage named both right and wrong for one query
    counts as right.

    path: a file, several, or a folder, of which every *.jsonl is read; may be left out where there is a corpus.
    corpus: a file of more documents to search: {"text": ..., and optionally "id" or "_id", "title", "parent", "section"}.
    searchable: `all` passages, or only those of the `corpus` file; answers of test queries always are.
    """

    path: Paths | None = None
    corpus: Path | None = None
    searchable: Literal["all", "corpus"] = "all"

    @model_validator(mode="after")
    def _something_is_named(self) -> Jsonl:
        if self.path is None and self.corpus is None:
            raise ValueError("expected `path`, `corpus` or both, got neither")
        return self

    def fingerprint(self) -> str:
        """Digest of the contents of every file."""
        corpus = [("corpus", existing(self.corpus, JSONL))] if self.corpus else []
        return digest_files([*corpus, *((f"{number:06d}", path) for number, path in enumerate(self._files()))])

    def read(self, problems: Problems) -> Records:
        """Every usable query and passage."""
        pairs = Pairs(searchable=self.searchable == "all")
        if self.corpus:
            pairs.read_corpus(objects(existing(self.corpus, JSONL), problems))
        for path in self._files():
            pairs.read(objects(path, problems))
        return Records(list(pairs.documents.values()), list(pairs.queries()), {"pairs": pairs.lines})

    def _files(self) -> list[Path]:
        return files_of(self.path or (), ".jsonl", JSONL)
