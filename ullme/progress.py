"""Progress a person can read: a bar on a terminal, a plain line every few seconds in a log; rate and time left in both."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

__all__ = ["Progress"]

LOG_EVERY_S = 10.0


class Progress:
    """Counts up to `total` units.

    with Progress(len(texts), "encode corpus", unit="text") as progress:
        progress.advance(32, note="loss 1.2")
    """

    def __init__(self, total: int, description: str, *, unit: str = "it", initial: int = 0) -> None:
        self._total, self._description, self._unit = total, description, unit
        self._done = self._initial = initial
        self._started = self._logged = time.monotonic()
        self._bar = (
            tqdm(total=total, initial=initial, desc=description, unit=unit, dynamic_ncols=True) if sys.stderr.isatty() else None
        )

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """Count `count` more units, or none, as a sign of life; `note` is shown beside them."""
        self._done += count
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._logged >= LOG_EVERY_S or (count and self._done >= self._total):
            self._logged = time.monotonic()
            self._log(note)

    def _log(self, note: str) -> None:
        elapsed = max(time.monotonic() - self._started, 1e-9)
        rate = (self._done - self._initial) / elapsed
        left = (self._total - self._done) / rate if rate else float("inf")
        remaining = f"{left:.0f} s left" if self._done < self._total else f"in {elapsed:.1f} s"
        speed = f"{rate:.1f} {self._unit}/s" if rate >= 0.95 or not rate else f"{1 / rate:.1f} s/{self._unit}"
        logging.getLogger(__name__).info(
            "%s: %d/%d %s, %s, %s%s",
            self._description,
            self._done,
            self._total,
            self._unit,
            speed,
            remaining,
            f", {note}" if note else "",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
