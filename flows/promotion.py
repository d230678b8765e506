"""The rule that decides which released version is in use.

Another model must be better than the champion by more than chance. The same model with other documents or another index
must not be worse: fresh documents are the point. Both are decided by paired per-query scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from flows.registry import Registry, Version
from flows.retriever import Release
from ullme.artifacts import Store
from ullme.components import Section
from ullme.errors import ArtifactError, ContractError

if TYPE_CHECKING:
    from ullme.statistics import Comparison

__all__ = ["Promotion", "PromotionConfig", "promote"]


class PromotionConfig(Section):
    """When the released champion changes.

    task: empty means the first of `evaluation.tasks`. through: compare another model by exact search, or through its index.
    alpha: largest p of the paired randomisation test for another model. margin: what the same model with other documents
    or another index may lose at most, of `metric` and of each of `must_not_drop`, on the standing queries (those that are
    in both measurements with the same judgements): the lower end of the 95% interval of the paired difference must lie
    above -margin (a test of non-inferiority). must_not_drop: further metrics that no new champion may lose more of.
    """

    metric: str = "ndcg_at_10"
    task: str = ""
    through: Literal["exact", "index"] = "exact"
    alpha: float = Field(default=0.05, gt=0, lt=1)
    margin: float = Field(default=0.02, ge=0, lt=1)
    must_not_drop: tuple[str, ...] = ()


class Promotion(BaseModel):
    """What became of a release.

    promoted: the alias `champion` was moved to it. champion: it holds the alias now. created: it is a new version, not one
    that was there with the same model, index and data.
    """

    model_config = ConfigDict(frozen=True)

    promoted: bool
    champion: bool
    created: bool
    name: str
    version: int
    why: str
    difference: float | None = None
    p: float | None = None


def promote(
    registry: Registry,
    release: Release,
    reports: Mapping[str, Path],
    *,
    rule: PromotionConfig,
    pinned: bool = True,
    run_id: str | None = None,
) -> Promotion:
    """Register a release, and make it the champion if the rule says so.

    Another model is compared with the present champion, or where there is none with its own base model, on the same
    queries and corpus; the champion's own model with the champion's own report, on the standing queries. The same model,
    index and data are never registered twice.

    Args:
        registry: where.
        release: model, index and data.
        reports: report artifacts: `tuned`, `base`, and `champion` where the champion is another model.
        rule: what decides.
        pinned: False forbids a promotion: the base model may change under its name.
        run_id: MLflow run that the version belongs to.

    Raises:
        ContractError: the reports are not of the same queries and corpus.
    """
    champion = registry.champion()
    version = registry.find(release)
    created = version is None
    if version is None:
        version = registry.register(release, run_id=run_id)
    verdict = _judge(champion, version, release, reports, rule, pinned)
    holds = verdict.promoted or (champion is not None and champion.number == version.number)
    if verdict.promoted:
        registry.crown(version, why=verdict.why)
    elif not holds and not version.withdrawn:
        registry.challenge(version)
    return Promotion(
        promoted=verdict.promoted,
        champion=holds,
        created=created,
        name=version.name,
        version=version.number,
        why=verdict.why,
        difference=verdict.found.difference if verdict.found else None,
        p=verdict.found.p if verdict.found else None,
    )


class _Verdict:
    def __init__(self, why: str, *, promoted: bool = False, found: Comparison | None = None) -> None:
        self.why, self.promoted, self.found = why, promoted, found


def _judge(
    champion: Version | None,
    version: Version,
    release: Release,
    reports: Mapping[str, Path],
    rule: PromotionConfig,
    pinned: bool,
) -> _Verdict:
    if champion is not None and champion.number == version.number:
        return _Verdict(f"version {version.number} is the champion already: same model, index and data")
    if version.withdrawn:
        return _Verdict(
            f"version {version.number} was rolled back ({version.withdrawn}) and is not made champion again by itself; "
            f"`ullme rollback --to {version.number}` does"
        )
    if champion is not None and champion.release.model.digest == release.model.digest:
        return _not_worse(champion, reports["tuned"], rule)
    if not pinned:
        return _Verdict("backbone.revision is not set, so the base model may change between runs; pin it to allow a promotion")
    if champion is None:
        return _better("its base model (there is no champion yet)", reports["tuned"], reports["base"], rule)
    if "champion" in reports:
        return _better(f"champion version {champion.number}", reports["tuned"], reports["champion"], rule)
    return _Verdict(
        f"champion version {champion.number} could not be measured, its artifacts are gone; move the alias by hand if that is right"
    )


def _better(rival: str, tuned: Path, other: Path, rule: PromotionConfig) -> _Verdict:
    """Better by more than chance, and no metric of `must_not_drop` lost."""
    from ullme.evaluation import compare

    found = compare(tuned, other, rule.metric, task=rule.task or None, through=rule.through)
    better = found.p < rule.alpha and found.difference > 0
    for metric in rule.must_not_drop if better else ():
        held = compare(tuned, other, metric, task=rule.task or None, through=rule.through)
        if held.low <= -rule.margin:
            return _Verdict(f"better than {rival} ({_numbers(rule.metric, found)}), but {_lost(metric, held, rule)}", found=found)
    verdict = "better than" if better else "worse than" if found.p < rule.alpha else "a tie (no more than chance) with"
    return _Verdict(f"{verdict} {rival}: {_numbers(rule.metric, found)}", promoted=better, found=found)


def _not_worse(champion: Version, tuned: Path, rule: PromotionConfig) -> _Verdict:
    """The same model: not worse than what it replaces on the standing queries, through the index that is searched."""
    from ullme.evaluation import compare_standing

    rival = f"champion version {champion.number}, the same model"
    found = None
    try:
        ref = champion.release.reports["tuned"]
        before = Store(ref.path.parent.parent).open(ref, "report")
        for metric in (rule.metric, *rule.must_not_drop):
            held = compare_standing(tuned, before, metric, task=rule.task or None, through="index")
            found = found or held
            if held.low <= -rule.margin:
                return _Verdict(f"may be worse than {rival}: {_lost(metric, held, rule)}", found=found)
    except (KeyError, ArtifactError, ContractError) as error:
        return _Verdict(
            f"cannot be compared with {rival} ({error}); look at it and, if it is right, "
            "`ullme rollback --to VERSION` makes any version the champion"
        )
    assert found is not None  # rule.metric was compared
    return _Verdict(
        f"not worse than {rival}, on the standing queries (margin {rule.margin:g}): {_numbers(rule.metric, found)}",
        promoted=True,
        found=found,
    )


def _numbers(metric: str, found: Comparison) -> str:
    return f"{metric} {found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}], p {found.p:.4f}, {found.queries} queries"


def _lost(metric: str, found: Comparison, rule: PromotionConfig) -> str:
    return f"{metric} may have dropped by more than {rule.margin:g}: {_numbers(metric, found)}"
