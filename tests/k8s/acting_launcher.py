"""The command `llamarefine`, with acting.py in place of every stage."""

import functools
import sys
from pathlib import Path

from llamarefine_k8s import cli
from llamarefine_k8s.runs import local_executor

ACTING = str(Path(__file__).parent / "acting.py")

local_executor.LocalExecutor = functools.partial(  # type: ignore[misc]
    local_executor.LocalExecutor, command=lambda stage: (sys.executable, ACTING, stage)
)
cli.main()
