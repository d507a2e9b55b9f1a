"""A checkpoint that an attacker wrote to the bucket, with a valid manifest, runs no code; damage is one line."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamarefine_jobs import dpo, sft
from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.artifact import artifact_key
from llamarefine_jobs.contract.errors import IntegrityError, PreemptedError
from llamarefine_jobs.contract.stages import STAGES
from llamarefine_jobs.process.sigterm import Stop
from llamarefine_jobs.store import Store

from ..jobs import processes, tiny

STEP = 6
WORK = {"sft": sft.work, "dpo": dpo.work}
STATE, OPTIMIZER, ADAPTER = "training_state.json", "optimizer.safetensors", "adapter_model.safetensors"
REFERENCE, BEST, BEST_ADAPTER = "reference_logprobs.safetensors", "best/best.json", f"best/{ADAPTER}"
# Names that transformers' trainer, peft, torch or Python would read, or that earlier versions of LlamaRefine wrote.
PICKLES = (
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_1.pth", "training_args.bin", "adapter_model.bin",
    "pytorch_model.bin", "optimizer.safetensors.pt", "model.pkl", "best/adapter_model.bin",
)  # fmt: skip


class Evil:
    """An object whose pickle creates `marker` when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def poison(path: Path, marker: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state": Evil(marker), "param_groups": []}, path)


class Trained:
    """A store with the parents of both trainings, the files of a checkpoint of each, and the bytes of its artifact."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.recipe = folder, tiny.recipe()
        self.store = Store(str(folder / "store"))
        prepared = tiny.write_prepared(folder / "prepared")
        self.parents = {"prepare": tiny.publish_prepared(self.store, prepared, self.recipe)}
        self.inputs = {"prepare": prepared}
        self.drafts: dict[str, Any] = {}
        self.adapters: dict[str, bytes] = {}
        for stage in ("sft", "dpo"):
            self._stop_at_checkpoint(stage)
            finished = self.context(stage, folder / f"{stage}-whole")
            WORK[stage](finished)
            self.adapters[stage] = (finished.output / "adapter" / ADAPTER).read_bytes()
            if stage == "sft":
                parents = {"prepare": self.parents["prepare"]}
                self.parents["sft"] = tiny.publish(self.store, finished.output, "sft", self.recipe, parents)
                self.inputs["sft"] = finished.output

    def context(self, stage: str, folder: Path, checkpoint: Path | None = None) -> Context:
        """Return a context whose store has only the checkpoint in a folder, published with a valid manifest."""
        parents = {name: self.parents[name] for name in STAGES[stage].reads}
        (folder / "output").mkdir(parents=True)
        context = Context(
            stage=STAGES[stage],
            recipe=self.recipe,
            store=Store(str(folder / "store")),
            key=artifact_key(stage, self.recipe, parents),
            parents=parents,
            inputs=self.inputs,
            output=folder / "output",
            work=folder,
            started_at=datetime.now(UTC),
            stop=Stop(),
        )
        if checkpoint:
            context.store.publish_checkpoint(STEP, checkpoint, self.drafts[stage])
        return context

    def copy(self, stage: str, folder: Path) -> Path:
        """Return a copy of the checkpoint's files."""
        return Path(shutil.copytree(self.folder / f"{stage}-checkpoint", folder / "checkpoint"))

    def _stop_at_checkpoint(self, stage: str) -> None:
        from llamarefine_jobs.training import loop

        original = loop.Trainer.after_step

        def after_step(trainer: loop.Trainer) -> bool:
            if trainer.state.step == STEP:
                trainer.context.stop.set()
            return original(trainer)

        context = self.context(stage, self.folder / f"{stage}-stopped")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.Trainer, "after_step", after_step)
            with pytest.raises(PreemptedError):
                WORK[stage](context)
        self.drafts[stage] = context.draft()
        assert context.store.fetch_checkpoint(stage, context.key, self.folder / f"{stage}-checkpoint") == STEP


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_training_never_opens_a_pickle_and_ends_with_the_same_bytes(
    stage: str, trained: Trained, tmp_path: Path
) -> None:
    marker, checkpoint = tmp_path / "owned", trained.copy(stage, tmp_path)
    for name in PICKLES:
        poison(checkpoint / name, marker)
    (checkpoint / "sitecustomize.py").write_text(f"open({str(marker)!r}, 'w')")
    context = trained.context(stage, tmp_path / "resumed", checkpoint)
    WORK[stage](context)
    assert not marker.exists()
    assert context.metrics["resumed_at_step"] == STEP
    assert (context.output / "adapter" / ADAPTER).read_bytes() == trained.adapters[stage]
    published = {path.name for path in context.output.rglob("*") if path.is_file()}
    assert published == {ADAPTER, "adapter_config.json"}
    torch.load(checkpoint / PICKLES[0], weights_only=False)
    assert marker.exists(), "the pickle is a real attack: loaded without protection, it runs"


def test_no_foreign_file_gets_into_the_next_checkpoint(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamarefine_jobs.training import loop

    checkpoint = trained.copy("sft", tmp_path)
    poison(checkpoint / "optimizer.pt", tmp_path / "owned")
    poison(checkpoint / "best" / "adapter_model.bin", tmp_path / "owned")
    context = trained.context("sft", tmp_path / "resumed", checkpoint)
    written: list[set[str]] = []
    original = loop.CheckpointPolicy.complete

    def complete(policy: Any, step: int, folder: Path, best: Any, *, preempted: bool) -> None:
        best.copy_to_checkpoint(folder)
        written.append({path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()})
        shutil.rmtree(folder / "best")
        original(policy, step, folder, best, preempted=preempted)

    monkeypatch.setattr(loop.CheckpointPolicy, "complete", complete)
    often = context.recipe.sft.model_copy(update={"checkpoint_every_steps": 2})
    sft.work(replace(context, recipe=context.recipe.model_copy(update={"sft": often})))
    assert len(written) == 4
    ours = {STATE, OPTIMIZER, ADAPTER, "adapter_config.json", BEST, BEST_ADAPTER}
    assert all(files == ours for files in written), written


def change_state(**changed: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        state = json.loads((folder / STATE).read_text())
        (folder / STATE).write_text(json.dumps(state | changed))

    return change


def change_tensors(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Return a function that lets `change` alter the tensors of a file, or return other ones."""

    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / name)
        save_file(change(tensors) or tensors, folder / name)

    return rewrite


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def fill(value: float, words: str = "") -> Callable[[dict[str, Any]], None]:
    """Return a function that sets one number of the first tensor with these words in its name."""

    def change(tensors: dict[str, Any]) -> None:
        tensors[next(name for name in sorted(tensors) if words in name)].view(-1)[0] = value

    return change


def drop_one(tensors: dict[str, Any]) -> None:
    del tensors[min(tensors)]


def reshape_one(tensors: dict[str, Any]) -> None:
    tensors[min(tensors)] = tensors[min(tensors)].T.contiguous()


DAMAGES: list[tuple[str, str, Callable[[Path], Any], str]] = [
    ("sft", "no state", lambda it: (it / STATE).unlink(), f"it has no {STATE}: an earlier version"),
    ("sft", "no optimizer", lambda it: (it / OPTIMIZER).unlink(), f"it has no {OPTIMIZER}: an earlier version"),
    ("sft", "no adapter", lambda it: (it / ADAPTER).unlink(), f"it has no {ADAPTER}: an earlier version"),
    ("dpo", "no reference", lambda it: (it / REFERENCE).unlink(), f"it has no {REFERENCE}: an earlier version"),
    ("sft", "deep JSON", write(STATE, b"[" * 100_000), "nested too deeply"),
    ("sft", "deep object", write(STATE, b'{"a":' * 100_000), "nested too deeply"),
    ("sft", "not JSON", write(STATE, b"\x80\x04\x95pickle"), "is not JSON"),
    ("sft", "a list", write(STATE, b"[]"), "holds no JSON object"),
    ("sft", "another step", change_state(step=STEP + 1), "state is of step 6, expected 7"),
    ("sft", "step 0", change_state(step=0), "it is of step 0 of 16"),
    ("sft", "a step after the last", change_state(step=17), "it is of step 17 of 16"),
    ("sft", "other steps", change_state(steps=17), "it is of step 6 of 17"),
    ("sft", "a huge step", change_state(step=10**30), "it is of step 1000000"),
    ("sft", "a step of words", change_state(step="6\n6"), "it is of step"),
    ("sft", "a history with NaN", change_state(history=[{"step": 1, "loss": float("nan")}]), "its history is not"),
    ("sft", "a history without steps", change_state(history=[{"loss": 1.0}]), "its history is not"),
    ("sft", "a history of words", change_state(history="loss"), "its history is not"),
    ("sft", "a huge loss", change_state(history=[{"step": 1, "loss": 10**400}]), "a training cannot resume"),
    ("sft", "no safetensors", write(OPTIMIZER, b"\x80\x02}q\x00."), "a training cannot resume from it (ValueError"),
    ("sft", "a cut file", lambda it: (it / ADAPTER).write_bytes((it / ADAPTER).read_bytes()[:-4]), "cannot resume"),
    ("sft", "a huge header", write(ADAPTER, b"\xff" * 7 + b"\x7f" + b"{}"), "cannot resume"),
    ("sft", "NaN in the optimizer", change_tensors(OPTIMIZER, fill(float("nan"))), "holds NaN or infinity"),
    ("sft", "infinity in the adapter", change_tensors(ADAPTER, fill(float("inf"))), "its adapter holds NaN"),
    ("sft", "negative squares", change_tensors(OPTIMIZER, fill(-1.0, "exp_avg_sq")), "negative squares"),
    ("sft", "a moment missing", change_tensors(OPTIMIZER, drop_one), "is of another adapter"),
    ("sft", "a weight missing", change_tensors(ADAPTER, drop_one), "has other weights"),
    ("sft", "other shapes", change_tensors(ADAPTER, reshape_one), "has other weights"),
    ("sft", "other moments", change_tensors(OPTIMIZER, reshape_one), "is of another adapter"),
    ("sft", "NaN in the best", change_tensors(BEST_ADAPTER, fill(float("nan"))), "best adapter contains NaN"),
    ("sft", "no best adapter", lambda it: shutil.rmtree(it / "best"), "the best adapter is missing"),
    ("sft", "best is a file", lambda it: (shutil.rmtree(it / "best"), write("best", b"x")(it)), "best.json cannot be"),
    ("sft", "a deep best.json", write(BEST, b"[" * 100_000), "its best.json cannot be read"),
    ("dpo", "NaN in the reference", change_tensors(REFERENCE, fill(float("nan"))), "two finite numbers for each"),
    ("dpo", "too few pairs", change_tensors(REFERENCE, lambda it: {"nats": it["nats"][:-1].clone()}), "60 pairs"),
    ("dpo", "other names", change_tensors(REFERENCE, lambda it: {"other": it["nats"]}), "cannot be read (KeyError)"),
    ("dpo", "no tensors", write(REFERENCE, b"PK\x03\x04"), "cannot be read (SafetensorError)"),
]


@pytest.mark.parametrize(("stage", "name", "damage", "message"), DAMAGES, ids=[case[1] for case in DAMAGES])
def test_a_damaged_checkpoint_with_a_valid_manifest_is_refused_in_one_line(
    stage: str, name: str, damage: Callable[[Path], Any], message: str, trained: Trained, tmp_path: Path
) -> None:
    checkpoint = trained.copy(stage, tmp_path)
    damage(checkpoint)
    context = trained.context(stage, tmp_path / "resumed", checkpoint)
    with pytest.raises(IntegrityError) as refused:
        WORK[stage](context)
    text = str(refused.value)
    assert message in text
    assert "\n" not in text
    assert len(text) < 600
    assert text.startswith(f"the checkpoint under {context.store.uri}/checkpoints/{stage}/{context.key} is damaged: ")
    assert text.endswith("; remove it, and the training starts from the beginning")
    assert not list(context.output.iterdir())
    assert context.store.fetch_checkpoint(stage, context.key, tmp_path / "again") == STEP, "it was removed"


def test_a_stage_ends_with_exit_code_16_at_a_checkpoint_of_pickles(trained: Trained, tmp_path: Path) -> None:
    """The files of the version before this one, all of them poisoned: adapter, optimizer, schedule, random state."""
    recipe, marker = tmp_path / "recipe.yaml", tmp_path / "owned"
    recipe.write_text(tiny.RECIPE)
    shutil.copytree(trained.folder / "store", tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "artifacts" / "sft")
    old = tmp_path / "old"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin"):
        poison(old / name, marker)
    (old / "trainer_state.json").write_text(json.dumps({"global_step": STEP, "max_steps": 16, "log_history": []}))
    Store(str(tmp_path / "store")).publish_checkpoint(STEP, old, trained.drafts["sft"])
    exit_code, lines = processes.run("sft", recipe, str(tmp_path / "store"))
    assert exit_code == IntegrityError.exit_code == 16, "\n".join(lines)
    assert f"it has no {STATE}: an earlier version of LlamaRefine wrote it, or it is incomplete" in lines[-1]
    assert "remove it, and the training starts from the beginning" in lines[-1]
    assert "Traceback" not in "\n".join(lines)
    assert not marker.exists()
    assert not list((tmp_path / "store").glob("artifacts/sft/*/manifest.json"))
