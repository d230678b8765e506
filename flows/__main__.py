"""`python -m flows train-and-index ...`: the plain door to the same commands as `prefect run` and `ullme run`."""

from __future__ import annotations

import sys

from flows.cli import dispatch, run_app

if __name__ == "__main__":
    sys.exit(dispatch(run_app, sys.argv[1:]))
