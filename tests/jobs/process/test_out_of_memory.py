"""Out-of-memory errors of every library are recognised, and a training can restart with smaller micro-batches."""

import errno
import resource
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llamarefine_jobs import entry
from llamarefine_jobs.contract.artifact import Manifest
from llamarefine_jobs.contract.environment import OOM_VARIABLE
from llamarefine_jobs.contract.errors import OutOfMemoryError
from llamarefine_jobs.contract.recipe import Sft
from llamarefine_jobs.models.lora import ADAPTER_WEIGHTS
from llamarefine_jobs.process import out_of_memory
from llamarefine_jobs.store import Store
from tests.jobs import processes, tiny

VOCABULARY = 60_000  # large, so that the logits need most of the memory
SPARE_BYTES = 128 << 20  # limit above what micro-batches of 8 rows need; 16 rows need several times as much more
HALVE = "sft.on_out_of_memory=halve_micro_batch"


def test_out_of_memory_errors_of_every_library_are_recognised() -> None:
    with pytest.raises(RuntimeError) as on_cpu:
        torch.empty(1 << 50)
    for error in (
        on_cpu.value,
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"),
        RuntimeError("std::bad_alloc"),
    ):
        assert out_of_memory.is_out_of_memory(error), error
        message = str(out_of_memory.out_of_memory_error("sft", error))
        assert "\n" not in message
        assert "lower sft.micro_batch_rows" in message
    assert not out_of_memory.is_out_of_memory(RuntimeError("the memory of an elephant"))


@pytest.mark.parametrize(
    ("batch_rows", "micro_batch_rows", "halved"),
    [(16, 16, 8), (16, 2, 1), (15, 5, 1), (18, 9, 3), (6, 3, 1), (16, None, 8), (18, None, 9), (15, None, 5)],
)
def test_halved_micro_batches_still_divide_the_batch(
    batch_rows: int, micro_batch_rows: int | None, halved: int
) -> None:
    section = Sft(batch_rows=batch_rows, micro_batch_rows=micro_batch_rows)
    assert out_of_memory.halved_micro_batch_rows(section) == halved


def test_a_process_without_micro_batch_rows_starts_from_its_part_of_the_batch() -> None:
    section = Sft(batch_rows=16, gpus=2)
    assert out_of_memory.halved_micro_batch_rows(section) == 4
    assert out_of_memory.with_micro_batch_below(section, [8, 4]).micro_batch_rows == 2
    assert out_of_memory.with_micro_batch_below(section, [8, 4, 2, 1]).micro_batch_rows == 1
    for too_large in ([], [16]):  # a pass of one of two processes has fewer rows anyway
        assert out_of_memory.with_micro_batch_below(section, too_large) is section


@pytest.mark.parametrize("one_row", ["sft.micro_batch_rows=1", "sft={batch_rows: 1}"])
def test_with_one_row_in_a_pass_it_fails_and_names_other_settings_to_change(
    one_row: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny.recipe(one_row, HALVE)
    with (
        pytest.raises(SystemExit) as ended,
        entry.exit_code("sft"),
        out_of_memory.halving_micro_batches("sft", recipe),
    ):
        torch.empty(1 << 50)
    assert ended.value.code == OutOfMemoryError.exit_code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "even with one row in a pass: lower max_length_tokens, set sft.gradient_checkpointing to true" in lines[0]


@pytest.mark.parametrize(("settings", "rows"), [("{batch_rows: 12}", 6), ("{batch_rows: 12, micro_batch_rows: 4}", 2)])
def test_a_process_that_runs_out_of_memory_replaces_itself_by_one_with_half_the_rows(
    settings: str, rows: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class ReplacedError(Exception):
        """Raised in place of the process's end."""

    def replace(program: str, arguments: list[str]) -> None:
        raise ReplacedError(arguments[-1])

    monkeypatch.setattr("os.execv", replace)
    monkeypatch.setenv(OOM_VARIABLE, "[]")
    recipe = tiny.recipe(f"sft={settings}", HALVE)
    with (
        pytest.raises(ReplacedError, match=f"^sft.micro_batch_rows={rows}$"),
        out_of_memory.halving_micro_batches("sft", recipe),
    ):
        torch.empty(1 << 50)
    assert capsys.readouterr().out == (
        f"sft: memory ran out with micro-batches of up to {2 * rows} rows: restarts with {rows} from the newest "
        "checkpoint; a step still has 12 rows\n"
    )
    assert out_of_memory.oom_micro_batch_rows() == [2 * rows]


def test_without_halve_micro_batch_the_error_is_raised() -> None:
    recipe = tiny.recipe()
    with pytest.raises(RuntimeError, match="can't allocate"), out_of_memory.halving_micro_batches("sft", recipe):
        torch.empty(1 << 50)


def test_a_training_out_of_memory_resumes_from_its_checkpoint_with_half_the_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # every further arena would reserve 64 MB of address space
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 20))  # memory that a step frees is returned to the system
    recipe = prepare(tmp_path)
    roomy, tight = tmp_path / "roomy", tmp_path / "tight"

    process = processes.start("sft", recipe, str(roomy), "--set", "sft.micro_batch_rows=8")
    needed_bytes, _ = follow(process)
    assert process.returncode == 0

    options = ("--set", "sft.micro_batch_rows=16", "--set", "sft.checkpoint_every_steps=1", "--set", HALVE)
    process = processes.start("sft", recipe, str(tight), *options)
    _, lines = follow(process, limit_bytes=needed_bytes + SPARE_BYTES, at_step=3)
    assert process.returncode == 0, "\n".join(lines)
    assert [line for line in lines if "memory ran out" in line] == [
        "sft: memory ran out with micro-batches of up to 16 rows: restarts with 8 from the newest checkpoint; "
        "a step still has 16 rows"
    ]

    undisturbed, halved = published(roomy), published(tight)
    assert halved.key == undisturbed.key
    assert halved.metrics["micro_batch_rows"] == 8
    assert halved.metrics["ran_out_of_memory_at_micro_batch_rows"] == [16]
    assert halved.metrics["resumed_at_step"] >= 2
    expected, found = (load_file(next(store.rglob(ADAPTER_WEIGHTS))) for store in (roomy, tight))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=0)


def prepare(folder: Path) -> Path:
    """Write a recipe file, and two stores `roomy` and `tight` with a base model with a large vocabulary."""
    prepared = tiny.write_prepared(folder / "prepared")
    tiny.make_model(VOCABULARY).save_pretrained(prepared / "base")
    changes = ("sft.batch_rows=16", "sft.max_steps=6")
    for store in ("roomy", "tight"):
        tiny.publish_prepared(Store(str(folder / store)), prepared, tiny.recipe(*changes))
    (folder / "recipe.yaml").write_text(
        tiny.RECIPE.replace("sft: {epochs: 2,", "sft: {epochs: 2, max_steps: 6,").replace(
            "micro_batch_rows: 4, batch_rows: 8", "micro_batch_rows: 4, batch_rows: 16", 1
        )
    )
    return folder / "recipe.yaml"


def follow(
    process: subprocess.Popen[str], limit_bytes: int | None = None, at_step: int | None = None
) -> tuple[int, list[str]]:
    """Return the peak address space of a process, and its lines; limit its memory when it reports step `at_step`."""
    lines, peak_bytes = [], 0
    assert process.stdout
    for line in process.stdout:
        lines.append(line.rstrip())
        peak_bytes = max(peak_bytes, peak_address_space_bytes(process.pid))
        if limit_bytes and processes.step(line) == at_step:
            resource.prlimit(process.pid, resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    process.wait(60)
    return peak_bytes, lines


def peak_address_space_bytes(pid: int) -> int:
    """Return the peak address space of a process, which is what RLIMIT_AS limits."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmPeak:"):
            return int(line.split()[1]) << 10
    return 0  # the process is exiting


def published(store: Path) -> Manifest:
    manifest: Any = next((store / "artifacts" / "sft").rglob("manifest.json"))
    return Manifest.from_bytes(manifest.read_bytes())
