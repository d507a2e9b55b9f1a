"""What runs inside the containers: the contract, the store, and one module per stage."""

import sys

# So it stands only while `python -m llamarefine_jobs.<stage>` looks for its module, in which the slow imports are.
if sys.argv[:1] == ["-m"]:
    from llamarefine_jobs.process import sigterm

    sigterm.install_handler()
