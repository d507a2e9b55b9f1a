"""Make a stage wait after a line of its log until it gets SIGTERM or is killed: a tiny training ends too soon.

Python imports a module of this name at start, so with this folder on PYTHONPATH it applies to every process of a stage.
"""

import builtins
import os
import sys
import time
from typing import Any

_LIMIT_S = 120  # a test whose signal never comes fails, because the stage goes on to its end
_AFTER = os.environ["LLAMAREFINE_TEST_WAIT_AFTER"]
_print = builtins.print


def _print_and_wait(*values: Any, **options: Any) -> None:
    _print(*values, **options)
    if _AFTER in " ".join(map(str, values)):
        sigterm = sys.modules["llamarefine_jobs.process.sigterm"]
        until_s = time.monotonic() + _LIMIT_S
        while not sigterm.STOP.is_set() and time.monotonic() < until_s:
            time.sleep(0.01)


builtins.print = _print_and_wait
