"""A full disk, missing permissions: a one-line error of the right class, and nothing left behind."""

import errno
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llamarefine_jobs.contract.errors import AccessError, DiskFullError
from llamarefine_jobs.store import Store

from . import samples
from .processes import error_of_publishing

NOBODY = 65534


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield the folder of a file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or not mount or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("no permission to mount a file system")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Yield a folder that every user can read, unlike pytest's temporary folders."""
    with tempfile.TemporaryDirectory(prefix="llamarefine-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_publishing_to_a_full_disk_leaves_nothing(tiny_disk: Path, tmp_path: Path) -> None:
    folder = samples.make_folder(tmp_path / "made", size_bytes=3_000_000)
    with pytest.raises(DiskFullError, match=f"no space is left to write {tiny_disk}") as error:
        Store(str(tiny_disk / "store")).publish(folder, samples.draft())
    assert "\n" not in str(error.value)
    assert files_of(tiny_disk) == []


def test_fetching_to_a_full_disk_leaves_nothing(store: Store, tiny_disk: Path, tmp_path: Path) -> None:
    folder = samples.make_folder(tmp_path / "made", size_bytes=3_000_000)
    published = store.publish(folder, samples.draft())
    with pytest.raises(DiskFullError):
        store.fetch(published, tiny_disk / "fetched")
    assert list(tiny_disk.iterdir()) == []
    store.verify(published)


def test_a_file_size_limit_is_a_disk_full_error(open_folder: Path, tmp_path: Path) -> None:
    folder = samples.make_folder(tmp_path / "made", size_bytes=3_000_000)
    error = error_of_publishing(str(open_folder / "store"), folder, file_limit_bytes=1_000_000)
    assert error is not None
    assert error[0] == "DiskFullError"
    assert files_of(open_folder) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_without_write_permission_is_named(open_folder: Path) -> None:
    made = samples.make_folder(open_folder / "made")
    (open_folder / "store").mkdir(mode=0o755)
    error = error_of_publishing(str(open_folder / "store"), made, uid=NOBODY)
    assert error is not None
    kind, text = error
    assert kind == "AccessError"
    assert text.startswith(f"no permission for {open_folder / 'store'}")
    assert "\n" not in text
    assert files_of(open_folder / "store") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_unreadable_file_is_named(open_folder: Path) -> None:
    made = samples.make_folder(open_folder / "made")
    (made / "one.byte").chmod(0o600)
    store = open_folder / "store"
    store.mkdir()
    store.chmod(0o777)
    error = error_of_publishing(str(store), made, uid=NOBODY)
    assert error is not None
    assert error == ("AccessError", error[1])
    assert "one.byte" in error[1]
    assert files_of(store) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "store").mkdir(mode=0o500)
    with pytest.raises(AccessError, match="no permission for"):
        Store(str(tmp_path / "store")).publish(folder, samples.draft())


def test_a_store_below_a_file_is_a_one_line_error(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(Exception, match="Not a directory") as error:
        Store(str(tmp_path / "file" / "store")).publish(folder, samples.draft())
    assert "\n" not in str(error.value)


def test_fetch_keeps_the_files_of_an_existing_folder(store: Store, folder: Path, tmp_path: Path) -> None:
    published = store.publish(folder, samples.draft())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("kept")
    with pytest.raises(Exception, match="mine"):
        store.fetch(published, tmp_path / "mine")
    assert samples.content(tmp_path / "mine") == {"precious.txt": b"kept"}
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make hard links fail as on FAT, since a test cannot create a file system without them."""

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", source)

    monkeypatch.setattr(os, "link", refuse)


def test_create_has_one_winner_on_a_file_system_without_hard_links(no_links: None, file_uri: str, folder: Path) -> None:
    samples.assert_only(Store(file_uri), Store(file_uri).publish(folder, samples.draft()))
    for round_ in range(8):
        barrier = threading.Barrier(6)

        def create(writer: int, path: str = f"runs/{round_}", barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return Store(file_uri).objects.create(path, f"written by {writer}".encode())

        with ThreadPoolExecutor(6) as pool:
            won = list(pool.map(create, range(6)))
        assert won.count(True) == 1
        assert Store(file_uri).read(f"runs/{round_}") == f"written by {won.index(True)}".encode()
