"""Publishing a model folder: what of it others get, onto a hub in one commit, or into a folder to hand on.

    contents        model folder -> name in the repository -> file, or changed text; no paths of this machine
    publish         these files as one commit of a repository that huggingface_hub can reach
    write_folder    the same files into an empty folder
    model_fingerprint   model folder -> digest of what its vectors depend on

One commit, so whoever downloads meanwhile gets the former model or the new one. Weights and settings that the new model does not
have are deleted with it; other files of the repository (a licence, pictures) stay.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ullme.card import without_places
from ullme.errors import ArtifactError, ConfigError, HubError
from ullme.records import digest_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = [
    "Files",
    "Published",
    "Repository",
    "contents",
    "model_fingerprint",
    "needs_trust",
    "publish",
    "require_new",
    "write_folder",
]

Files = Mapping[str, "Path | bytes"]
"""Name in the repository -> where the file lies, or what is in it."""
NOT_PUBLISHED = ("manifest.json", "logs/*", "*README.md")
"""What the store keeps beside a model: where it was made, and how it went; cards that peft writes, with paths in them."""
ORIGINS = ("base", "base_model_name_or_path", "_name_or_path", "name_or_path")
"""Fields of settings that may hold the path that weights were loaded from."""
OURS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.json", "*.jinja", "*.model", "*.py")
"""What a model is made of: where the new one lacks it, it belonged to the former one."""
WEIGHTS = ("*.safetensors", "[0-9]*_*/*.safetensors", "adapters/*/*.safetensors")
"""Of the LLM, of trained modules behind it, and of adapters that are kept apart."""
TELLING = (*WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json", "ullme.json")
"""What the vectors of a model depend on."""
PLAIN = "sentence_transformers."
PATIENCE_S = 20.0
"""How long a hub may take to answer that it is there."""


@dataclass(frozen=True)
class Repository:
    """Where to publish. endpoint: URL of the hub; empty: the one that huggingface_hub is set up for."""

    name: str
    endpoint: str = ""
    branch: str = "main"
    private: bool = False

    def __post_init__(self) -> None:
        """Raises: ConfigError: the name or the endpoint is malformed."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.name)
            sound = self.name.count("/") == 1
        except HFValidationError:
            sound = False
        if not sound:
            raise ConfigError(
                f"expected OWNER/NAME, a repository of the hub (letters, digits, '-', '_', '.'), or a folder such as ./model, "
                f"got '{self.name}'"
            )
        if self.endpoint and not re.match(r"https?://[^/\s]+", self.endpoint):
            raise ConfigError(f"endpoint: expected the URL of a hub, such as https://huggingface.co, got '{self.endpoint}'")


@dataclass(frozen=True)
class Published:
    """url: the page of the repository, or of its branch. commit: what it holds now."""

    url: str
    commit: str


def contents(folder: Path) -> dict[str, Path | bytes]:
    """What of a model folder is published, by name.

    Raises:
        ArtifactError: there are no weights in it.
    """
    found: dict[str, Path | bytes] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if not any(fnmatch(name, pattern) for pattern in NOT_PUBLISHED):
            found[name] = _told(file)
    if not any(name.endswith(".safetensors") for name in found):
        raise ArtifactError(f"{folder}: no *.safetensors in it; expected a model folder with its weights")
    return found


def model_fingerprint(folder: Path) -> str:
    """sha256 of the files of a model folder that its vectors depend on: weights, settings and tokenizer.

    Raises:
        ArtifactError: no such folder, or one without weights.
    """
    files = sorted({file for pattern in TELLING for file in folder.glob(pattern)})
    if not any(file.suffix == ".safetensors" for file in files):
        raise ArtifactError(f"{folder}: expected a model folder with *.safetensors; name the folder that training or a save wrote")
    return digest_files((file.relative_to(folder).as_posix(), file) for file in files)


def needs_trust(folder: Path) -> bool:
    """Whether sentence-transformers has to run code of the folder, because a module is none of its own."""
    file = folder / "modules.json"
    modules = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return any(not module["type"].startswith(PLAIN) for module in modules)


def publish(files: Files, to: Repository, *, message: str) -> Published:
    """Make the repository and the branch where they are missing, and commit the files. The token is that of `hf auth login`.

    Raises:
        HubError: nobody answers, the token is missing or may not write there, or the hub refuses the files.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(endpoint=to.endpoint or None, library_name="ullme")
    try:
        _prepare(api, to)
        if to.branch != "main":
            api.create_branch(to.name, branch=to.branch, exist_ok=True)
        there = api.list_repo_files(to.name, revision=to.branch)
        former = [name for name in there if name not in files and any(fnmatch(name, pattern) for pattern in OURS)]
        done = api.create_commit(
            to.name,
            [
                *(CommitOperationDelete(path_in_repo=name) for name in former),
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()),
            ],
            commit_message=message,
            revision=to.branch,
        )
    except HubError:
        raise
    except Exception as error:  # also those of the HTTP library that the hub's client happens to use
        raise _refused(error, api.endpoint, to) from error
    return Published(f"{api.endpoint}/{to.name}" + ("" if to.branch == "main" else f"/tree/{to.branch}"), done.oid)


def write_folder(files: Files, folder: Path) -> None:
    """Write the files into a folder that is new or empty.

    Raises:
        ConfigError: there is something in it.
    """
    require_new(folder)
    for name, file in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(file, bytes):
            target.write_bytes(file)
        else:
            shutil.copyfile(file, target)


def require_new(folder: Path) -> None:
    """Raises: ConfigError: there is something in the folder, or it is a file."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: expected a new or empty folder to write the model into; name another, or empty this one")


def _told(file: Path) -> Path | bytes:
    """The file, or its text without the paths that it was loaded from."""
    if file.suffix != ".json" or file.name == "tokenizer.json":
        return file
    try:
        settings: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return file
    if not isinstance(settings, dict):
        return file
    cleaned = {name: without_places(value) if name in ORIGINS else value for name, value in settings.items()}
    return file if cleaned == settings else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def _prepare(api: HfApi, to: Repository) -> None:
    """Make the repository where it is missing. One that is public already does not become private by asking for it."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.model_info(to.name, timeout=PATIENCE_S)  # the other calls would wait for ever where nobody is there
    except RepositoryNotFoundError:
        api.create_repo(to.name, private=to.private or None, exist_ok=True)
        return
    if to.private and found.private is False:
        raise HubError(
            f"{api.endpoint}/{to.name} exists and is public, and --private was asked for; nothing was uploaded: make it private "
            "there, or choose another name"
        )


def _refused(error: BaseException, endpoint: str, to: Repository) -> HubError:
    """One line: where, what happened, what to do."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    where = f"{endpoint}/{to.name}"
    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # of one file
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return HubError(f"{where}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it")
    if "xet-write-token" in str(error) and "404" in str(error):
        return HubError(f"{where}: this hub has no xet storage, and asks for the older way; set HF_HUB_DISABLE_XET=1 and try again")
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, error.server_message or _line(error)
        if status in (401, 403):
            owner = to.name.partition("/")[0]
            reason = f"your token may not write to '{owner}'" if get_token() else "there is no token"
            return HubError(f"{where}: {status}, {reason}; `hf auth login`, or set HF_TOKEN to a token that may write there")
        return HubError(f"{where}: {status}, the hub refused ({said}); nothing was published")
    if isinstance(error, HfHubHTTPError.__bases__[0] | OSError):  # of the HTTP library that the hub's client happens to use
        return HubError(f"{where}: no connection ({_line(error)}); nothing was published, try again once the hub can be reached")
    return HubError(
        f"{where}: expected the answers of a model hub, got {type(error).__name__}: {_line(error)}; nothing was published"
    )


def _line(error: BaseException) -> str:
    """The first line that an error says, or its name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
