"""The disk that a store lies on: what it has free, what must stay free, and which errors come from a full one."""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass
from pathlib import Path

from ullme.errors import LimitExceeded

__all__ = ["Disk", "as_size"]

RESERVE_SHARE, LARGEST_RESERVE = 0.01, 10**9
FULL = {errno.ENOSPC, errno.EDQUOT}
FULL_WORDS = ("No space left on device", "Disk quota exceeded", "Not enough free space")  # of libraries that give no errno
SURELY_FULL = 2**16


@dataclass(frozen=True)
class Disk:
    """The disk of the folder `root`, which need not exist yet.

    reserve: bytes that stay free; None: a hundredth of the disk, at most 1 GB.
    """

    root: Path
    reserve: int | None = None

    @property
    def free_bytes(self) -> int:
        """Space left, measured now."""
        return shutil.disk_usage(self._there()).free

    @property
    def reserve_bytes(self) -> int:
        """Space that nothing is started into."""
        if self.reserve is not None:
            return self.reserve
        return min(LARGEST_RESERVE, int(RESERVE_SHARE * shutil.disk_usage(self._there()).total))

    def require(self, name: str, needed: int | None, work: Path) -> None:
        """Refuse to start what the disk has no room for.

        Args:
            name: what is to be started, for the message.
            needed: bytes that it writes at most, or None where that cannot be told: then the reserve must be there.
            work: folder it writes to; what an interrupted attempt left there is part of `needed`.

        Raises:
            LimitExceeded: with the numbers.
        """
        missing = max(0, (needed or 0) - sum(file.stat().st_size for file in work.rglob("*") if file.is_file()))
        free, reserve = self.free_bytes, self.reserve_bytes
        if missing + reserve > free:
            amount = "nobody can tell how much" if needed is None else f"up to {as_size(missing)}"
            raise LimitExceeded(
                f"{name} writes {amount}, but {self.root} has {as_size(free)} free, of which {as_size(reserve)} "
                "stay in reserve (limits.disk_reserve_gb); make room (`ullme gc` says what can go) or move the store to a larger "
                "disk, then run again"
            )

    def filled_by(self, error: BaseException | None) -> bool:
        """Whether an error, or what caused it, comes from a full disk."""
        while error is not None:
            number = error.errno if isinstance(error, OSError) else 0
            if number in FULL or any(words in str(error) for words in FULL_WORDS):
                return True
            if number is None and self.free_bytes < SURELY_FULL:  # what numpy raises gives no reason
                return True
            error = error.__cause__ or error.__context__
        return False

    def full(self, error: Exception, work: Path) -> LimitExceeded:
        """The one line about it. Most libraries do not say in which file; then it names what was written last to `work`."""
        files = sorted((file for file in work.rglob("*") if file.is_file()), key=lambda file: file.stat().st_mtime_ns)
        last = f" (written last: {files[-1].relative_to(work)})" if files else ""
        named = getattr(error, "filename", None) or f"{work}{last}"
        reason = next((words for words in FULL_WORDS if words in str(error)), FULL_WORDS[0])
        return LimitExceeded(
            f"{named}: {reason}; make room (`ullme gc` says what can go) and run again: it goes on from what is finished"
        )

    def _there(self) -> Path:
        return next(parent for parent in (self.root, *self.root.parents) if parent.exists())


def as_size(count: float) -> str:
    """Bytes for people: `1.3 GB`, `270 MB`, `12 kB`."""
    unit, size = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6) if count >= 1e6 else ("kB", 1e3)
    number = count / size
    return f"{number:.1f} {unit}" if number < 9.95 else f"{number:,.0f} {unit}"
