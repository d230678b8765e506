"""`ullme doctor`: what is wrong, and what to do."""

from __future__ import annotations

import json
import logging
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from flows.commands.options import OptionalConfig, Overrides

if TYPE_CHECKING:
    from flows.doctor import Check

__all__ = ["doctor_command"]

LINE_CHARACTERS = 130
STATE_WIDTH, NAME_WIDTH = 9, 10


def doctor_command(
    *,
    config: OptionalConfig = None,
    set_: Overrides = None,
    fix: Annotated[bool, Parameter(negative=(), help="Mend what can be mended; says each thing that it did.")] = False,
    as_json: Annotated[bool, Parameter(name="--json", negative=(), help="Print JSON: check, state, said, fixed.")] = False,
) -> int:
    """Check this machine, the store and what Prefect and MLflow hold of it: a line each, with what to do.

    Packages that clash, the GPU, the disk against what the plan writes, every file of every artifact, half-written folders, runs
    that were killed, servers and slots that they left behind. --fix sets damaged artifacts aside and clears what is dead. Exit code
    0: well, or all mended; 1: a problem remains.
    """
    from flows.doctor import Doctor
    from flows.tracking import TrackingConfig

    _show_progress()
    store, tracking, settings = Path(".store").resolve(), TrackingConfig(), None
    if config is not None:
        from flows.config import load

        settings = load(config, set_ or ())
        store, tracking = settings.store, settings.tracking
    rows: list[dict[str, Any]] = []
    mendable = 0
    for check in Doctor(store, tracking, settings).checks():
        mended = _mended(check) if fix else ""
        rows.append({"check": check.name, "state": check.state, "said": check.said, "fixed": mended})
        mendable += check.mend is not None
        if not as_json:
            _print(check.state, check.name, check.said)
            if mended:
                _print("fixed", check.name, mended)
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    open_ = [row for row in rows if row["state"] == "problem" and not row["fixed"]]
    if not as_json:
        print(_summary(rows, len(open_)) + (f"; --fix mends {mendable}" if mendable and not fix else ""))
    return 1 if open_ else 0


def _mended(check: Check) -> str:
    """What was done about it; empty where nothing was, or could be."""
    from ullme.errors import UllmeError

    if check.mend is None:
        return ""
    try:
        return check.mend()
    except (UllmeError, OSError) as error:
        logging.getLogger(__name__).warning("%s: cannot be mended: %s", check.name, error)
        return ""


def _summary(rows: list[dict[str, Any]], problems: int) -> str:
    warnings = sum(row["state"] == "warning" for row in rows)
    fixed = sum(bool(row["fixed"]) for row in rows)
    counts = [(problems, "problem"), (warnings, "warning")]
    said = [f"{count} {what}{'s' * (count > 1)}" for count, what in counts if count] + ([f"{fixed} fixed"] if fixed else [])
    return ", ".join(said) or "all is well"


def _print(state: str, name: str, said: str) -> None:
    start = f"{state:<{STATE_WIDTH}}{name:<{NAME_WIDTH}}"
    print(
        textwrap.fill(said, LINE_CHARACTERS, initial_indent=start, subsequent_indent=" " * len(start), break_long_words=False),
        flush=True,
    )


def _show_progress() -> None:
    """A large store takes minutes to read: say how far it is, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("ullme.progress")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
