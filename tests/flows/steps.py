"""Steps of a small run, made by the real child process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flows.child import run_stages
from flows.config import validate
from flows.limits import LimitsConfig
from flows.pipeline import Pipeline
from ullme.artifacts import ArtifactRef


def made_by(pipeline: Pipeline, *names: str, say: Callable[[str], None] = lambda line: None, **limits: Any) -> ArtifactRef:
    """Make these steps; the last one's artifact."""
    for name in names:
        ((ref, _),) = run_stages(pipeline.store.root, [pipeline.request(name)], say, limits=LimitsConfig.model_validate(limits))
        pipeline.made[name] = ref
    return pipeline.made[names[-1]]


def pipeline_of(plain: Mapping[str, Any], store: Path, **training: Any) -> Pipeline:
    changed = {**plain, "store": str(store), "training": {**plain["training"], **training}}
    return Pipeline(validate(changed).resolved())
