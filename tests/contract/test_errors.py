"""Each kind of failure has one exit code, away from those that shells and kernels give."""

import errno
import tempfile
from pathlib import Path

import pytest

from llamarefine_jobs.contract import errors
from llamarefine_jobs.contract.errors import Disposition, LlamaRefineError, all_errors, by_exit_code, from_os_error


def test_every_kind_has_a_code_and_a_reason_of_its_own() -> None:
    kinds = all_errors()
    assert len(kinds) >= 10
    assert len({kind.exit_code for kind in kinds}) == len(kinds)
    assert len({kind.reason for kind in kinds}) == len(kinds)
    assert all(kind.__doc__ for kind in kinds)


def test_no_code_is_one_of_the_shells() -> None:
    taken = {0, 1, 2, 64, 65, 66, *range(124, 166), 255}
    assert taken.isdisjoint(kind.exit_code for kind in all_errors())


def test_a_code_leads_back_to_its_kind() -> None:
    for kind in all_errors():
        assert by_exit_code(kind.exit_code) is kind
    assert by_exit_code(137) is LlamaRefineError


def test_only_trouble_that_may_pass_is_tried_again() -> None:
    again = {kind.__name__: kind.disposition for kind in all_errors() if kind.disposition is not Disposition.FAIL}
    assert again == {
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
def test_what_the_operating_system_says_becomes_one_line_of_the_right_kind(
    number: int, kind: type[LlamaRefineError]
) -> None:
    found = from_os_error(OSError(number, "as it says", "/data/rows.csv"))
    assert type(found) is kind
    assert "/data/rows.csv" in str(found)
    assert "\n" not in str(found)


def test_a_disk_too_full_for_any_temporary_folder_is_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "absent")])
    with pytest.raises(FileNotFoundError) as caught:
        tempfile.gettempdir()
    found = from_os_error(caught.value)
    assert isinstance(found, errors.DiskFullError)
    assert "TMPDIR" in str(found)
