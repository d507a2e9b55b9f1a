"""Time the training steps of one arm of one stage, and print the figures as one line of JSON.

Steps are timed after a warm-up in which kernels are compiled. Tokens are those that the trainer processed, without
padding. N is the number of weights of the base, embeddings included. A forward pass counts 2·N operations per token, a
backward pass through frozen weights 2·N more, so SFT costs 4·N and DPO with its reference model 6·N.
"""

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

WARM_UP_STEPS = 10
RECIPE = Path(__file__).parents[3] / "jobs/recipes/tinyllama-nvidia-docs.yaml"
# Dense bf16 operations per second, from the vendor's datasheets.
PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-40GB": 312e12}
PEAK_FLOPS |= {"NVIDIA A100-SXM4-80GB": 312e12}
EARLIER = {
    "sft": ("sft.batch_rows=8", "sft.micro_batch_rows=8", "sft.packing=never"),
    "dpo": ("dpo.batch_rows=8", "dpo.micro_batch_rows=8"),
}
EARLIER_EPOCHS = {
    "sft": 4,
    "dpo": 3,
}  # only for estimated times: with several epochs, our DPO computes the reference before training
EARLIER_LORA = "{rank: 16, alpha: 32.0, dropout: 0.1, target_layers: [q_proj, v_proj]}"
EARLIER_TOKENS = 256  # the length to which each of its SFT rows was padded or truncated


def main(arm: str, stage: str, prepared: Path, steps: int) -> None:
    """Print the figures of `steps` optimizer steps, or fewer if there are not enough rows."""
    began_s = time.monotonic()
    from llamarefine_jobs.contract.memory import Shape, training_bytes
    from llamarefine_jobs.models import backends

    backend = backends.choose_backend()
    import torch

    imported_s = time.monotonic()
    cuda = torch.cuda.is_available()
    recipe = recipe_of(arm, stage, steps, cuda)
    section = recipe.section(stage)
    model, tokenizer = load(backend, recipe, section, prepared)
    loaded_s = time.monotonic()
    trainer, tokens_per_row, rows = build(arm, stage, recipe, backend, model, tokenizer, prepared)
    built_s = time.monotonic()
    clock = attach_clock(trainer)
    trainer.train()
    timed_s, tokens, timed_steps = clock.reading()
    tokens_per_s = tokens / timed_s
    flops = (4 if stage == "sft" else 6) * sum(part.numel() for part in base_parameters(trainer.model))
    peak = PEAK_FLOPS.get(torch.cuda.get_device_name(0)) if cuda else None
    quantized = section.quantization != "none"
    epochs = EARLIER_EPOCHS[stage] if arm == "earlier" else section.epochs
    figures = {
        "arm": arm,
        "stage": stage,
        "backend": backend.name,
        "quantization": section.quantization,
        "batch_rows": section.batch_rows,
        "micro_batch_rows": section.micro_batch_rows,
        "import_seconds": imported_s - began_s,
        "load_seconds": loaded_s - imported_s,
        "build_seconds": built_s - loaded_s,
        "warm_up_steps": WARM_UP_STEPS,
        "timed_steps": timed_steps,
        "timed_seconds": timed_s,
        "tokens": tokens,
        "tokens_per_s": tokens_per_s,
        "flops_per_token": None if quantized else flops,
        "mfu": None if quantized or peak is None else tokens_per_s * flops / peak,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "estimated_memory_bytes": training_bytes(
            Shape.from_config(trainer.model.config.to_dict()),
            section,
            recipe.max_length_tokens,
            with_unsloth=backend.name == "unsloth",
        ),
        "whole_training_seconds_estimated": rows * tokens_per_row * epochs / tokens_per_s,
        "training_rows": rows,
        "tokens_per_row": tokens_per_row,
        "epochs": epochs,
        "last_loss": float(clock.loss),
    }
    print(json.dumps(figures))


def recipe_of(arm: str, stage: str, steps: int, cuda: bool) -> Any:
    """Return the repository's recipe, with the earlier attempt's settings for that arm (in 4 bits only with CUDA)."""
    from llamarefine_jobs.recipe_file import load_recipe

    overrides = [f"{stage}.max_steps={steps + WARM_UP_STEPS}", f"{stage}.checkpoint_every_s=null"]
    if arm == "earlier":
        overrides += [*EARLIER[stage], f"{stage}.lora={EARLIER_LORA}"]
        overrides += [f"{stage}.quantization=nf4"] if cuda else []
    return load_recipe(RECIPE, overrides)


def load(backend: Any, recipe: Any, section: Any, prepared: Path) -> tuple[Any, Any]:
    """Return the base with a new adapter, and its tokenizer.

    DPO is timed on the base instead of the SFT policy: the arithmetic is the same.
    """
    from llamarefine_jobs.models.encoding import load_tokenizer
    from llamarefine_jobs.training import loop

    tokenizer = load_tokenizer(prepared / "base")
    model = backend.load(
        prepared / "base", quantization=section.quantization, max_length_tokens=recipe.max_length_tokens
    )
    loop.set_token_ids(model, tokenizer)
    model = backend.add_adapter(
        model, section.lora, seed=recipe.seed, gradient_checkpointing=section.gradient_checkpointing
    )
    return model, tokenizer


def build(
    arm: str, stage: str, recipe: Any, backend: Any, model: Any, tokenizer: Any, prepared: Path
) -> tuple[Any, float, int]:
    """Return the stage's trainer (for its arm, with the earlier attempt's padding), mean tokens per row, row count."""
    from llamarefine_jobs import dpo, sft
    from llamarefine_jobs.models.encoding import encode_pairs, encode_questions, read_rows
    from llamarefine_jobs.training import loop

    context: Any = bare_context(stage, recipe, prepared.parent)
    rows = read_rows(prepared / ("questions" if stage == "sft" else "preferences"), "train")
    section = recipe.section(stage)
    if stage == "sft":
        encoded = encode_questions(tokenizer, rows)
        trainer = sft.build_trainer(context, section, backend, model, tokenizer, encoded, no_callback())
        if arm == "earlier":
            trainer.data_collator.pad_to_multiple_of = EARLIER_TOKENS
            trainer.train_dataset = trainer.train_dataset.map(_truncate)
            lengths = [min(len(row), EARLIER_TOKENS) for row in encoded]
        else:
            lengths = [len(row) for row in encoded]
        longest = lengths
    else:
        trainer = dpo.build_trainer(context, section, backend, model, tokenizer, rows, no_callback())
        pairs = encode_pairs(tokenizer, rows)
        lengths = [len(chosen) + len(rejected) for chosen, rejected in pairs]
        longest = [max(len(chosen), len(rejected)) for chosen, rejected in pairs]
    if arm == "ours":  # the other arms use TRL's row order
        loop.use_whole_batches(trainer, section, longest)
    return trainer, sum(lengths) / len(lengths), len(rows)


def _truncate(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return a row as in the earlier attempt: truncated, and with labels for the prompt too."""
    return {"input_ids": row["input_ids"][:EARLIER_TOKENS], "labels": row["input_ids"][:EARLIER_TOKENS]}


def no_callback() -> Any:
    """Return a callback that does nothing, instead of the stage's, which evaluates, saves and reports."""
    from transformers import TrainerCallback

    return TrainerCallback()


def bare_context(stage: str, recipe: Any, folder: Path) -> Any:
    """Return a context with an unused store: the trainers only need its folder and its recipe."""
    from llamarefine_jobs.context import Context
    from llamarefine_jobs.contract.stages import STAGES
    from llamarefine_jobs.process.sigterm import Stop
    from llamarefine_jobs.store import Store

    return Context(
        stage=STAGES[stage],
        recipe=recipe,
        store=Store(str(folder / "store")),
        key="0" * 64,
        parents={},
        inputs={},
        output=folder,
        work=folder,
        started_at=datetime.now(UTC),
        stop=Stop(),
    )


def attach_clock(trainer: Any) -> Any:
    """Record the tokens that the trainer processes and the time at which each step ends; return the recorder."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.counts: list[list[Any]] = [[]]
            self.ends_s: list[float] = []
            self.loss: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step >= WARM_UP_STEPS and (
                state.global_step == WARM_UP_STEPS or state.global_step == state.max_steps
            ):
                synchronize()
            self.ends_s.append(time.monotonic())
            self.counts.append([])

        def reading(self) -> tuple[float, int, int]:
            warm = min(WARM_UP_STEPS, len(self.ends_s) - 1)
            seconds = self.ends_s[-1] - self.ends_s[warm - 1]
            tokens = sum(int(count) for step in self.counts[warm : len(self.ends_s)] for count in step)
            return seconds, tokens, len(self.ends_s) - warm

    clock, step = Clock(), trainer.training_step

    def counting_step(model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        mask = inputs.get("attention_mask")
        clock.counts[-1].append(mask.sum() if mask is not None else inputs["input_ids"].numel())
        clock.loss = step(model, inputs, *rest, **more).detach()
        return clock.loss

    trainer.training_step = counting_step
    trainer.add_callback(clock)
    return clock


def synchronize() -> None:
    """Wait until the GPU has finished, so that the clock measures the computation and not its launch."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def base_parameters(model: Any) -> list[Any]:
    """Return all parameters but the adapter's."""
    return [part for name, part in model.named_parameters() if "lora_" not in name]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
