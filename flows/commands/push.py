"""`ullme push`: a released model, with its card, to a model hub or into a folder to hand on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from flows.commands.options import OptionalConfig, Overrides, release_place, say
from ullme.components import did_you_mean
from ullme.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from flows.registry import Registry, Version
    from flows.retriever import Release
    from ullme.artifacts import ArtifactRef
    from ullme.card import Card
    from ullme.publishing import Files

__all__ = ["PUSH_EXAMPLES", "push_command"]

PUSH_EXAMPLES = """Examples:

  ullme push --to me/my-search --config mine.yaml --dry-run
  ullme push my-search@challenger --to me/my-search --revision next --private
  ullme push my-search/3 --to ./my-search-3
"""

WANTED = re.compile(r"(?P<name>[^/:]*?)(?:@(?P<alias>[\w.-]+)|/(?P<number>\d+))?")
SECTIONS = {
    "data": "data",
    "backbone": "backbone",
    "mine": "mining",
    "train": "training",
    "encode": "encoding",
    "index": "index",
    "evaluate": "evaluation",
}
"""Stage -> its section of a run's configuration, in that order."""
COLUMNS = ("base", "tuned", "bm25")
PACKAGES = ("ullme", "torch", "transformers", "sentence-transformers")


def push_command(
    version: Annotated[
        str,
        Parameter(help="What: NAME (its champion), NAME@challenger or NAME/3; without a name, that of --config: @champion, /3."),
    ] = "@champion",
    /,
    *,
    to: Annotated[str, Parameter(help="Where: OWNER/NAME of a repository, made if missing; or a new folder: ./NAME, /PATH/NAME.")],
    endpoint: Annotated[str, Parameter(help="URL of the hub, in place of huggingface.co or HF_ENDPOINT.")] = "",
    private: Annotated[bool, Parameter(negative=(), help="Make the repository private; refuses one that is public.")] = False,
    branch: Annotated[str, Parameter(name=["--revision", "--branch"], help="Branch of the repository, made if missing.")] = "main",
    dry_run: Annotated[bool, Parameter(negative=(), help="Print the card and the files, and send nothing.")] = False,
    config: OptionalConfig = None,
    set_: Overrides = None,
) -> int:
    """Publish a released model: its folder, which SentenceTransformer and ullme load, and a card with scores and origin.

    One commit replaces the model that was there. The token is that of `hf auth login`, or HF_TOKEN. The index and the documents
    stay here. A hub without xet storage needs HF_HUB_DISABLE_XET=1.
    """
    from flows.registry import Registry
    from ullme.artifacts import Store
    from ullme.card import model_card
    from ullme.publishing import Repository, contents, publish, write_folder

    folder = Path(to).expanduser() if to.startswith(("/", "./", "../", "~")) else None
    repository = Repository(to, endpoint, branch, private) if folder is None else None
    name, wanted = _wanted(version)
    store, tracking = release_place(config, set_ or (), name or None)
    registry = Registry.at(tracking, store)
    chosen = _chosen(registry, wanted)
    model = chosen.release.model
    Store(model.path.parent.parent).open(model, "model")  # a damaged one is not published
    files = contents(model.path)
    label = f"{chosen.name} version {chosen.number}"
    card = model_card(_card(chosen, registry.run_name(chosen)), to if folder is None else folder.name, branch=branch)
    files["README.md"] = card.encode()
    if dry_run:
        print(card)
        _show(files, f"{label} would go to {to}")
    elif repository is None or folder is not None:
        write_folder(files, Path(to).expanduser())
        print(f"written: {label} to {folder}, {_size(files)}; SentenceTransformer('{folder}') and Encoder.load('{folder}') open it")
    else:
        say(f"uploading {label} to {to}, {_size(files)}")
        done = publish(files, repository, message=f"{label}, model {model.digest[:12]}")
        print(f"pushed: {label} to {done.url}, {_size(files)}, commit {done.commit[:12]}")
    return 0


# Which version


def _wanted(text: str) -> tuple[str, str | int]:
    """(registered name or empty, alias or number)."""
    found = WANTED.fullmatch(text)
    if found is None:
        raise ConfigError(f"expected NAME, NAME@champion, NAME@challenger or NAME/NUMBER, as in my-search/3; got '{text}'")
    number = found["number"]
    return found["name"], int(number) if number else found["alias"] or "champion"


def _chosen(registry: Registry, wanted: str | int) -> Version:
    """The version under a number or an alias.

    Raises:
        ArtifactError: there is none; says what there is.
    """
    versions = registry.versions()
    if not versions:
        names = registry.names()
        there = f"there are: {', '.join(names)}" if names else "run train-and-index first"
        raise ArtifactError(f"no version of '{registry.name}' is registered; {there}{did_you_mean(registry.name, names)}")
    by_number = isinstance(wanted, int)
    found = next((one for one in versions if one.number == wanted), None) if by_number else registry.holder(str(wanted))
    if found is None:
        missing = f"no version {wanted} of '{registry.name}'" if by_number else f"no version of '{registry.name}' is its {wanted}"
        there = ", ".join(f"/{one.number}" + "".join(f" @{alias}" for alias in one.aliases) for one in versions)
        raise ArtifactError(f"{missing}; there are: {there}")
    return found


# What is said of it


def _card(version: Version, run: str) -> Card:
    """What the store and the registry know of a version."""
    from ullme.card import Card
    from ullme.publishing import needs_trust

    release = version.release
    sections, digests = _lineage(release)
    folder = release.model.path
    settings = json.loads((folder / "ullme.json").read_text(encoding="utf-8"))
    reports = _reports(release)
    measured = next(iter(reports.values()), {})
    backbone = sections.get("backbone", {})
    spec = backbone.get("model", "")
    on_hub = bool(spec) and backbone.get("source_digest") == f"{spec}@{backbone.get('revision')}"
    reign = version.crowned[-1] if version.crowned else None
    facts = {
        "registered": version.made,
        "champion": f"since {reign['at']}: {reign['why']}" if reign and "champion" in version.aliases else "",
        "run": run,
        **{f"published with {package}": version_of(package) for package in PACKAGES},
    }
    return Card(
        version=f"{version.name} version {version.number}",
        base=spec or settings.get("base", ""),
        hub=spec if on_hub else "",
        settings=settings,
        dim=_manifest(release.model)["meta"]["dim"],
        configuration=sections,
        digests=digests,
        **_columns(reports, sections.get("evaluation", {}).get("metrics", [])),
        queries=measured.get("queries", {}),
        documents=measured.get("documents", {}),
        facts={name: fact for name, fact in facts.items() if fact},
        trust=needs_trust(folder),
    )


def _lineage(release: Release) -> tuple[dict[str, Any], dict[str, str]]:
    """The sections of the stages that made a release, and its artifacts by digest. What is no longer kept is left out."""
    from ullme.artifacts import ArtifactRef

    reports = {f"scores of {name}": release.reports[name] for name in COLUMNS if name in release.reports}
    waiting = list({"this model": release.model, "data": release.data, "its index": release.index, **reports}.items())
    digests: dict[str, str] = {}
    made: dict[str, list[Any]] = {stage: [] for stage in SECTIONS}
    while waiting:
        role, ref = waiting.pop(0)
        if ref.digest in digests.values():
            continue
        digests[str(ref) if role == ref.kind else f"{ref} ({role})"] = ref.digest
        provenance = _manifest(ref).get("provenance", {})
        section = {name: value for name, value in provenance.get("section", {}).items() if name != "runtime"}
        if section and section not in made.setdefault(provenance["stage"], []):
            made[provenance["stage"]].append(section)
        inputs = {name: ArtifactRef.model_validate(given) for name, given in provenance.get("inputs", {}).items()}
        waiting += [("before this training" if name == "model" else name, given) for name, given in inputs.items()]
    return {
        SECTIONS[stage] + (f" ({number + 1})" if number else ""): section  # trained more than once: the last training first
        for stage in SECTIONS
        for number, section in enumerate(made[stage])
    }, digests


def _manifest(ref: ArtifactRef) -> Mapping[str, Any]:
    from ullme.artifacts import Store

    try:
        return Store(ref.path.parent.parent).manifest(ref)
    except ArtifactError:
        return {}


def _reports(release: Release) -> dict[str, Mapping[str, Any]]:
    """System -> its report, as far as kept."""
    files = {name: release.reports[name].path / "report.json" for name in COLUMNS if name in release.reports}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


def _columns(reports: Mapping[str, Mapping[str, Any]], order: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Scores and intervals by column of the table, the metrics in this order."""
    columns: dict[str, dict[str, Any]] = {"scores": {}, "intervals": {}}
    for name, report in reports.items():
        for title, prefix in ((name, ""), (f"{name} (index)", "index_")):
            if report.get(f"{prefix}scores"):
                columns["scores"][title] = {
                    task: {metric: found[metric] for metric in [*order, *found] if metric in found}
                    for task, found in report[f"{prefix}scores"].items()
                }
                columns["intervals"][title] = report[f"{prefix}intervals"] or {}
    return columns


# What is sent


def _show(files: Files, title: str) -> None:
    print(f"{title}, {_size(files)}:")
    for name, file in sorted(files.items()):
        print(f"{_bytes(file):>14,}  {name}")


def _size(files: Files) -> str:
    return f"{len(files)} files, {sum(map(_bytes, files.values())) / 1e6:.1f} MB"


def _bytes(file: Path | bytes) -> int:
    return len(file) if isinstance(file, bytes) else file.stat().st_size
