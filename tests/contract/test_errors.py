"""Every error class has its own exit code, different from those that shells and the kernel use."""

import errno
import tempfile
from pathlib import Path

import pytest

from llamarefine_jobs.contract import errors
from llamarefine_jobs.contract.errors import Disposition, LlamaRefineError, all_errors, by_exit_code, from_os_error


def test_every_error_class_has_its_own_exit_code_and_reason() -> None:
    kinds = all_errors()
    assert len(kinds) >= 10
    assert len({kind.exit_code for kind in kinds}) == len(kinds)
    assert len({kind.reason for kind in kinds}) == len(kinds)
    assert all(kind.__doc__ for kind in kinds)


def test_no_exit_code_is_one_that_shells_use() -> None:
    used_by_shells = {0, 1, 2, 64, 65, 66, *range(124, 166), 255}
    assert used_by_shells.isdisjoint(kind.exit_code for kind in all_errors())


def test_an_exit_code_maps_to_its_error_class() -> None:
    for kind in all_errors():
        assert by_exit_code(kind.exit_code) is kind
    assert by_exit_code(137) is LlamaRefineError


def test_only_failures_that_may_pass_are_retried() -> None:
    retried = {kind.__name__: kind.disposition for kind in all_errors() if kind.disposition is not Disposition.FAIL}
    assert retried == {
        "StoreError": Disposition.RETRY,
        "PeerLostError": Disposition.RETRY,
        "PreemptedError": Disposition.RESUME,
    }


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, errors.DiskFullError),
        (errno.EDQUOT, errors.DiskFullError),
        (errno.EFBIG, errors.DiskFullError),
        (errno.EACCES, errors.AccessError),
        (errno.EPERM, errors.AccessError),
        (errno.EROFS, errors.AccessError),
        (errno.ENOENT, errors.DataError),
        (errno.EISDIR, errors.DataError),
        (errno.EIO, LlamaRefineError),
    ],
)
def test_an_os_error_becomes_one_line_of_the_right_error_class(number: int, kind: type[LlamaRefineError]) -> None:
    found = from_os_error(OSError(number, "some reason", "/data/rows.csv"))
    assert type(found) is kind
    assert "/data/rows.csv" in str(found)
    assert "\n" not in str(found)


def test_no_writable_temporary_folder_is_reported_as_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "absent")])
    with pytest.raises(FileNotFoundError) as caught:
        tempfile.gettempdir()
    found = from_os_error(caught.value)
    assert isinstance(found, errors.DiskFullError)
    assert "TMPDIR" in str(found)
