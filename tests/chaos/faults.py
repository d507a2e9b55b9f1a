"""The faults of the local suite, and the exit codes and errors that are right after each."""

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
# The exit codes of a run in which the fault happened; 0: it had ended already, or the fault did not affect it.
_EXPECTED_EXIT_CODES = {
    "SIGKILL": (0, -signal.SIGKILL),
    "SIGTERM": (0, -signal.SIGTERM, PreemptedError.exit_code),  # -SIGTERM: before the handler is installed
    "disk full": (0, DiskFullError.exit_code),
    "flipped byte": (0, IntegrityError.exit_code, DataError.exit_code),
    "vanished file": (0, IntegrityError.exit_code, DataError.exit_code),
}


@dataclass
class Fault:
    """One fault of a trial. `draw` chooses what it hits; `hit` names that afterwards: the process, or a stored file."""

    kind: str
    draw: random.Random
    workspace: Path
    hit: str | None = None
    is_removed: bool = False  # whether the damaged folder was removed, as the error advises

    def apply(self, pid: int) -> None:
        """Disturb the process `pid`, or the store. With pid 0 the process has ended, and only the store can be hit."""
        if self.kind in DAMAGES:
            self._damage_store()
            return
        with contextlib.suppress(ProcessLookupError):
            if pid and self.kind == "disk full":
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, 0))  # no file of the process can grow
            elif pid:
                os.kill(pid, signal.Signals[self.kind])
            self.hit = "the process" if pid else None

    def _damage_store(self) -> None:
        """Flip one bit of a file in the store, or remove one file."""
        found = [
            Path(folder, name)
            for folder, _, names in os.walk(self.workspace / "store")
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
        except FileNotFoundError:  # the run deleted the file at the same time
            return
        self.hit = file.relative_to(self.workspace / "store").as_posix()

    def explains(self, exit_code: int | None, error: str) -> bool:
        """Whether this exit code and this last line are right after the fault; an error must name the damaged file."""
        if exit_code not in _EXPECTED_EXIT_CODES[self.kind]:
            return False
        if exit_code == IntegrityError.exit_code:
            return self.is_named_in(error)
        if exit_code == DataError.exit_code:  # no such artifact: it was removed, or its manifest vanished
            return self.is_removed or (self.kind == "vanished file" and str(self.hit).endswith("/manifest.json"))
        return True

    def is_named_in(self, error: str) -> bool:
        """Whether an error names the file that was damaged."""
        return bool(self.hit and self.hit in error)


def folder_to_remove(error: str) -> Path | None:
    """Return the folder that an error says to remove, if it names one."""
    found = re.search(r"to recreate it, remove (\S+) and run again", error)
    return Path(found[1]) if found else None


def _size_bytes(file: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return file.stat().st_size
    return 0
