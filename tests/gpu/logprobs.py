"""Print the log-probabilities that one backend computes, as JSON.

Each backend needs its own process, because Unsloth patches transformers for the whole process.

    python -m tests.gpu.logprobs BACKEND PREPARED ADAPTER GRADIENT
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(name: str, prepared: Path, adapter: Path, gradient: Path) -> None:
    """Print the backend's name and the nats per token of the test answers, by the base and by base + adapter.

    Write the gradient of the answers' loss with respect to the adapter's weights to the file `gradient`, by name.
    """
    from llamarefine_jobs.models import adapters, backends

    backend = backends.choose_backend(name)
    from safetensors.torch import save_file

    from llamarefine_jobs.models.encoding import encode_questions, load_tokenizer, read_rows
    from llamarefine_jobs.models.scoring import score
    from tests.gpu import trainers

    tokenizer = load_tokenizer(prepared / "base")
    rows = encode_questions(tokenizer, read_rows(prepared / "questions", "test"))
    found = {}
    model = backend.load(prepared / "base")
    for place in ("base", "sft"):
        if place == "sft":
            model = adapters.attach_adapter(model, adapter)
        scores = score(trainers.plain_forward(backend, model, tokenizer), rows)
        found[place] = [one.logprob / one.tokens for one in scores]
    save_file(gradient_of(backend.load(prepared / "base"), backend, adapter, rows, tokenizer), gradient)
    print(json.dumps({"backend": backend.name, "nats_per_token": found}))


def gradient_of(model: Any, backend: Any, adapter: Path, rows: list[Any], tokenizer: Any) -> dict[str, Any]:
    """Return the gradient of the rows' mean loss at the weights of `adapter`, computed as the trainer computes it."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    from llamarefine_jobs.models.lora import ADAPTER_WEIGHTS
    from llamarefine_jobs.training.adapter_weights import AdapterWeights
    from llamarefine_jobs.training.gradient import StepGradient
    from llamarefine_jobs.training.objectives import Example, SftObjective
    from tests.gpu import trainers
    from tests.jobs import tiny

    model = backend.add_adapter(model, tiny.recipe().sft.lora, seed=1, gradient_checkpointing=False)
    set_peft_model_state_dict(model, load_file(adapter / ADAPTER_WEIGHTS))
    model.train()
    forward = trainers.plain_forward(backend, model, tokenizer)
    weights = AdapterWeights(model, weight_decay=0.0, most_gradient_norm=1.0)
    step = StepGradient(forward, SftObjective(), weights, print, most_tokens=None)
    examples = [Example((row,)) for row in rows]
    step(examples, step.objective.weight(examples))
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: weight.grad.float().cpu().clone() for name, weight in named.items()}


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
