"""`ullme rollback`: another version becomes the champion, model and index together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from flows.commands.options import ModelName, OptionalConfig, Overrides, release_place
from ullme.errors import ArtifactError, ContractError

if TYPE_CHECKING:
    from flows.registry import Registry, Version

__all__ = ["rollback_command"]


def rollback_command(
    *,
    to: Annotated[int | None, Parameter(help="Number of the version; without it, the last one that was champion before.")] = None,
    why: Annotated[str, Parameter(help="The reason, for the history.")] = "",
    config: OptionalConfig = None,
    set_: Overrides = None,
    model_name: ModelName = None,
) -> int:
    """Make an earlier version the champion again, or one of your choice; its model, index and data are verified first.

    The version that is left is marked as withdrawn, so that the next night does not make it the champion again by itself.
    Going back to a withdrawn version takes its mark away.
    """
    from flows.registry import Registry

    store, tracking = release_place(config, set_ or (), model_name)
    registry = Registry.at(tracking, store)
    unfinished = registry.settle()
    champion, versions = registry.champion(), registry.versions()
    if champion is not None and to in (None, champion.number) and "left" in (unfinished or {}):
        print(f"{_named(champion)} is the champion: a rollback that was interrupted is finished now")
        return 0
    target = _chosen(versions, to) if to is not None else _before(versions, champion)
    if champion is not None and target.number == champion.number:
        if champion.withdrawn:
            registry.reinstate(champion)
        print(f"{_named(champion)} is the champion already")
        return 0
    _verify(target)
    print(_move(registry, champion, target, " ".join(why.split())))
    return 0


def _move(registry: Registry, champion: Version | None, target: Version, why: str) -> str:
    """Tags first, the alias last: killed at any moment, the same command finds the same target again. Returns what was done."""
    back = champion is not None and bool(target.crowned) and target.number < champion.number
    reason = f": {why}" if why else ""
    if champion is not None and back:
        registry.withdraw(champion, why=why or "rolled back")
    if target.withdrawn:
        registry.reinstate(target)
    if champion is not None and back:
        registry.crown(target, why=f"rolled back from version {champion.number}{reason}", left=champion)
        return (
            f"rolled back: {_named(target)} is the champion, version {champion.number} is withdrawn; "
            f"`ullme rollback --to {champion.number}` undoes it"
        )
    registry.crown(target, why=f"by hand{reason}")
    after = f" in place of version {champion.number}" if champion is not None else ""
    kind = "was champion before, but is the newer one" if target.crowned and champion is not None else "was never champion before"
    return f"crowned by hand: {_named(target)} is the champion{after}; it {kind}, so this is no rollback and nothing is withdrawn"


def _chosen(versions: Sequence[Version], number: int) -> Version:
    found = next((version for version in versions if version.number == number), None)
    if found is None:
        there = ", ".join(str(version.number) for version in versions) or "none"
        raise ArtifactError(f"--to {number}: no such version; there are: {there}")
    return found


def _before(versions: Sequence[Version], champion: Version | None) -> Version:
    """The version that was champion last, of those that neither are it now nor were withdrawn.

    Raises:
        ArtifactError: there is none.
    """
    if champion is None:
        raise ArtifactError(
            "nothing to roll back: no version is the champion; `ullme rollback --to VERSION` makes one the champion"
        )
    former = [version for version in versions if version.crowned and not version.withdrawn and version.number != champion.number]
    if not former:
        raise ArtifactError(
            f"nothing to roll back to: no other version than {champion.number} was champion and is not withdrawn; "
            "`ullme history` lists them, `--to VERSION` takes any"
        )
    return max(former, key=lambda version: (version.crowned[-1]["at"], version.number))


def _verify(version: Version) -> None:
    from flows.registry import verify

    try:
        verify(version.release)
    except (ArtifactError, ContractError) as error:
        raise ArtifactError(
            f"{_named(version)} cannot be opened, so nothing was changed: {error}; `ullme history` lists the others"
        ) from error


def _named(version: Version) -> str:
    return f"{version.name} version {version.number}"
