"""A checkpoint that an attacker wrote to the bucket, with a valid manifest, runs no code."""

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from llamarefine_jobs.contract.artifact import Manifest
from llamarefine_jobs.contract.errors import IntegrityError
from llamarefine_jobs.store import Store
from llamarefine_jobs.untrusted.pickles import refuse_pickled_code

from ..jobs import processes, tiny


class Evil:
    """An object whose pickle creates `marker` when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def poison(path: Path, marker: Path) -> None:
    import torch

    torch.save({"state": Evil(marker), "param_groups": []}, path)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "nested/rng_state_1.pth"])
def test_a_pickle_with_code_is_refused_and_not_executed(name: str, tmp_path: Path) -> None:
    import torch

    folder, marker = tmp_path / "checkpoint", tmp_path / "owned"
    (folder / name).parent.mkdir(parents=True)
    poison(folder / name, marker)
    with pytest.raises(IntegrityError, match=r"more than tensors.*find out who wrote it"):
        refuse_pickled_code(folder)
    assert not marker.exists()
    torch.load(folder / name, weights_only=False)
    assert marker.exists(), "the pickle is a real attack: loaded without protection, it runs"


@pytest.mark.parametrize(
    "name", ["training_args.bin", "pytorch_model.bin", "a.py", "a.zip", "a.so", "model.pkl", "noending"]
)
def test_a_file_type_that_no_checkpoint_has_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(IntegrityError, match=name):
        refuse_pickled_code(tmp_path)


@pytest.mark.parametrize("override", ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_no_environment_variable_disables_the_check(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(override, "1")
    poison(tmp_path / "optimizer.pt", tmp_path / "owned")
    with pytest.raises(IntegrityError):
        refuse_pickled_code(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_training_stops_at_a_poisoned_checkpoint_and_names_the_file(tmp_path: Path) -> None:
    """Run sft on its own checkpoint after the optimizer state was replaced and published with a valid manifest."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny.RECIPE)
    store = Store(str(tmp_path / "store"))
    tiny.publish_prepared(store, tiny.write_prepared(tmp_path / "prepared"), tiny.recipe())
    process = processes.start("sft", recipe, str(tmp_path / "store"))
    processes.signal_when(process, signal.SIGTERM, lambda line: processes.step(line) == 3)
    assert process.returncode == 30
    key = next((tmp_path / "store/checkpoints/sft").iterdir()).name
    step = store.fetch_checkpoint("sft", key, tmp_path / "resume")
    assert step
    manifest_path = next((tmp_path / "store/checkpoints/sft" / key).rglob("manifest.json"))
    manifest = Manifest.from_bytes(manifest_path.read_bytes())
    poison(tmp_path / "resume/optimizer.pt", tmp_path / "owned")
    shutil.rmtree(manifest_path.parent)
    store.publish_checkpoint(step, tmp_path / "resume", manifest.model_copy(update={"files": ()}))
    exit_code, lines = processes.run("sft", recipe, str(tmp_path / "store"))
    assert exit_code == 16, "\n".join(lines)
    assert "optimizer.pt is more than tensors" in lines[-1]
    assert not (tmp_path / "owned").exists()
    assert not list((tmp_path / "store").glob("artifacts/sft/*/manifest.json"))
