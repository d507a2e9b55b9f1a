"""Time the training steps of one arm in one process; print one line of JSON after each measurement.

    python -m tests.bench.gpu.training ARM PREPARED STEPS MEASUREMENT...       # a measurement is stage:rows:cudnn

`ours` and `unsloth` are our own loop, `plain` and `earlier` are TRL's trainers. Steps are timed after a warm-up. Tokens
are those of rows: padding is not counted. N is the number of weights of the base, embeddings included. A forward pass
counts 2·N operations per token, a backward pass through frozen weights 2·N more, so SFT costs 4·N. DPO costs 6·N with
its reference; ours computes the reference once before the first step, and its rate includes the time that this took.
"""

import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.gpu.arms import Measurement

PREFIX = "measured: "
WARM_UP_STEPS, PROFILED_STEPS = 5, 3
MOST_SECONDS = 12  # of timed steps
RECIPE = Path(__file__).parents[3] / "jobs/recipes/tinyllama-nvidia-docs.yaml"
# Dense bf16 operations per second, from the vendor's datasheets.
PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-40GB": 312e12}
PEAK_FLOPS |= {"NVIDIA A100-SXM4-80GB": 312e12}
BACKENDS = {"ours": "packed", "unsloth": "unsloth", "plain": "transformers", "earlier": "transformers"}
EARLIER_LORA = "{rank: 16, alpha: 32.0, dropout: 0.1, target_layers: [q_proj, v_proj]}"
EARLIER_TOKENS = 256  # the length to which each of its SFT rows was padded or truncated


def main(arm: str, prepared: Path, steps: int, measurements: list[Measurement]) -> None:
    """Make the measurements one after the other; an error ends one measurement only."""
    began_s = time.monotonic()
    from llamarefine_jobs.models import backends

    backend = backends.choose_backend(BACKENDS[arm])
    if arm in ("plain", "earlier"):
        import trl  # noqa: F401
    import_s: float | None = time.monotonic() - began_s
    for measurement in measurements:
        with tempfile.TemporaryDirectory() as folder:
            try:
                figures = measure(arm, measurement, backend, prepared, steps, Path(folder))
                figures |= {"import_s": import_s, "error": None}
            except Exception as error:
                lines = str(error).strip().splitlines() or [""]
                figures = {"error": f"{type(error).__name__}: {lines[0][:300]}"}
        # Only the first measurement of a process is a cold start.
        figures["cold"], import_s = import_s is not None, None
        named = {"arm": arm, "stage": measurement.stage, "name": measurement.name, "rows": measurement.rows}
        print(PREFIX + json.dumps(named | figures), flush=True)
        backends.free_memory()


def measure(
    arm: str, measurement: Measurement, backend: Any, prepared: Path, steps: int, folder: Path
) -> dict[str, Any]:
    """Return the figures of one measurement."""
    import torch
    from tests.gpu import trainers

    cuda = torch.cuda.is_available()
    if cuda:
        torch.backends.cuda.enable_cudnn_sdp(arm in ("plain", "earlier") and measurement.cudnn)
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(steps)
    recipe = recipe_of(arm, measurement, clock.most_steps, cuda)
    section: Any = recipe.section(measurement.stage)
    context = trainers.make_context(measurement.stage, recipe, prepared, folder)
    began_s = time.monotonic()
    model, tokenizer = trainers.load(backend, context, prepared / "base")
    loaded_s = time.monotonic()
    train = train_with_ours if arm in ("ours", "unsloth") else train_with_trl
    reference_s, reference_tokens = train(arm, context, backend, model, tokenizer, clock)
    parameters = sum(part.numel() for name, part in model.named_parameters() if "lora_" not in name)
    seconds_per_token = clock.seconds / clock.tokens + (reference_s / reference_tokens if reference_tokens else 0.0)
    peak = PEAK_FLOPS.get(torch.cuda.get_device_name(0)) if cuda and section.quantization == "none" else None
    flops = (4 if measurement.stage == "sft" else 6) * parameters
    return {
        "backend": backend.name,
        "quantization": section.quantization,
        "load_s": loaded_s - began_s,
        "prepare_s": clock.prepared_s - loaded_s - reference_s,
        "first_step_s": clock.first_step_s,
        "start_to_first_step_s": clock.first_ended_s - began_s,  # without the imports
        "reference_s": reference_s or None,
        "slower_ways": clock.slower_ways,
        "timed_steps": len(clock.step_ms),
        "step_ms": spread(clock.step_ms),
        "tokens_per_step": clock.tokens / len(clock.step_ms),
        "tokens_per_s": 1 / seconds_per_token,
        "tokens_per_s_of_steps": clock.tokens / clock.seconds,
        "mfu": flops / seconds_per_token / peak if peak else None,
        "kernels_per_step": clock.kernels_per_step,
        "gpu_ms_per_step": clock.gpu_ms_per_step,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "last_loss": clock.last_loss,
    }


def recipe_of(arm: str, measurement: Measurement, steps: int, cuda: bool) -> Any:
    """Return the repository's recipe, with the earlier attempt's settings for that arm (in 4 bits only with CUDA)."""
    from llamarefine_jobs.recipe_file import load_recipe
    from llamarefine_jobs.sources.pinning import pin

    stage = measurement.stage
    overrides = [f"{stage}.max_steps={steps}", f"{stage}.checkpoint_every_s=null", f"{stage}.epochs=100"]
    overrides += [f"{stage}.batch_rows={measurement.rows}", f"{stage}.backend={BACKENDS[arm]}"]
    if arm == "earlier":
        overrides += [f"{stage}.lora={EARLIER_LORA}"] + ([f"{stage}.quantization=nf4"] if cuda else [])
    return pin(load_recipe(RECIPE, [*MADE_UP_SOURCES, *overrides]))


MADE_UP_SOURCES = (
    "prepare.base={source: tiny-llama}",
    "prepare.questions={source: python-docstrings}",
    "prepare.preferences={source: python-docstrings}",
    "prepare.max_rows=null",
)


class Clock:
    """Measures the steps of a training: after each step, `after_step` says whether the training goes on."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.most_steps = WARM_UP_STEPS + steps + PROFILED_STEPS
        self.tokens = 0
        self.seconds = 0.0
        self.step_ms: list[float] = []
        self.kernels_per_step: float | None = None
        self.gpu_ms_per_step: float | None = None
        self.slower_ways: list[str] = []
        self.last_loss: float | None = None
        self.prepared_s = self.first_step_s = self.first_ended_s = 0.0
        self._ends: list[Any] = []  # of steps: CUDA events, which do not make Python wait, or times
        self._done = 0
        self._profiler: Any = None
        self._first_profiled = 0

    def begin(self) -> None:
        """Note that everything before the first step is done."""
        synchronize()
        self.prepared_s = time.monotonic()

    def after_step(self, tokens: int) -> bool:
        """Count a step of so many tokens; return whether another one is needed."""
        self._done += 1
        if self._done == 1:
            synchronize()
            self.first_ended_s = time.monotonic()
            self.first_step_s = self.first_ended_s - self.prepared_s
        if self._done < WARM_UP_STEPS:
            return True
        if self._done == WARM_UP_STEPS:
            synchronize()
            self._began_s = time.monotonic()
            self._ends = [self._now()]
            return True
        if self._profiler is None:
            self.tokens += tokens
            self._ends.append(self._now())
            timed, seconds = len(self._ends) - 1, time.monotonic() - self._began_s
            if timed < self.steps and not (seconds > MOST_SECONDS and timed >= 3):
                return True
            synchronize()
            self.seconds = time.monotonic() - self._began_s
            self.step_ms = [_between_ms(one, other) for one, other in zip(self._ends, self._ends[1:], strict=False)]
            return self._begin_profile()
        if self._done < self._first_profiled + PROFILED_STEPS:
            return True
        self._end_profile()
        return False

    def _begin_profile(self) -> bool:
        import torch

        if not torch.cuda.is_available():
            return False
        self._first_profiled = self._done
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._profiler.__enter__()
        return True

    def _end_profile(self) -> None:
        synchronize()
        self._profiler.__exit__(None, None, None)
        events = [event for event in self._profiler.key_averages() if "CUDA" in str(event.device_type)]
        kernels = [event for event in events if not event.key.startswith(("Memcpy", "Memset"))]
        self.kernels_per_step = sum(event.count for event in kernels) / PROFILED_STEPS
        self.gpu_ms_per_step = sum(event.self_device_time_total for event in events) / 1000 / PROFILED_STEPS

    @staticmethod
    def _now() -> Any:
        import torch

        if not torch.cuda.is_available():
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between_ms(one: Any, other: Any) -> float:
    return 1000 * (other - one) if isinstance(one, float) else float(one.elapsed_time(other))


def spread(values: list[float]) -> dict[str, float]:
    """Return the median, and the values below which a tenth and nine tenths of `values` are."""
    ordered = sorted(values)
    low, high = (ordered[round(part * (len(ordered) - 1))] for part in (0.1, 0.9))
    return {"median": statistics.median(ordered), "p10": low, "p90": high}


def rows_needed(context: Any, clock: Clock) -> int:
    """Return how many rows the steps take. To encode all pairs, and to score them, would take the benchmark's time."""
    section: Any = context.recipe.section(context.stage.name)
    return int(section.batch_rows * clock.most_steps)


def train_with_ours(
    arm: str, context: Any, backend: Any, model: Any, tokenizer: Any, clock: Clock
) -> tuple[float, int]:
    """Run the steps of our own loop, without validation and checkpoints; return the reference's seconds and tokens."""
    from tests.gpu import trainers

    from llamarefine_jobs.training.loop import Trainer

    class TimedTrainer(Trainer):
        def after_step(self) -> bool:
            rows = self.schedule.rows_of(self.state.step)
            goes_on = clock.after_step(sum(len(self.examples[index]) for index in rows))
            if not goes_on:
                clock.last_loss = float(self._unread_losses[-1])
            return not goes_on

    forward = trainers.make_forward(context, backend, model, tokenizer)
    began_s = time.monotonic()
    examples = trainers.make_examples(context, forward, tokenizer, rows_needed(context, clock))
    reference_s = time.monotonic() - began_s if context.stage.name == "dpo" else 0.0
    trainer = trainers.make_trainer(context, forward, tokenizer, examples, TimedTrainer)
    trainer.gradient._note = clock.slower_ways.append
    trainer.prepare()
    clock.begin()
    trainer._run_steps()
    trainer.gradient.uncompile_layers()
    return reference_s, sum(map(len, examples)) if reference_s else 0


def train_with_trl(arm: str, context: Any, backend: Any, model: Any, tokenizer: Any, clock: Clock) -> tuple[float, int]:
    """Run the steps of TRL's trainer: all rows of a step in one pass, padded to the longest."""
    from transformers import TrainerCallback

    class ClockCallback(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not clock.after_step(int(counts.pop())):
                control.should_training_stop = True

    section: Any = context.recipe.section(context.stage.name)
    arguments = {
        "output_dir": str(context.work / "trainer"),
        "seed": context.recipe.seed,
        "max_steps": section.max_steps,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": section.lr_schedule,
        "warmup_steps": section.warmup_fraction,
        "max_grad_norm": section.max_gradient_norm,
        "per_device_train_batch_size": section.batch_rows,
        "gradient_checkpointing": False,
        "use_cpu": backend.accelerator == "cpu",
        "bf16": backend.bf16,
        "max_length": None,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "rows_needed": rows_needed(context, clock),
    }
    build = _trl_sft if context.stage.name == "sft" else _trl_dpo
    trainer = build(arm, context, model, tokenizer, arguments, section)
    counts: list[int] = []  # of each step's tokens, counted on the CPU so that nothing waits for the GPU
    collate, step = trainer.data_collator, trainer.training_step

    def counting_collate(rows: list[Any]) -> Any:
        batch = collate(rows)
        counts.insert(0, int(batch["attention_mask"].sum()))
        return batch

    def remembering_step(*positional: Any, **named: Any) -> Any:
        loss = step(*positional, **named)
        clock_loss.append(loss.detach())
        return loss

    clock_loss: list[Any] = []
    trainer.data_collator, trainer.training_step = counting_collate, remembering_step
    trainer.add_callback(ClockCallback())
    clock.begin()
    trainer.train()
    clock.last_loss = float(clock_loss[-1])
    return 0.0, 0


def _trl_sft(arm: str, context: Any, model: Any, tokenizer: Any, arguments: dict[str, Any], section: Any) -> Any:
    from datasets import Dataset
    from tests.gpu import trainers
    from trl import SFTConfig, SFTTrainer

    rows = [
        (row.prompt_ids, row.answer_ids)
        for (row,) in trainers.encoded(context, tokenizer, count=arguments.pop("rows_needed"))
    ]
    if arm == "earlier":  # it had labels for the prompt too
        whole = [(prompt + answer)[:EARLIER_TOKENS] for prompt, answer in rows]
        columns = {"input_ids": whole, "labels": whole}
    else:
        columns = {
            "input_ids": [prompt + answer for prompt, answer in rows],
            "labels": [[-100] * len(prompt) + answer for prompt, answer in rows],
        }
    settings = SFTConfig(**arguments, packing=False, padding_free=False, loss_type="nll")
    trainer = SFTTrainer(
        model=model, args=settings, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer
    )
    if arm == "earlier":
        trainer.data_collator.pad_to_multiple_of = EARLIER_TOKENS
    return trainer


def _trl_dpo(arm: str, context: Any, model: Any, tokenizer: Any, arguments: dict[str, Any], section: Any) -> Any:
    """The reference is the model without its adapter, computed in each step."""
    from datasets import Dataset
    from tests.gpu import trainers
    from trl import DPOConfig, DPOTrainer

    pairs: Any = trainers.encoded(context, tokenizer, count=arguments.pop("rows_needed"))
    trainer = DPOTrainer(
        model=model,
        ref_model=None,
        args=DPOConfig(**arguments, beta=section.beta),
        train_dataset=Dataset.from_list([{"prompt": "what ", "chosen": "this", "rejected": "that"}]),
        processing_class=tokenizer,
    )
    with contextlib.suppress(ValueError, KeyError):
        trainer.model.delete_adapter("ref")
    trainer.train_dataset = Dataset.from_list(
        [
            {"prompt_ids": chosen.prompt_ids, "chosen_ids": chosen.answer_ids, "rejected_ids": rejected.answer_ids}
            for chosen, rejected in pairs
        ]
    )
    return trainer


def synchronize() -> None:
    """Wait until the GPU has finished, so that the clock measures the computation and not its launch."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _measurement(text: str) -> Measurement:
    stage, rows, cudnn = text.split(":")
    return Measurement(stage, int(rows), cudnn == "True")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), [_measurement(text) for text in sys.argv[4:]])
