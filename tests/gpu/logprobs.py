"""What one backend makes of a model, as JSON: two backends cannot share a process, since Unsloth patches the other.

LLAMAREFINE_BACKEND=transformers python -m tests.gpu.logprobs PREPARED ADAPTER
"""

import json
import sys
from pathlib import Path


def main(prepared: Path, adapter: Path) -> None:
    """Print the backend's name and nats per token of the test answers, by base and base + adapter."""
    from llamarefine_jobs import model as models

    backend = models.choose_backend()
    from llamarefine_jobs.encoding import encode_questions, load_tokenizer, read_rows
    from llamarefine_jobs.scoring import score

    tokenizer = load_tokenizer(prepared / "base")
    rows = encode_questions(tokenizer, read_rows(prepared / "questions", "test"))
    found = {}
    model = backend.load(prepared / "base")
    for name in ("base", "sft"):
        if name == "sft":
            model = models.attach_adapter(model, adapter)
        scores = score(model, tokenizer.pad_token_id, rows, 4)
        found[name] = [one.logprob / one.tokens for one in scores]
    print(json.dumps({"backend": backend.name, "nats_per_token": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
