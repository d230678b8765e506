"""Options that several commands share, and how they speak: results to stdout, complaints to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from flows.tracking import TrackingConfig

__all__ = ["Config", "ModelName", "OptionalConfig", "Overrides", "complain", "release_place", "say"]

Config = Annotated[Path, Parameter(name=["--config", "-c"], help="The run's YAML file; configs/reference.yaml has every key.")]
OptionalConfig = Annotated[
    Path | None,
    Parameter(name=["--config", "-c"], help="YAML file of the run that released the model: its store and model name are used."),
]
Overrides = Annotated[
    list[str] | None,
    Parameter(
        name="--set",
        negative=(),
        help="Change one value of the file: a.b.0.c=value, read as YAML; may be given several times. Setting x.kind to another "
        "kind drops the fields of the former one.",
    ),
]

ModelName = Annotated[str | None, Parameter(help="Registered name, in place of the configuration's (or `ullme`).")]


def release_place(config: Path | None, overrides: Sequence[str], model_name: str | None) -> tuple[Path, TrackingConfig]:
    """The store and the registry that `--config`, `--set` and `--model-name` mean.

    Raises:
        ConfigError: the configuration is wrong, or nothing was ever recorded there.
    """
    from flows.tracking import TrackingConfig
    from ullme.errors import ConfigError

    store, tracking = Path(".store").resolve(), TrackingConfig()
    if config is not None:
        from flows.config import load

        settings = load(config, overrides)
        store, tracking = settings.store, settings.tracking
    if model_name is not None:
        tracking = tracking.model_copy(update={"model_name": model_name})
    if not tracking.uri and not (store / "mlflow.db").is_file():
        raise ConfigError(
            f"nothing was released in {store} yet; run `ullme run train-and-index --config FILE`, or name its --config"
        )
    return store, tracking


def say(line: str) -> None:
    """A line with the time, for people who watch."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def complain(text: str) -> None:
    """What is wrong."""
    print(text, file=sys.stderr, flush=True)
