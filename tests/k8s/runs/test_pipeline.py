"""The loop over the stages: what runs, what is reused, what stops it. Stages are fake, their artifacts are real."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from llamarefine_jobs.contract.environment import BUCKET_KEYS
from llamarefine_jobs.contract.errors import (
    DivergedError,
    IntegrityError,
    LlamaRefineError,
    PreemptedError,
    StoreError,
    all_errors,
)
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.retry import RetryPolicy
from llamarefine_jobs.contract.stages import SEQUENCE
from llamarefine_jobs.store import Store
from llamarefine_k8s.runs.pipeline import InterruptedRunError, Pipeline, Task
from llamarefine_k8s.runs.records import RunRecord, find
from tests import s3_server
from tests.k8s.acting import FakeExecutor, fail


class RecordingObserver:
    """An observer that keeps every record and note."""

    def __init__(self) -> None:
        self.records: list[RunRecord] = []
        self.notes: list[tuple[str, str]] = []

    def show(self, record: RunRecord) -> None:
        self.records.append(record)

    def note(self, stage: str, text: str) -> None:
        self.notes.append((stage, text))


def drive(
    recipe: Recipe, store: Store, executor: FakeExecutor | None = None, observer: RecordingObserver | None = None
) -> list[str]:
    """Drive a run; return the stages that ran."""
    executor = executor or FakeExecutor()
    Pipeline(recipe, store, executor, observer or RecordingObserver(), retry_after_s=(0.01, 0.01)).drive()
    return executor.ran


def manifests(store: Store, stage: str) -> list[Path]:
    return sorted(Path(store.objects.root).glob(f"artifacts/{stage}/*/manifest.json"))


def test_a_resumed_stage_does_not_show_the_progress_of_the_earlier_drive(
    recipe: Callable[..., Recipe], store: Store
) -> None:
    """It may have got further than the checkpoint from which the stage resumes."""

    def interrupted(on_line: Callable[[str], None]) -> None:
        on_line("progress stage=sft step=350 steps=400")
        raise PreemptedError("sft saved a checkpoint at step 200")

    with pytest.raises(PreemptedError):
        drive(recipe(), store, FakeExecutor(sft=interrupted))
    left = find(store, None).stages["sft"]
    assert left.progress
    assert left.error
    observer = RecordingObserver()
    drive(recipe(), store, FakeExecutor(sft=lambda on_line: on_line("progress stage=sft step=201 steps=400")), observer)
    running = [record.stages["sft"] for record in observer.records if record.stages["sft"].state == "running"]
    assert running[0].progress is None
    assert {stage.progress.step for stage in running if stage.progress} == {201}
    assert {(stage.finished_at, stage.error) for stage in running} == {(None, None)}


def test_every_stage_runs_once_in_sequence(recipe: Callable[..., Recipe], store: Store) -> None:
    assert drive(recipe(), store) == list(SEQUENCE)
    assert drive(recipe(), store) == []
    record = find(store, None)
    assert record.state == "done"
    assert {stage.state for stage in record.stages.values()} == {"reused"}


@pytest.mark.parametrize(
    ("change", "due"),
    [
        ("dpo.beta=0.2", ["dpo", "merge", "evaluate"]),
        ("merge.dtype=float32", ["merge", "evaluate"]),
        ("evaluate.generated_rows=3", ["evaluate"]),
        ("seed=7", list(SEQUENCE)),
        ("sft.log_every_steps=1", []),
        ("infer.temperature=0.5", []),
        ("name=another", []),
    ],
)
def test_a_changed_recipe_runs_only_the_stages_that_depend_on_the_change(
    recipe: Callable[..., Recipe], store: Store, change: str, due: list[str]
) -> None:
    drive(recipe(), store)
    assert drive(recipe(change), store) == due


def test_returning_to_an_earlier_recipe_runs_nothing(recipe: Callable[..., Recipe], store: Store) -> None:
    drive(recipe(), store)
    drive(recipe("dpo.beta=0.2"), store)
    assert drive(recipe(), store) == []


def test_an_artifact_without_its_manifest_is_made_again(recipe: Callable[..., Recipe], store: Store) -> None:
    drive(recipe(), store)
    manifests(store, "sft")[0].unlink()
    assert drive(recipe(), store) == ["sft"], "it made the same bytes again, so no later stage is due"


@pytest.mark.parametrize("stage", SEQUENCE)
def test_a_flipped_bit_in_an_existing_artifact_is_reported(
    recipe: Callable[..., Recipe], store: Store, stage: str
) -> None:
    drive(recipe(), store)
    for file in manifests(store, stage)[0].parent.rglob("*"):
        if file.is_dir():
            continue
        data = file.read_bytes()
        file.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
        executor = FakeExecutor()
        with pytest.raises(IntegrityError) as caught:
            drive(recipe(), store, executor)
        assert file.name in str(caught.value)
        assert executor.ran == []
        file.write_bytes(data)
    assert drive(recipe(), store) == []


def test_a_message_of_a_stage_is_shown_once_and_every_line_is_logged(
    recipe: Callable[..., Recipe], store: Store
) -> None:
    def log_lines(on_line: Callable[[str], None]) -> None:
        on_line("sft: packing is off")
        on_line("sft: packing is off")
        on_line("UserWarning: of a library")
        on_line("progress stage=sft step=2 steps=4 loss=3.5 tokens_per_s=100 eta_s=1")

    observer = RecordingObserver()
    drive(recipe(), store, FakeExecutor(sft=log_lines), observer)
    assert observer.notes == [("prepare", "backend: acting"), ("sft", "packing is off")]
    log = store.read(f"runs/{find(store, None).run}/logs/sft.log")
    assert log is not None
    assert log.decode().splitlines()[-4:-1] == [
        "sft: packing is off",
        "sft: packing is off",
        "UserWarning: of a library",
    ]
    progress = find(store, None).stages["sft"].progress
    assert progress is not None
    assert (progress.step, progress.steps, progress.loss) == (2, 4, 3.5)


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.reason)
def test_a_failed_stage_stops_the_run_with_the_same_kind_of_error(
    recipe: Callable[..., Recipe], store: Store, kind: type[LlamaRefineError]
) -> None:
    executor = FakeExecutor(sft=fail(kind("it did not work")))
    with pytest.raises(kind) as caught:
        drive(recipe(), store, executor)
    assert "sft" in str(caught.value)
    assert caught.value.exit_code == kind.exit_code
    record = find(store, None)
    assert record.state == record.stages["sft"].state == ("interrupted" if kind is PreemptedError else "failed")
    assert record.stages["prepare"].state == "done"
    assert record.stages["dpo"].state == "pending"
    assert set(executor.ran) == {"prepare", "sft"}
    assert drive(recipe(), store) == ["sft", "dpo", "merge", "evaluate"], "the next run resumes"


def test_a_store_error_is_retried_twice(recipe: Callable[..., Recipe], store: Store) -> None:
    executor = FakeExecutor(sft=fail(StoreError("the bucket answered 503")))
    observer = RecordingObserver()
    with pytest.raises(StoreError):
        drive(recipe(), store, executor, observer)
    assert executor.ran == ["prepare", "sft", "sft", "sft"]
    assert find(store, None).stages["sft"].attempts == 3
    assert ("sft", "the bucket answered 503; retrying in 0.01 s") in observer.notes


def test_a_run_succeeds_after_a_store_error_that_does_not_recur(recipe: Callable[..., Recipe], store: Store) -> None:
    failures = [StoreError("the bucket answered 503")]

    def fail_once(on_line: Callable[[str], None]) -> None:
        if failures:
            raise failures.pop()

    executor = FakeExecutor(sft=fail_once)
    assert drive(recipe(), store, executor) == ["prepare", "sft", "sft", "dpo", "merge", "evaluate"]
    assert find(store, None).state == "done"


def test_no_other_error_is_retried(recipe: Callable[..., Recipe], store: Store) -> None:
    executor = FakeExecutor(sft=fail(DivergedError("NaN")))
    with pytest.raises(DivergedError, match=r"^sft: NaN$"):
        drive(recipe(), store, executor)
    assert executor.ran == ["prepare", "sft"]


def test_a_stage_that_publishes_nothing_is_an_error(recipe: Callable[..., Recipe], store: Store) -> None:
    class Idle(FakeExecutor):
        def execute(self, task: object, on_line: Callable[[str], None]) -> None:
            return

    with pytest.raises(IntegrityError, match=r"prepare exited with code 0, but .* has no artifact"):
        drive(recipe(), store, Idle())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels_the_running_stage(
    recipe: Callable[..., Recipe], store: Store, number: signal.Signals
) -> None:
    def interrupt(on_line: Callable[[str], None]) -> None:
        os.kill(os.getpid(), number)
        raise PreemptedError("saved")

    executor = FakeExecutor(sft=interrupt)
    before = signal.getsignal(number)
    with pytest.raises(InterruptedRunError) as caught:
        drive(recipe(), store, executor)
    assert executor.cancelled == 1
    assert str(caught.value) == "interrupted in sft; kept: prepare; rerun the same command to resume"
    assert caught.value.exit_code == 130
    assert find(store, None).state == "interrupted"
    assert signal.getsignal(number) is before


def test_a_signal_too_late_for_its_stage_stops_before_the_next_one(recipe: Callable[..., Recipe], store: Store) -> None:
    executor = FakeExecutor(sft=lambda on_line: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(InterruptedRunError, match="kept: prepare, sft;"):
        drive(recipe(), store, executor)
    assert executor.ran == ["prepare", "sft"]
    assert find(store, None).stages["sft"].state == "done"


def test_the_report_is_copied_to_the_runs_folder(recipe: Callable[..., Recipe], store: Store) -> None:
    drive(recipe("evaluate.gates=[{metric: loss, at_most: 1.0}]"), store)
    record = find(store, None)
    names = {entry.path for entry in store.entries(f"runs/{record.run}/report/")}
    assert names == {f"runs/{record.run}/report/report.{kind}" for kind in ("html", "md", "json")}
    assert record.state == "done"
    assert record.gates_passed is False


def test_an_unexpected_exception_is_recorded_and_raised(recipe: Callable[..., Recipe], store: Store) -> None:
    def divide_by_zero(on_line: Callable[[str], None]) -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        drive(recipe(), store, FakeExecutor(sft=divide_by_zero))
    assert find(store, None).stages["sft"].error == "sft: ZeroDivisionError: a bug"


def test_a_run_whose_keys_are_replaced_is_driven_to_its_end(
    recipe: Callable[..., Recipe],
    rotating_minio: s3_server.RotatingMinio,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The driver meets the refusal when sft has ended; the new keys come after it has reported that."""
    monkeypatch.setenv(BUCKET_KEYS, str(tmp_path))
    rotating_minio.write_keys(tmp_path)
    notices: list[str] = []

    def replace_keys(notice: str) -> None:
        notices.append(notice)
        rotating_minio.write_keys(tmp_path)

    class RotatingExecutor(FakeExecutor):
        def execute(self, task: Task, on_line: Callable[[str], None]) -> None:
            super().execute(task, on_line)
            if task.stage == "sft":
                rotating_minio.rotate()

    store = Store("s3://rotated", RetryPolicy(120, replace_keys))
    assert drive(recipe(), store, RotatingExecutor()) == list(SEQUENCE)
    assert "refuses these credentials (InvalidAccessKeyId)" in notices[0]
    assert find(Store("s3://rotated"), None).state == "done"


def test_a_run_works_the_same_in_a_bucket(recipe: Callable[..., Recipe], s3_uri: str) -> None:
    store = Store(s3_uri)
    assert drive(recipe(), store) == list(SEQUENCE)
    assert drive(recipe(), store) == []
    run = find(store, None).run
    assert (store.read(f"runs/{run}/logs/sft.log") or b"").startswith(b"sft: backend: acting\n")
