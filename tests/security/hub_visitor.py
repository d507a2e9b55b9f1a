"""Read several Hub repositories with prepare's own code, in one process.

    python hub_visitor.py FOLDER model:owner/name dataset:owner/name …

Prints one JSON line per repository: its name, the exit code, the error's text.
"""

import json
import sys
import traceback
from pathlib import Path

from llamarefine_jobs.contract.errors import LlamaRefineError
from llamarefine_jobs.contract.recipe import Base, Rows
from llamarefine_jobs.data.reading import read_table
from llamarefine_jobs.models.base import fetch_base, install_base


def visit(kind: str, name: str, work: Path) -> dict[str, object]:
    try:
        if kind == "model":
            folder, _ = fetch_base(Base(source=name), work)
            install_base(folder, work / "base")
        else:
            read_table(Rows(source=f"hf://datasets/{name}"), "prepare.questions", work, ("question", "answer"))
    except LlamaRefineError as error:
        return {"exit_code": error.exit_code, "error": str(error)}
    except BaseException:
        return {"exit_code": 1, "error": traceback.format_exc()}
    return {"exit_code": 0, "error": ""}


if __name__ == "__main__":
    for number, each in enumerate(sys.argv[2:]):
        kind, _, name = each.partition(":")
        work = Path(sys.argv[1], str(number))
        work.mkdir(parents=True)
        print(json.dumps({"repository": each} | visit(kind, name, work)), flush=True)
