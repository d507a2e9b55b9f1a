"""Code that runs inside the containers: one module per stage, and the packages that stages share."""

import sys

# Handle SIGTERM during the slow imports of `python -m llamarefine_jobs.<stage>`. Python runs this file before it looks
# for that module, and sys.argv[0] is "-m" only then. Any other program that imports the package (launcher, tests) keeps
# its own signal handlers. This file imports nothing else from the package.
if sys.argv[:1] == ["-m"]:
    from llamarefine_jobs.process import sigterm

    sigterm.install_handler()
