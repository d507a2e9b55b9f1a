"""Standard output and error that may lose their reader: a closed pipe ends what a process says, not its work."""

import errno
import io
import os
import sys
from typing import TextIO


class _Output(io.FileIO):
    """An open file descriptor that drops what is written after its pipe or terminal was closed at the other end."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.has_reader = True
        self._was_terminal = self.isatty()

    def write(self, data: object) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            is_hangup = error.errno == errno.EIO and self._was_terminal
            if error.errno != errno.EPIPE and not is_hangup:
                raise
        self.has_reader = False
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())  # for processes that inherit the descriptor, too
        os.close(null)
        return super().write(data)  # type: ignore[arg-type]


def outlive_readers() -> None:
    """Let this process go on when the reader of its standard output or error is gone: `llamarefine run … | head`.

    Does nothing to a stream that a test or a library has replaced.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:
            stream.flush()
            output = _Output(stream.fileno())
            is_buffered = isinstance(stream.buffer, io.BufferedWriter)  # not with PYTHONUNBUFFERED
            replacement = io.TextIOWrapper(
                io.BufferedWriter(output) if is_buffered else output,
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, replacement)


def has_reader(stream: TextIO) -> bool:
    """Return whether what was written and flushed to `stream` so far could be read."""
    buffer = getattr(stream, "buffer", None)
    return bool(getattr(getattr(buffer, "raw", buffer), "has_reader", True))
