"""A real S3 server for the tests: MinIO if the program is installed, moto's server otherwise.

`LLAMAREFINE_TEST_S3=minio` or `=moto` chooses.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

KEY, SECRET = "llamarefine-tests", "not-a-secret-anywhere"


@dataclass(frozen=True)
class S3Server:
    """A running server: its address and the program's name."""

    endpoint: str
    name: str

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point boto3 at this server, and away from the credentials of whoever runs the tests."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }


def find_minio() -> str | None:
    """Return the path of the MinIO program; None if there is none or LLAMAREFINE_TEST_S3 is `moto`."""
    if os.environ.get("LLAMAREFINE_TEST_S3") == "moto":
        return None
    home = Path(os.environ.get("CLUSTER_HOME", "~/.cache/llamarefine-cluster")).expanduser()
    found = shutil.which("minio") or shutil.which("minio", path=str(home / "bin"))
    if not found and os.environ.get("LLAMAREFINE_TEST_S3") == "minio":
        raise RuntimeError("LLAMAREFINE_TEST_S3=minio, but no minio is on the PATH")
    return found


def describe() -> str:
    """Return the line for pytest's header that names the server."""
    minio = find_minio()
    return f"S3 by MinIO ({minio})" if minio else "S3 by moto's server (no minio on the PATH)"


@contextmanager
def serve() -> Iterator[S3Server]:
    """Run the server until the context ends."""
    minio = find_minio()
    with _minio(minio) if minio else _moto() as server:
        yield server


@contextmanager
def _moto() -> Iterator[S3Server]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield S3Server("http://{}:{}".format(*server.get_host_and_port()), "moto")
    finally:
        server.stop()


@contextmanager
def _minio(program: str) -> Iterator[S3Server]:
    with RotatingMinio(program) as server:
        yield S3Server(server.endpoint, "minio")


class RotatingMinio:
    """A MinIO server whose keys can be replaced: `rotate` starts it again, with its data, with other keys."""

    def __init__(self, program: str) -> None:
        self._program, self._port = program, _free_port()
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self.key, self.secret = KEY, SECRET

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="llamarefine-minio-")
        try:
            self._start()
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point boto3 at this server, with the keys that it began with."""
        return S3Server(self.endpoint, "minio").environment

    def write_keys(self, folder: Path) -> None:
        """Write the current keys to a folder, as Kubernetes mounts a Secret."""
        folder.mkdir(exist_ok=True)
        (folder / "AWS_ACCESS_KEY_ID").write_text(f"{self.key}\n")
        (folder / "AWS_SECRET_ACCESS_KEY").write_text(f"{self.secret}\n")

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._folder.cleanup()

    def rotate(self) -> None:
        """Replace the keys. When this returns, the server refuses the former ones."""
        self._stop()
        self.key, self.secret = f"{self.key}-new", f"{self.secret}-new"
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [self._program, "server", "--quiet", "--address", f"127.0.0.1:{self._port}", self._folder.name],
            env={**os.environ, "MINIO_ROOT_USER": self.key, "MINIO_ROOT_PASSWORD": self.secret, "MINIO_BROWSER": "off"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait_until_ready(f"{self.endpoint}/minio/health/ready", self._process)
        except BaseException:
            self._stop()
            raise

    def _stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"minio ended with {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("minio did not answer within 60 s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
