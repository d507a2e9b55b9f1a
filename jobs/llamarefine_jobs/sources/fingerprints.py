"""Fingerprints of local files and folders, and which fingerprints cannot be computed again from the source."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from llamarefine_jobs.contract.errors import DataError, from_os_error
from llamarefine_jobs.sources.locations import Kind

IMAGE_PREFIX = "image:"  # followed by the image whose Python's docstrings are meant


def was_computed_elsewhere(where: Kind, fingerprint: str) -> bool:
    """Return whether `fingerprint` cannot be computed again from the source.

    True for the sha256 of a file or folder that was uploaded since, which is compared after the download instead, and
    for the docstrings of an image's Python.
    """
    return (where is Kind.S3 and "sha256:" in fingerprint) or fingerprint.startswith(IMAGE_PREFIX)


def content_sha256(path: Path) -> str:
    """Return the fingerprint of a file (its sha256) or of a folder (the names and sha256s of all its files)."""
    try:
        if path.is_file():
            return f"sha256:{file_sha256(path)}"
        files = sorted(files_below(path))
        listing = [(file.relative_to(path).as_posix(), file_sha256(file)) for file in files]
        return f"tree-sha256:{hashlib.sha256(repr(listing).encode()).hexdigest()}"
    except OSError as error:
        raise from_os_error(error) from None


def files_below(folder: Path) -> Iterator[Path]:
    """Yield every regular file below `folder`. Raises DataError if a link leads to a file outside the folder.

    In the Hub's cache, a snapshot links to the blobs of the same repository; these links are allowed.
    """
    root = folder.resolve()
    allowed = root.parent.parent if root.parent.name == "snapshots" else root
    for file in folder.rglob("*"):
        if file.is_file():
            if not file.resolve().is_relative_to(allowed):
                raise DataError(f"{file}: is a link to a file outside {folder}; put the file itself there")
            yield file


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
