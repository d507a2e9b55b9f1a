"""Where a source lies: built in, a local path, S3, a web address, or the Hugging Face Hub."""

from enum import Enum
from pathlib import Path
from urllib.parse import unquote, urlsplit

DOCSTRINGS = "python-docstrings"
TINY_LLAMA = "tiny-llama"


class Kind(Enum):
    """Where a source lies."""

    BUILT_IN = "built-in"
    PATH = "path"
    S3 = "s3"
    HTTPS = "https"
    HUB = "hub"


def kind(source: str, *, hub_id_allowed: bool = False) -> Kind:
    """Return where `source` lies. With `hub_id_allowed`, ``owner/name`` is a Hub id unless such a path exists."""
    if source in (DOCSTRINGS, TINY_LLAMA):
        return Kind.BUILT_IN
    match urlsplit(source).scheme:
        case "s3":
            return Kind.S3
        case "https" | "http":
            return Kind.HTTPS
        case "hf":
            return Kind.HUB
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).exists()
    if hub_id_allowed and not is_path:
        return Kind.HUB
    return Kind.PATH


def local_path(source: str) -> Path:
    """Return the absolute path that a `Kind.PATH` source names."""
    parts = urlsplit(source)
    return Path(unquote(parts.path) if parts.scheme == "file" else source).expanduser().absolute()
