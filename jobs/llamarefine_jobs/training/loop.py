"""The training loop of SFT and DPO: the trainer's settings, its callback, and one function that trains to the end."""

import contextlib
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.errors import DataError, DivergedError, LlamaRefineError, PreemptedError, first_line
from llamarefine_jobs.contract.recipe import Dpo, Sft
from llamarefine_jobs.models import adapters, backends
from llamarefine_jobs.process.out_of_memory import OOM_METRIC, is_out_of_memory, oom_micro_batch_rows
from llamarefine_jobs.process.world import means_lost_peer
from llamarefine_jobs.sources import locations
from llamarefine_jobs.training.batches import WholeBatches
from llamarefine_jobs.training.best_adapter import BestAdapter, damaged
from llamarefine_jobs.training.checkpoint_policy import CheckpointPolicy
from llamarefine_jobs.training.progress import TrainingProgress
from llamarefine_jobs.untrusted.pickles import refuse_pickled_code

_EVALUATIONS_A_RUN = 4

# Returns a model's figures on the validation split, including `eval_loss`, the same in every process. Raises
# PreemptedError on SIGTERM.
Validate = Callable[[Any], dict[str, float]]


def arguments(section: Sft | Dpo, context: Context, backend: backends.Backend) -> dict[str, Any]:
    """Return the trainer's settings that SFT and DPO share; TrainingCallback decides when to log, validate and save."""
    return {
        "output_dir": str(context.work / "trainer"),
        "seed": context.recipe.seed,
        "data_seed": context.recipe.seed,
        "num_train_epochs": section.epochs,
        "max_steps": section.max_steps or -1,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": section.lr_schedule,
        "warmup_steps": section.warmup_fraction,  # under 1 it is a fraction of all steps
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_gradient_norm,
        "per_device_train_batch_size": section.micro_batch_rows,
        "ddp_find_unused_parameters": False,
        "gradient_accumulation_steps": section.micro_batches,
        "gradient_checkpointing": section.gradient_checkpointing,
        "use_cpu": backend.accelerator == "cpu",
        "bf16": backend.bf16,
        "optim": "adamw_torch",
        "logging_strategy": "no",
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_nan_inf_filter": False,  # the filter would show the last good loss in place of NaN
        "report_to": [],
        "disable_tqdm": True,
    }


class _NoStepLeftError(Exception):
    """Raised to end a training whose checkpoint is at the last step, because the trainer would make one more step."""


class TrainingCallback(TrainerCallback):
    """Connects the trainer to this package: progress, validation, best adapter, checkpoints, stopping on SIGTERM."""

    def __init__(self, section: Sft | Dpo, context: Context, tokens_per_row: float, validate: Validate) -> None:
        self.section = section
        self.context = context
        self.validate = validate
        self.progress = TrainingProgress(section, context, tokens_per_row)
        self.checkpoints = CheckpointPolicy(section, context)
        self.best = BestAdapter(context.work, self.checkpoints.address)
        self.preempted = False
        self.has_begun = False  # errors before this point may come from the checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if self.context.world.is_first_on_node and any("eval_loss" in entry for entry in state.log_history):
            self.best.check(model)
        self.checkpoints.begin(state.global_step)
        self.progress.begin(state)
        self.has_begun = True
        if self._is_validation_due(state):  # SIGTERM interrupted the validation of this step
            self._validate(model, state)
        self.context.stop.defer_exit()  # from the next step on, SIGTERM saves a checkpoint first
        if state.global_step >= state.max_steps:
            raise _NoStepLeftError

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        step, last = state.global_step, state.global_step >= state.max_steps
        # The loss right after a checkpoint confirms it; without it the checkpoint would wait for the next logged loss.
        control.should_log = last or step % self.section.log_every_steps == 0 or self.checkpoints.needs_loss_of(step)
        # The processes have separate clocks and receive SIGTERM at different steps, so they must agree on both.
        is_due = self.context.world.is_first and self.checkpoints.is_due(step)
        self.preempted, is_due = self.context.world.any(self.context.stop.is_set(), is_due)
        if self._is_validation_due(state) and not self.preempted:
            try:
                self._validate(model, state)
            except PreemptedError:  # a validation may take minutes, and the checkpoint needs the grace period
                self.preempted = True
        control.should_training_stop = control.should_training_stop or self.preempted
        control.should_save = self.preempted or (is_due and not last)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if self.progress.is_diverged(loss):
            raise self._diverged(f"the loss is {loss:g}", state)
        self.progress.last_loss = loss
        self.checkpoints.confirm(state.global_step)
        self.progress.report(loss, state)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        self._check_weights(model, state)  # the loss would show it only when it is logged next
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.checkpoints.complete(state.global_step, folder, self.best, preempted=self.preempted)

    def _is_validation_due(self, state: TrainerState) -> bool:
        step, last = state.global_step, state.global_step >= state.max_steps
        every = self.section.evaluate_every_steps or max(1, state.max_steps // _EVALUATIONS_A_RUN)
        if step == 0 or not (last or step % every == 0):
            return False
        return not any(entry["step"] == step for entry in state.log_history if "eval_loss" in entry)

    def _validate(self, model: Any, state: TrainerState) -> None:
        """Validate the adapter, and keep it if it is the best so far. Raises PreemptedError on SIGTERM."""
        figures = self.validate(model)
        loss = figures["eval_loss"]
        state.log_history.append({"step": state.global_step, **figures})
        self.context.note(f"validation loss {loss:.4f} at step {state.global_step}")
        if not math.isfinite(loss):
            raise self._diverged(f"the validation loss is {loss}", state)
        if loss >= self.best.loss:
            return
        self._check_weights(model, state)  # a finite loss does not prove that the weights are finite
        self.best.replace(model, loss, state.global_step, write=self.context.world.is_first)

    def _check_weights(self, model: Any, state: TrainerState) -> None:
        if not all(bool(weight.isfinite().all()) for weight in model.parameters() if weight.requires_grad):
            raise self._diverged("the adapter holds no finite weights", state)

    def _diverged(self, what: str, state: TrainerState) -> DivergedError:
        return self.checkpoints.diverged_error(f"{what} at step {state.global_step} of {state.max_steps}")


def train(trainer: Trainer, callback: TrainingCallback, context: Context) -> None:
    """Train to the last step, from the newest checkpoint if there is one, and write the best adapter to the output.

    Raises DivergedError if a loss is too high or not finite, or a weight is not finite; PreemptedError on SIGTERM;
    IntegrityError if the checkpoint is damaged.
    """
    context.metrics[OOM_METRIC] = oom_micro_batch_rows()  # set now, for the manifests of the checkpoints too
    checkpoint = context.fetch_checkpoint()
    if checkpoint:
        refuse_pickled_code(checkpoint)
        callback.best.restore(checkpoint, context.world)
    trainer.remove_callback(PrinterCallback)  # it prints raw logs; TrainingCallback prints progress lines
    _use_plain_cpu_device(trainer)
    began_s = time.monotonic()
    try:
        with contextlib.suppress(_NoStepLeftError):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        if not isinstance(error, DivergedError):
            traceback.clear_frames(error.__traceback__)  # the frames hold the step's tensors, and memory may be short
            callback.checkpoints.upload_last_checkpoint()
        has_other_cause = isinstance(error, LlamaRefineError) or is_out_of_memory(error) or means_lost_peer(error)
        if checkpoint and not callback.has_begun and not has_other_cause:
            what = f"a training cannot resume from it ({type(error).__name__}: {first_line(error)})"
            raise damaged(callback.checkpoints.address, what) from None
        raise
    callback.checkpoints.discard_waiting()
    state, best, progress = trainer.state, callback.best, callback.progress
    if callback.preempted:
        context.world.barrier()  # if one process ended, torch would kill rank 0, which is still uploading
        raise callback.checkpoints.preempted_error or PreemptedError(f"{context.stage.name} was stopped by SIGTERM")
    if not math.isfinite(best.loss):
        raise DivergedError(f"the validation loss is {best.loss}; lower {context.stage.name}.learning_rate")
    if context.world.is_first:
        config = trainer.model.peft_config["default"]
        adapters.save_adapter(config, best.weights(), context.output / "adapter", _base_name(context))
    seconds = time.monotonic() - began_s
    context.metrics |= {
        "steps": state.global_step,
        "best_step": best.step,
        "train_loss": progress.last_loss,
        "validation_loss": best.loss,
        "train_seconds": round(seconds, 3),
        "tokens_per_s": progress.tokens_per_s(state.global_step - progress.first_step, seconds),
        "resumed_at_step": progress.first_step or None,
        "micro_batch_rows": callback.section.micro_batch_rows,
        "processes": context.world.size,
        "history": list(_history(state.log_history)),
    }
    context.note(f"kept the adapter of step {best.step}, validation loss {best.loss:.4f}")


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


def use_whole_batches(trainer: Trainer, section: Sft | Dpo, lengths: Sequence[int]) -> None:
    """Make the trainer take its rows, of `lengths` tokens, in the order of `WholeBatches`."""
    rows = len(trainer.train_dataset)
    # Flattened rows have no padding, and with one micro-batch a step the order changes no padding.
    padded = None if trainer.padding_free or section.micro_batch_rows == section.batch_rows else lengths

    def sampler(dataset: Any = None) -> WholeBatches:
        return WholeBatches(rows, section.batch_rows, trainer.args.seed, lambda: int(trainer.state.epoch or 0), padded)

    trainer._get_train_sampler = sampler


def _use_plain_cpu_device(trainer: Trainer) -> None:
    """Work around accelerate's device name `cpu:0`, which torch.load rejects when it loads the optimizer's state.

    accelerate uses that name when several processes train on a CPU.
    """
    import torch

    if trainer.args.device.type == "cpu":
        vars(trainer.args)["_setup_devices"] = torch.device("cpu")  # the cached value of `args.device`


def _base_name(context: Context) -> str | None:
    """Return the Hub id of an SFT adapter's base, for the adapter's config; None for DPO or a base without a Hub id."""
    source = context.recipe.prepare.base.source
    on_hub = context.stage.name == "sft" and locations.kind(source, hub_id_allowed=True) is locations.Kind.HUB
    return source.removeprefix("hf://") if on_hub else None


def _history(log: list[dict[str, float]]) -> Iterator[dict[str, float]]:
    """Yield the logged steps, in step order, with the names that the report reads.

    TRL's own accuracy and margin of a training batch are left out: TRL counts a tie as 0,
    report/preference.py as one half.
    """
    names = {
        "step": "step",
        "loss": "loss",
        "eval_loss": "eval_loss",
        "learning_rate": "learning_rate",
        "eval_reward_accuracy": "eval_reward_accuracy",
        "eval_reward_margin": "eval_reward_margin",
    }
    # A validation is logged before the loss of its step, but after it if SIGTERM interrupted the validation.
    for entry in sorted(log, key=lambda entry: (entry.get("step", 0), "loss" in entry)):
        row = {names[name]: value for name, value in entry.items() if name in names}
        if "loss" in row or "eval_loss" in row:
            yield row
