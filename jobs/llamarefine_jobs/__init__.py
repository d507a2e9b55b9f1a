"""Code that runs inside the containers: one module per stage, and the packages that stages share."""

import sys

# Handle SIGTERM during the slow imports of `python -m llamarefine_jobs.<stage>`. Python runs this file before it looks
# for that module, and sys.argv[0] is "-m" only then. The package's root imports nothing else from its own packages, and
# this only under `-m`: any other program that imports the package (launcher, tests) keeps its own signal handlers.
if sys.argv[:1] == ["-m"]:
    from llamarefine_jobs.process import sigterm

    sigterm.install_handler()
