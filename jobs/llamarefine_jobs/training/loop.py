"""What SFT and DPO share around their trainer: settings, progress, checkpoints, the best adapter, stopping."""

import contextlib
import json
import math
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.artifact import checkpoint_path
from llamarefine_jobs.contract.errors import DataError, DivergedError, LlamaRefineError, PreemptedError, first_line
from llamarefine_jobs.contract.recipe import Dpo, Sft
from llamarefine_jobs.models import adapters, backends
from llamarefine_jobs.models.lora import ADAPTER_WEIGHTS
from llamarefine_jobs.process import sigterm
from llamarefine_jobs.process.out_of_memory import OOM_METRIC, is_out_of_memory, oom_micro_batch_rows
from llamarefine_jobs.process.world import means_lost_peer
from llamarefine_jobs.sources import locations
from llamarefine_jobs.training.batches import WholeBatches
from llamarefine_jobs.training.best_adapter import check_best, damaged, read_best
from llamarefine_jobs.training.checkpoints import Checkpoint, Checkpoints
from llamarefine_jobs.untrusted.pickles import refuse_pickled_code

_EVALUATIONS_A_RUN = 4
_BEST = "best"
_HOPELESS = 4.0  # nats over where it began: 55 times less likely, token by token; batches differ by tenths

# The figures of the validation split for a model, `eval_loss` among them, the same in every process; or PreemptedError.
Validate = Callable[[Any], dict[str, float]]


def arguments(section: Sft | Dpo, context: Context, backend: backends.Backend) -> dict[str, Any]:
    """The trainer's settings that SFT and DPO share. When to log, evaluate and save is `Watch`'s to say."""
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
        "logging_nan_inf_filter": False,  # it would hide a diverging loss behind the last good one
        "report_to": [],
        "disable_tqdm": True,
    }


class _NoStepLeftError(Exception):
    """The checkpoint is that of the last step; the trainer would take one more."""


class Watch(TrainerCallback):
    """Follows a training: reports, evaluates, keeps the best adapter, publishes checkpoints, stops on request.

    The best adapter is the one of the lowest validation loss. It travels inside the checkpoints, so
    a training that was killed and goes on ends with the same one.
    """

    def __init__(self, section: Sft | Dpo, context: Context, tokens_per_row: float, validate: Validate) -> None:
        self.section = section
        self.context = context
        self.tokens_per_row = tokens_per_row
        self.validate = validate
        self.best = context.work / _BEST
        self.best_loss = math.inf
        self.best_step = 0
        self.first_loss: float | None = None
        self.last_loss: float | None = None
        self.preempted = False
        self.farewell: PreemptedError | None = None  # what the first process ends with where it was preempted
        self.checkpoints = Checkpoints(context.store, context.note)
        self.has_begun = False
        self.saved_step: int | None = None
        self.proved = False  # some loss of this process was good
        self.unproved: Checkpoint | None = None  # no loss computed with its weights was seen yet

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self.first_step = state.global_step
        self.checkpoints.newest_step = state.global_step or None
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        if losses:  # of the pods before this one
            self.first_loss, self.last_loss = float(losses[0]), float(losses[-1])
        if self.context.world.is_first_on_node and any("eval_loss" in entry for entry in state.log_history):
            check_best(self.best, adapters.adapter_state(model), self.where)
        self.began_s = self.saved_s = time.monotonic()
        self.context.progress(state.global_step, state.max_steps)
        self.has_begun = True  # what goes wrong from here on is not what the checkpoint holds
        if self._is_judgement_due(state):  # SIGTERM came before the validation of this step was over
            self._judge(model, state)
        self.context.stop.defer_exit()  # what the next step changes is worth a checkpoint
        if state.global_step >= state.max_steps:
            raise _NoStepLeftError

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        step, last = state.global_step, state.global_step >= state.max_steps
        # The loss right after a checkpoint proves it, or it would wait for the next one that is logged.
        control.should_log = last or step % self.section.log_every_steps == 0 or step - 1 == self.saved_step
        # Processes have clocks of their own and hear of a SIGTERM at different steps: they agree.
        is_due = self.context.world.is_first and self._is_checkpoint_due(step)
        self.preempted, is_due = self.context.world.any(self.context.stop.is_set(), is_due)
        if self._is_judgement_due(state) and not self.preempted:
            try:
                self._judge(model, state)
            except PreemptedError:  # it may take minutes, and the grace period is for the checkpoint
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
        self.first_loss = loss if self.first_loss is None else self.first_loss
        if not loss < self.first_loss + _HOPELESS:  # nor is NaN
            raise self.diverged(f"the loss is {loss:g} at step {state.global_step} of {state.max_steps}")
        self.last_loss, self.proved = loss, True
        if self.unproved and state.global_step > self.unproved.step:
            self.hand_over()
        seconds = time.monotonic() - self.began_s
        steps = max(1, state.global_step - self.first_step)
        self.context.progress(
            state.global_step,
            state.max_steps,
            loss=loss,
            tokens_per_s=round(steps * self.section.batch_rows * self.tokens_per_row / seconds, 1),
            eta_s=round((state.max_steps - state.global_step) * seconds / steps, 1),
        )

    def _is_judgement_due(self, state: TrainerState) -> bool:
        step, last = state.global_step, state.global_step >= state.max_steps
        every = self.section.evaluate_every_steps or max(1, state.max_steps // _EVALUATIONS_A_RUN)
        if step == 0 or not (last or step % every == 0):
            return False
        return not any(entry["step"] == step for entry in state.log_history if "eval_loss" in entry)

    def _judge(self, model: Any, state: TrainerState) -> None:
        """Measure the validation split, and keep the adapter where it is the best so far; PreemptedError on SIGTERM."""
        figures = self.validate(model)
        loss = figures["eval_loss"]
        state.log_history.append({"step": state.global_step, **figures})
        self.context.note(f"validation loss {loss:.4f} at step {state.global_step}")
        if not math.isfinite(loss):
            raise self.diverged(f"the validation loss is {loss} at step {state.global_step} of {state.max_steps}")
        if loss >= self.best_loss:
            return
        self._check_weights(model, state)  # a loss that is good though they are no numbers was computed without them
        self.best_loss, self.best_step = loss, state.global_step
        if self.context.world.is_first:
            from safetensors.torch import save_file

            self.best.mkdir(exist_ok=True)
            save_file(adapters.adapter_state(model), self.best / ADAPTER_WEIGHTS, metadata={"format": "pt"})
            (self.best / "best.json").write_text(json.dumps({"loss": loss, "step": state.global_step}))

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        self._check_weights(model, state)  # the loss says so only when it is logged next
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        # Each process left the state of its random numbers in its own folder, and maybe on another machine.
        for states in self.context.world.gather({file.name: file.read_bytes() for file in folder.glob("rng_state*")}):
            for name, state_of_one in states.items():
                (folder / name).write_bytes(state_of_one)
        if self.context.world.is_first:
            self._keep(state.global_step, folder)
        else:
            shutil.rmtree(folder)
        self.saved_s, self.saved_step = time.monotonic(), state.global_step

    def resume(self, checkpoint: Path) -> None:
        """Take the best adapter out of a checkpoint: left there, the trainer would load it as a second adapter."""
        there = (checkpoint / _BEST).exists()
        if there:
            self.best_loss, self.best_step = read_best(checkpoint / _BEST, self.where)
        self.context.world.barrier()
        if there and self.context.world.is_first_on_node:
            shutil.move(checkpoint / _BEST, self.best)
        self.context.world.barrier()

    def _check_weights(self, model: Any, state: TrainerState) -> None:
        if not all(bool(weight.isfinite().all()) for weight in model.parameters() if weight.requires_grad):
            raise self.diverged(f"the adapter holds no finite weights at step {state.global_step} of {state.max_steps}")

    def _keep(self, step: int, folder: Path) -> None:
        """Complete a checkpoint: one on request goes to the store now, another once a later loss has proved it."""
        if self.best.exists():
            shutil.copytree(self.best, folder / _BEST)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, and nothing needs it to go on
        checkpoint = Checkpoint(step, folder, self.context.draft())
        if self.preempted:
            self._save_on_request(checkpoint)
            return
        if self.unproved:
            shutil.rmtree(self.unproved.folder)
        self.unproved = checkpoint

    def _save_on_request(self, checkpoint: Checkpoint) -> None:
        """Have the checkpoint in the store, or say why it is not: the training was told to stop either way."""
        saved = f"its checkpoint at step {checkpoint.step}"
        self.context.note(f"told to stop: {saved} goes to the store")
        # The last word where the grace period ends before the upload: the store is away, or slow.
        sigterm.write_termination_message(
            self.context.stage.name, self.preemption(f"{saved} did not reach the store in time")
        )
        try:
            self.checkpoints.publish(checkpoint)
        except LlamaRefineError as error:
            self.farewell = self.preemption(f"{saved} is not in the store ({error})")
        else:
            self.farewell = self.preemption(f"{saved} is in the store")

    def preemption(self, what: str) -> PreemptedError:
        """The error that says where the next pod goes on."""
        step = self.checkpoints.newest_step
        rest = f"goes on from step {step}" if step else "begins again"
        return PreemptedError(f"{self.context.stage.name} was told to stop; {what}, and the same command {rest}")

    def hand_over(self) -> None:
        """Let the newest checkpoint go to the store, beside the training."""
        if self.unproved:
            self.checkpoints.offer(self.unproved)
        self.unproved = None

    def upload_last_checkpoint(self) -> None:
        """Bring the newest checkpoint to the store where that goes; what ended the training is told in any case."""
        try:
            self.hand_over()
            self.checkpoints.settle()
        except Exception as error:  # without memory not even a thread starts
            self.context.note(f"the newest checkpoint is not in the store: {error}")

    def diverged(self, what: str) -> DivergedError:
        """The error that names the last good checkpoint: of those in the store each was followed by a good loss."""
        self.checkpoints.settle()
        self.context.world.barrier()  # the end of another process would end the one that still uploads
        step, stage = self.checkpoints.newest_step, self.context.stage.name
        good = "no checkpoint was written before"
        if step is not None:
            where = f"{self.context.store.uri}/{checkpoint_path(stage, self.context.key, step)}"
            good = f"the last good checkpoint is that of step {step}, {where}"
            good += "" if self.proved else " (its weights are finite, but no loss with them was seen yet)"
        return DivergedError(f"{what}; lower {stage}.learning_rate (now {self.section.learning_rate:g}); {good}")

    @property
    def where(self) -> str:
        """The place of the training's checkpoints."""
        return f"{self.context.store.uri}/{checkpoint_path(self.context.stage.name, self.context.key)}"

    def _is_checkpoint_due(self, step: int) -> bool:
        every_steps, every_s = self.section.checkpoint_every_steps, self.section.checkpoint_every_s
        return bool(
            (every_steps and step % every_steps == 0) or (every_s and time.monotonic() - self.saved_s >= every_s)
        )


def train(trainer: Trainer, watch: Watch, context: Context) -> None:
    """Train to the end, from the newest checkpoint where there is one, and leave the best adapter in the output."""
    context.metrics[OOM_METRIC] = oom_micro_batch_rows()  # for the checkpoints' manifests, too
    checkpoint = context.fetch_checkpoint()
    if checkpoint:
        refuse_pickled_code(checkpoint)
        watch.resume(checkpoint)
    trainer.remove_callback(PrinterCallback)  # it prints raw logs; `Watch` reports
    _settle_device(trainer)
    began_s = time.monotonic()
    try:
        with contextlib.suppress(_NoStepLeftError):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        if not isinstance(error, DivergedError):
            traceback.clear_frames(error.__traceback__)  # they hold the step's tensors, and memory may be short
            watch.upload_last_checkpoint()
        has_other_cause = isinstance(error, LlamaRefineError) or is_out_of_memory(error) or means_lost_peer(error)
        if checkpoint and not watch.has_begun and not has_other_cause:
            what = f"a training cannot go on from it ({type(error).__name__}: {first_line(error)})"
            raise damaged(watch.where, what) from None
        raise
    watch.checkpoints.abandon()
    state = trainer.state
    if watch.preempted:
        context.world.barrier()  # the first process publishes the checkpoint; the end of another one would end it too
        raise watch.farewell or PreemptedError(f"{context.stage.name} was told to stop")
    if not math.isfinite(watch.best_loss):
        raise DivergedError(f"the validation loss is {watch.best_loss}; lower {context.stage.name}.learning_rate")
    if context.world.is_first:
        _save_best(trainer, watch, context)
    seconds = time.monotonic() - began_s
    steps = state.global_step - watch.first_step
    context.metrics |= {
        "steps": state.global_step,
        "best_step": watch.best_step,
        "train_loss": watch.last_loss,
        "validation_loss": watch.best_loss,
        "train_seconds": round(seconds, 3),
        "tokens_per_s": round(steps * watch.section.batch_rows * watch.tokens_per_row / seconds, 1),
        "resumed_at_step": watch.first_step or None,
        "micro_batch_rows": watch.section.micro_batch_rows,
        "processes": context.world.size,
        "history": list(_history(state.log_history)),
    }
    context.note(f"kept the adapter of step {watch.best_step}, validation loss {watch.best_loss:.4f}")


def set_token_ids(model: Any, tokenizer: Any) -> Any:
    """Let the model's configuration name the tokenizer's EOS and pad tokens; refuse a vocabulary that is too small."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise DataError(f"the tokenizer has {len(tokenizer)} tokens, the base {rows}; they do not belong together")
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return model


def use_whole_batches(trainer: Trainer, section: Sft | Dpo, lengths: Sequence[int]) -> None:
    """Let the trainer take its rows, of `lengths` tokens, in our order: `WholeBatches` says why."""
    rows = len(trainer.train_dataset)
    # Flattened rows are not padded, and a step of one micro batch is padded as one.
    padded = None if trainer.padding_free or section.micro_batch_rows == section.batch_rows else lengths

    def sampler(dataset: Any = None) -> WholeBatches:
        return WholeBatches(rows, section.batch_rows, trainer.args.seed, lambda: int(trainer.state.epoch or 0), padded)

    trainer._get_train_sampler = sampler


def _settle_device(trainer: Trainer) -> None:
    """Let an optimizer's state be loaded: accelerate calls the CPU of one of several processes `cpu:0`, and torch.load
    knows only `cpu`."""
    import torch

    if trainer.args.device.type == "cpu":
        vars(trainer.args)["_setup_devices"] = torch.device("cpu")  # what `args.device` was worked out to be


def _save_best(trainer: Trainer, watch: Watch, context: Context) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    state = load_file(watch.best / ADAPTER_WEIGHTS)
    set_peft_model_state_dict(trainer.model, state)
    config = trainer.model.peft_config["default"]
    adapters.save_adapter(config, state, context.output / "adapter", _base_name(context))


def _base_name(context: Context) -> str | None:
    """The Hub's name of the base, for whoever loads the adapter elsewhere; None where it has none."""
    source = context.recipe.prepare.base.source
    known = context.stage.name == "sft" and locations.kind(source, hub_id_allowed=True) is locations.Kind.HUB
    return source.removeprefix("hf://") if known else None


def _history(log: list[dict[str, float]]) -> Iterator[dict[str, float]]:
    """The logged steps in the names that the report draws."""
    names = {
        "step": "step",
        "loss": "loss",
        "eval_loss": "eval_loss",
        "learning_rate": "learning_rate",
        "rewards/accuracies": "reward_accuracy",
        "rewards/margins": "reward_margin",
        "eval_reward_accuracy": "eval_reward_accuracy",
        "eval_reward_margin": "eval_reward_margin",
    }
    # A validation that SIGTERM cut short comes after its step's loss; elsewhere it comes before.
    for entry in sorted(log, key=lambda entry: (entry.get("step", 0), "loss" in entry)):
        row = {names[name]: value for name, value in entry.items() if name in names}
        if "loss" in row or "eval_loss" in row:
            yield row
