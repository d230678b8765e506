"""A data set of the Hugging Face hub: Parquet or JSON Lines files of one commit, read as the `parquet` and `jsonl` sources do."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ullme.artifacts import digest_of
from ullme.errors import DataError
from ullme.records import Problems, Records, Source
from ullme.sources._pairs import Pairs
from ullme.sources._rows import CORPUS, PAIRS, Columns, rows

logger = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")
PATIENCE_S = 8.0
"""How long the hub may take to answer before it counts as not there."""


class Hub(Source):
    """Files of a hub data set, downloaded once into the hub client's own cache.

    A commit that is in the cache needs no network. A branch or a tag is asked for on every run; what it stands for then is
    what is used, and said.

    name: of the data set, such as `org/name`.
    revision: a commit (40 hexadecimal digits), or a branch or a tag.
    files: which files hold pairs, as a glob within the data set; null where there are documents alone.
    corpus_files: which hold more documents to search.
    columns: what the files call what is expected here, such as `{query: question, text: body}`.
    searchable: `all` passages, or only those of `corpus_files`; answers of test queries always are.
    """

    name: str
    revision: Annotated[str, Field(min_length=1)]
    files: str | None = "**/*.parquet"
    corpus_files: str | None = None
    columns: Columns = Field(default_factory=dict)
    searchable: Literal["all", "corpus"] = "all"

    def fingerprint(self) -> str:
        """Digest of the name and the commit: what lies under a commit does not change."""
        return digest_of([self.name, self._commit()])

    def read(self, problems: Problems) -> Records:
        """Every usable query and passage of the files that match."""
        commit = self._commit()
        folder = self._folder(commit)
        corpus = _matching(folder, self.corpus_files)
        files = [path for path in _matching(folder, self.files) if path not in set(corpus)]
        for pattern, found in ((self.corpus_files, corpus), (self.files, files)):
            if pattern and not found:
                there = ", ".join(self._listing(commit)[:10]) or "nothing"
                raise DataError(f"data.source (hub): expected files like '{pattern}' in '{self.name}', it has {there}; name others")
        pairs = Pairs(searchable=self.searchable == "all")
        for path in corpus:
            pairs.read_corpus(rows(path, CORPUS, self.columns, problems))
        for path in files:
            pairs.read(rows(path, PAIRS, self.columns, problems))
        return Records(list(pairs.documents.values()), list(pairs.queries()), {"pairs": pairs.lines})

    def _commit(self) -> str:
        """The commit that `revision` stands for.

        Raises:
            DataError: it is a name, and the hub does not answer or does not know it.
        """
        if COMMIT.fullmatch(self.revision):
            return self.revision
        commit = self._asked()
        logger.warning(
            "data.source.revision: '%s' may change; it is commit %s now: name that to pin the data", self.revision, commit
        )
        return commit

    def _asked(self) -> str:
        from huggingface_hub import HfApi

        try:
            return str(HfApi().dataset_info(self.name, revision=self.revision, timeout=PATIENCE_S).sha)
        except Exception as error:  # also those of the HTTP library that the hub's client happens to use
            raise self._away(error) from error

    def _folder(self, commit: str) -> Path:
        """Where the files lie, downloaded if the cache lacks any.

        Raises:
            DataError: the cache lacks some, and the hub does not answer or does not have them.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        wanted: dict[str, Any] = {"repo_type": "dataset", "revision": commit, "allow_patterns": self._patterns()}
        if self._listing(commit):  # without it the client cannot tell whether the cache has every file
            try:
                return Path(snapshot_download(self.name, local_files_only=True, **wanted))
            except LocalEntryNotFoundError:
                pass
        self._asked()  # answers in seconds where nobody is there; the download would try again for half a minute
        try:
            return Path(snapshot_download(self.name, **wanted))
        except Exception as error:
            raise self._away(error) from error

    def _listing(self, commit: str) -> list[str]:
        """The names of all files of the commit, where the cache knows them."""
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        try:
            return sorted(file.path for file in get_cached_repo_tree(self.name, repo_type="dataset", revision=commit))
        except CachedRepoTreeNotFoundError:
            return []

    def _patterns(self) -> list[str]:
        """The globs as the hub's client reads them, which takes `**/` for at least one folder."""
        return [form for glob in (self.files, self.corpus_files) if glob for form in (glob, glob.replace("**/", ""))]

    def _away(self, error: Exception) -> DataError:
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        return DataError(
            f"data.source (hub): expected the data set '{self.name}' at '{self.revision}' in the cache or on the hub, got "
            f"{type(error).__name__}: {reason}; run once with network access, or copy its files here and use kind: parquet"
        )


def _matching(folder: Path, pattern: str | None) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.is_file()) if pattern else []
