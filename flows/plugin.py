"""The Prefect plugin: adds `prefect run`. Loaded at every `import prefect` once plugins are on, so it imports next to nothing.

On in a folder whose pyproject.toml says `[tool.prefect.plugins] enabled = true`; `ullme setup` turns it on everywhere.
"""

from __future__ import annotations

from typing import Any

import pluggy

__all__ = ["register", "setup_environment"]

# Prefect's own marker (`prefect.plugins.register_hook`) under the name that it is registered by: prefect itself is
# still being imported when this module is.
_hook = pluggy.HookimplMarker("prefect-experimental")


@_hook
def setup_environment(*, ctx: Any) -> None:
    """Prefect calls this once, while it is being imported."""
    del ctx
    register()


def register() -> None:
    """Add `run` to Prefect's commands. Never raises, never replaces a command, and may be called again."""
    try:
        from prefect.cli._app import _app

        if "run" not in _app:
            _app.command("flows.cli:prefect_run", name="run", help="Run a pipeline of ullme: train-and-index, refresh, mine, ...")
    except Exception as error:
        import logging

        logging.getLogger(__name__).debug("`prefect run` is not available: %s", error)
