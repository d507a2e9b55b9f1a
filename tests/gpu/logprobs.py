"""Print the log-probabilities that one backend computes, as JSON.

Each backend needs its own process, because Unsloth patches transformers for the whole process.

LLAMAREFINE_BACKEND=transformers python -m tests.gpu.logprobs PREPARED ADAPTER GRADIENT
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(prepared: Path, adapter: Path, gradient: Path) -> None:
    """Print the backend's name and the nats per token of the test answers, by the base and by base + adapter.

    Write the gradient of the answers' loss with respect to the adapter's weights to the file `gradient`, by name.
    """
    from llamarefine_jobs.models import adapters, backends

    backend = backends.choose_backend()
    from safetensors.torch import save_file

    from llamarefine_jobs.models.encoding import encode_questions, load_tokenizer, read_rows
    from llamarefine_jobs.models.scoring import score

    tokenizer = load_tokenizer(prepared / "base")
    rows = encode_questions(tokenizer, read_rows(prepared / "questions", "test"))
    found = {}
    model = backend.load(prepared / "base")
    for name in ("base", "sft"):
        if name == "sft":
            model = adapters.attach_adapter(model, adapter)
        scores = score(model, tokenizer.pad_token_id, rows, 4)
        found[name] = [one.logprob / one.tokens for one in scores]
    save_file(gradient_of(backend.load(prepared / "base"), backend, adapter, rows, tokenizer.pad_token_id), gradient)
    print(json.dumps({"backend": backend.name, "nats_per_token": found}))


def gradient_of(model: Any, backend: Any, adapter: Path, rows: list[Any], pad_id: int) -> dict[str, Any]:
    """Return the gradient of the rows' mean loss at the weights of `adapter`, computed as the trainer computes it."""
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from llamarefine_jobs.models.lora import ADAPTER_WEIGHTS
    from llamarefine_jobs.sft import labelled
    from tests.jobs import tiny

    model = backend.add_adapter(model, tiny.recipe().sft.lora, seed=1, gradient_checkpointing=False)
    set_peft_model_state_dict(model, load_file(adapter / ADAPTER_WEIGHTS))
    columns, device = labelled(rows), next(model.parameters()).device
    collate = DataCollatorForLanguageModeling(pad_token_id=pad_id)
    batch = collate([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
    model.train()
    with torch.autocast(device.type, torch.bfloat16, enabled=backend.bf16):
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
    loss.backward()
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: weight.grad.float().cpu().contiguous() for name, weight in weights.items()}


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
