"""The training loop of SFT and DPO: steps, logging, validation, checkpoints, stopping on SIGTERM."""

import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.errors import DataError, DivergedError, PreemptedError
from llamarefine_jobs.contract.recipe import Dpo, Sft
from llamarefine_jobs.models import adapters
from llamarefine_jobs.models.forward import Forward
from llamarefine_jobs.process.out_of_memory import OOM_METRIC, oom_micro_batch_rows
from llamarefine_jobs.sources import locations
from llamarefine_jobs.training.adapter_weights import AdapterWeights
from llamarefine_jobs.training.best_adapter import BestAdapter
from llamarefine_jobs.training.checkpoint_files import (
    TrainingState,
    checkpoints_address,
    read_checkpoint,
    reporting_damage,
    write_checkpoint,
)
from llamarefine_jobs.training.checkpoint_policy import CheckpointPolicy
from llamarefine_jobs.training.gradient import StepGradient
from llamarefine_jobs.training.objectives import Example, Objective
from llamarefine_jobs.training.pass_size import most_pass_tokens
from llamarefine_jobs.training.progress import TrainingProgress
from llamarefine_jobs.training.reference_logprobs import write_reference
from llamarefine_jobs.training.schedule import Schedule

_EVALUATIONS_A_RUN = 4
_SAMPLED_ROWS = 100_000  # the sizes of packed sequences are chosen from the training's first steps

# Returns the figures of the forward's model on the validation split, including `eval_loss`, the same in every process.
# Raises PreemptedError on SIGTERM.
Validate = Callable[[Any], dict[str, float]]


class Trainer:
    """Trains the adapter of the forward's model on `examples`, and validates it with `validate`."""

    def __init__(
        self,
        context: Context,
        section: Sft | Dpo,
        forward: Forward,
        examples: Sequence[Example],
        objective: Objective,
        validate: Validate,
    ) -> None:
        self.context = context
        self.section = section
        self.forward = forward
        self.model = model = forward.model
        self.examples = examples
        self.objective = objective
        self.schedule = Schedule(section, len(examples), context.recipe.seed)
        self.state = TrainingState(0, self.schedule.steps, [])
        self.weights = AdapterWeights(
            model, weight_decay=section.weight_decay, most_gradient_norm=section.max_gradient_norm
        )
        context.world.copy_from_first(self.weights.values)  # all processes start from the same adapter
        self.gradient = StepGradient(
            self.forward,
            objective,
            self.weights,
            context.note,
            most_tokens=None if section.micro_batch_rows else most_pass_tokens(model, section),
            most_examples=section.micro_batch_rows,
        )
        tokens_per_example = sum(map(len, examples)) / len(examples)
        self.progress = TrainingProgress(section, context, tokens_per_example)
        self.checkpoints = CheckpointPolicy(section, context)
        self.best = BestAdapter(context.work, checkpoints_address(context))
        self._validate_model = validate
        self._unread_losses: list[Any] = []  # of the newest steps, on the device: reading one waits for the device
        self._read_losses: list[float] = []  # of the steps before them, since the last log

    def prepare(self) -> None:
        """Prepare the passes of the step: on CUDA, compile and capture them."""
        sampled = range(1, min(self.schedule.steps, 1 + _SAMPLED_ROWS // self.section.batch_rows) + 1)
        has_dropout = self.section.lora.dropout > 0
        self.model.train()
        longest_row = max(len(row) for example in self.examples for row in example.rows)
        steps = (self.own_examples(step) for step in sampled)  # a CPU takes none of them
        self.gradient.prepare(steps, longest_row, has_dropout=has_dropout)

    def examples_of(self, step: int) -> list[Example]:
        """Return all examples of a step."""
        return [self.examples[index] for index in self.schedule.rows_of(step)]

    def own_examples(self, step: int) -> list[Example]:
        """Return this process's share of a step's examples. All shares have about as many tokens."""
        return self._share_of(self.examples_of(step))

    def step_loss(self, step: int) -> Any:
        """Compute the gradient of a step; return this process's part of the step's loss, on the device."""
        if self.section.lora.dropout:
            self._seed_dropout(step)
        examples = self.examples_of(step)
        return self.gradient(self._share_of(examples), self.objective.weight(examples))

    def train(self, checkpoint: Path | None) -> None:
        """Train to the last step, from `checkpoint` if there is one, and write the best adapter to the output.

        Raises DivergedError if a loss is too high or not finite, or a weight is not finite; PreemptedError on SIGTERM;
        IntegrityError if the checkpoint is damaged.
        """
        context, state = self.context, self.state
        context.metrics[OOM_METRIC] = oom_micro_batch_rows()  # set now, for the manifests of the checkpoints too
        if checkpoint:
            self._resume(checkpoint)
        began_s = time.monotonic()
        self.checkpoints.begin(state.step)
        self.progress.begin(state.step, state.steps, state.history)
        try:
            preempted = self._run_steps()
        except Exception as error:
            if not isinstance(error, DivergedError):
                traceback.clear_frames(error.__traceback__)  # the frames hold the step's tensors; memory may be short
                self.checkpoints.upload_last_checkpoint()
            raise
        self.checkpoints.discard_waiting()
        if preempted:
            context.world.barrier()  # if one process ended, torch would kill rank 0, which is still uploading
            raise self.checkpoints.preempted_error or PreemptedError(f"{context.stage.name} was stopped by SIGTERM")
        if not math.isfinite(self.best.loss):
            raise DivergedError(f"the validation loss is {self.best.loss}; lower {context.stage.name}.learning_rate")
        if context.world.is_first:
            config = self.model.peft_config["default"]
            adapters.save_adapter(config, self.best.weights(), context.output / "adapter", _base_name(context))
        self._record(time.monotonic() - began_s)
        context.note(f"kept the adapter of step {self.best.step}, validation loss {self.best.loss:.4f}")

    def after_step(self) -> bool:
        """Log, validate and save what is due after the step; return whether SIGTERM ends the training."""
        step, last = self.state.step, self.state.step >= self.state.steps
        # The loss right after a checkpoint confirms it; without it the checkpoint would wait for the next logged loss.
        if last or step % self.section.log_every_steps == 0 or self.checkpoints.needs_loss_of(step):
            self._log()
        # The processes have separate clocks and receive SIGTERM at different steps, so they must agree on both.
        is_due = self.context.world.is_first and self.checkpoints.is_due(step)
        preempted, is_due = self.context.world.any(self.context.stop.is_set(), is_due)
        if self._is_validation_due() and not preempted:
            try:
                self._validate()
            except PreemptedError:  # a validation may take minutes, and the checkpoint needs the grace period
                preempted = True
        if preempted or (is_due and not last):
            self._save(preempted=preempted)
        return bool(preempted)

    def _run_steps(self) -> bool:
        """Make the steps that are left; return whether SIGTERM ended the training."""
        if self._is_validation_due():  # SIGTERM interrupted the validation of this step
            self._validate()
        self.context.stop.defer_exit()  # from the next step on, SIGTERM saves a checkpoint first
        self.model.train()
        while self.state.step < self.state.steps:
            step = self.state.step + 1
            self._unread_losses.append(self.step_loss(step))
            self.context.world.sum_gradient(self.weights.gradient)
            self.weights.update(self.schedule.learning_rate(step))
            self.state.step = step
            if self.after_step():
                return True
        return False

    def _resume(self, checkpoint: Path) -> None:
        """Continue from the checkpoint. Raises IntegrityError if it is damaged."""
        self.best.restore(checkpoint, self.context.world)
        with reporting_damage(self.context):
            state = read_checkpoint(checkpoint, self.model, self.weights, self.schedule.steps)
        self.state.step, self.state.history = state.step, state.history
        if self.context.world.is_first_on_node and any("eval_loss" in entry for entry in state.history):
            self.best.check(self.model)

    def _log(self) -> None:
        """Record and report the mean loss of the steps since the last log."""
        self._check_losses()
        mean = sum(self._read_losses) / len(self._read_losses)
        self._read_losses.clear()
        rate = self.schedule.learning_rate(self.state.step)
        self.state.history.append({"step": self.state.step, "loss": mean, "learning_rate": rate})
        self.checkpoints.confirm(self.state.step)
        self.progress.report(mean, self.state.step, self.state.steps)

    def _check_losses(self) -> None:
        """Read the newest losses from the device. Raises DivergedError, with the step, if one is too high or NaN."""
        import torch

        if not self._unread_losses:
            return
        losses = self.context.world.sum_over_processes(torch.stack(self._unread_losses).double().tolist)
        self._unread_losses.clear()
        for step, loss in enumerate(losses, self.state.step - len(losses) + 1):
            if self.progress.is_diverged(loss):
                raise self._diverged(f"the loss is {loss:g}", step)
        self._read_losses += losses

    def _is_validation_due(self) -> bool:
        step, last = self.state.step, self.state.step >= self.state.steps
        every = self.section.evaluate_every_steps or max(1, self.state.steps // _EVALUATIONS_A_RUN)
        if step == 0 or not (last or step % every == 0):
            return False
        return not any(entry["step"] == step for entry in self.state.history if "eval_loss" in entry)

    def _validate(self) -> None:
        """Validate the adapter, and keep it if it is the best so far. Raises PreemptedError on SIGTERM."""
        self._check_losses()  # if the training diverged, the error names the step at which it did
        figures = self._validate_model(self.forward)
        loss = figures["eval_loss"]
        step = self.state.step
        self.context.note(f"validation loss {loss:.4f} at step {step}")
        if not math.isfinite(loss):
            raise self._diverged(f"the validation loss is {loss}", step)
        self.state.history.append({"step": step, **figures})
        if loss >= self.best.loss:
            return
        self._check_weights()  # a finite loss does not prove that the weights are finite
        self.best.replace(self.model, loss, step, write=self.context.world.is_first)

    def _save(self, *, preempted: bool) -> None:
        self._check_losses()  # as before a validation
        self._check_weights()  # the loss of the next step would be the first to show it
        folder = self.context.work / "checkpoints" / str(self.state.step)
        if self.context.world.is_first:
            write_checkpoint(folder, self.model, self.weights, self.state)
            if self.examples[0].reference:
                write_reference(folder, self.examples)
        self.checkpoints.complete(self.state.step, folder, self.best, preempted=preempted)

    def _check_weights(self) -> None:
        if not self.weights.is_finite():
            raise self._diverged("the adapter holds no finite weights", self.state.step)

    def _diverged(self, what: str, step: int) -> DivergedError:
        return self.checkpoints.diverged_error(f"{what} at step {step} of {self.state.steps}")

    def _share_of(self, examples: Sequence[Example]) -> list[Example]:
        return list(self.context.world.shard(sorted(examples, key=len, reverse=True)))

    def _seed_dropout(self, step: int) -> None:
        """Seed the random numbers of a step, so that a training that continues draws the same ones."""
        import torch

        world = self.context.world
        torch.manual_seed((self.context.recipe.seed * self.state.steps + step) * world.size + world.rank)

    def _record(self, seconds: float) -> None:
        """Write the training's figures into the metrics of its manifest."""
        context, progress = self.context, self.progress
        context.metrics |= {
            "steps": self.state.step,
            "best_step": self.best.step,
            "train_loss": progress.last_loss,
            "validation_loss": self.best.loss,
            "train_seconds": round(seconds, 3),
            "tokens_per_s": progress.tokens_per_s(self.state.step - progress.first_step, seconds),
            "resumed_at_step": progress.first_step or None,
            "micro_batch_rows": self.section.micro_batch_rows,
            "processes": context.world.size,
            "history": list(_history(self.state.history)),
        }


def set_token_ids(model: Any, tokenizer: Any) -> Any:
    """Return `model` with the tokenizer's EOS and pad tokens in its configuration.

    Raises DataError if the tokenizer has more tokens than the model.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise DataError(f"the tokenizer has {len(tokenizer)} tokens, the base {rows}; they do not belong together")
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return model


def _base_name(context: Context) -> str | None:
    """Return the Hub id of an SFT adapter's base, for the adapter's config; None for DPO or a base without a Hub id."""
    source = context.recipe.prepare.base.source
    on_hub = context.stage.name == "sft" and locations.kind(source, hub_id_allowed=True) is locations.Kind.HUB
    return source.removeprefix("hf://") if on_hub else None


def _history(entries: list[dict[str, float]]) -> Iterator[dict[str, float]]:
    """Yield the logged steps, in step order, a validation before the loss of its step.

    A validation is logged after the loss of its step, but before it if SIGTERM interrupted the validation.
    """
    yield from sorted(entries, key=lambda entry: (entry["step"], "loss" in entry))
