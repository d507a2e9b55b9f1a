"""The command `llamarefine`, its stages played by acting.py."""

import functools
import sys
from pathlib import Path

from llamarefine_k8s import cli, local

ACTING = str(Path(__file__).parent / "acting.py")

local.LocalExecutor = functools.partial(  # type: ignore[misc]
    local.LocalExecutor, command=lambda stage: (sys.executable, ACTING, stage)
)
cli.main()
