"""What can befall a run, and the errors that are right answers to it."""

import contextlib
import os
import random
import re
import resource
import signal
from dataclasses import dataclass
from pathlib import Path

from llamarefine_jobs.contract.errors import DataError, DiskFullError, IntegrityError, PreemptedError

FAULTS = ("SIGKILL", "SIGTERM", "disk full", "flipped byte", "vanished file")
DAMAGES = ("flipped byte", "vanished file")
_SUFFICES = {  # exit codes that a run may end with when this befell it; 0: it was over, or was not touched by it
    "SIGKILL": (0, -signal.SIGKILL),
    "SIGTERM": (0, -signal.SIGTERM, PreemptedError.exit_code),  # by the signal itself: before it listens
    "disk full": (0, DiskFullError.exit_code),
    "flipped byte": (0, IntegrityError.exit_code, DataError.exit_code),
    "vanished file": (0, IntegrityError.exit_code, DataError.exit_code),
}


@dataclass
class Fault:
    """One fault, drawn beforehand; `hit` says what it hit once it happened: the process, or a path in the store."""

    kind: str
    draw: random.Random
    world: Path
    hit: str | None = None
    is_removed: bool = False  # what was damaged was removed, as the error said

    def happen(self, pid: int) -> None:
        """Befall the process `pid` (0: it is over), or the store."""
        if self.kind in DAMAGES:
            self._damage()
            return
        with contextlib.suppress(ProcessLookupError):
            if pid and self.kind == "disk full":
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, 0))  # it cannot write one byte more
            elif pid:
                os.kill(pid, signal.Signals[self.kind])
            self.hit = "the process" if pid else None

    def _damage(self) -> None:
        """Flip one bit of a file in the store, or remove one."""
        found = [
            Path(folder, name)
            for folder, _, names in os.walk(self.world / "store")
            for name in names
            if not name.startswith(".writing-") and _size_bytes(Path(folder, name))
        ]
        if not found:
            return
        file = self.draw.choice(sorted(found))
        try:
            if self.kind == "vanished file":
                file.unlink()
            else:
                data = bytearray(file.read_bytes())
                data[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)
                with file.open("r+b") as into:
                    into.write(data)
        except FileNotFoundError:  # pruned this very moment
            return
        self.hit = file.relative_to(self.world / "store").as_posix()

    def explains(self, exit_code: int | None, said: str) -> bool:
        """Whether a run that this befell may end so; damage must be named."""
        if exit_code not in _SUFFICES[self.kind]:
            return False
        if exit_code == IntegrityError.exit_code:
            return self.names_damage(said)
        if exit_code == DataError.exit_code:  # no such artifact: it was removed, or its manifest vanished
            return self.is_removed or (self.kind == "vanished file" and str(self.hit).endswith("/manifest.json"))
        return True

    def names_damage(self, said: str) -> bool:
        """Whether an error names the very file that was damaged."""
        return bool(self.hit and self.hit in said)


def remedy(said: str) -> Path | None:
    """The folder that an error tells to remove."""
    found = re.search(r"to recreate it, remove (\S+) and run again", said)
    return Path(found[1]) if found else None


def _size_bytes(file: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return file.stat().st_size
    return 0
