"""A real API server without nodes: etcd and kube-apiserver as processes, if both programs are installed."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.s3_server import _free_port

PROGRAMS = ("etcd", "kube-apiserver", "openssl")


def find(program: str) -> str | None:
    """Return the path of a program on the PATH or in the tests' own cache of programs; None if it is in neither."""
    home = Path(os.environ.get("CLUSTER_HOME", "~/.cache/llamarefine-cluster")).expanduser()
    return shutil.which(program) or shutil.which(program, path=str(home / "bin"))


@contextlib.contextmanager
def serve() -> Iterator[Path]:
    """Run an API server for as long as the context lasts; yields the path of a kubeconfig for it."""
    with tempfile.TemporaryDirectory(prefix="llamarefine-control-plane-") as name, contextlib.ExitStack() as stack:
        folder, token = Path(name), "for-this-server-only"
        client, peer, port = _free_port(), _free_port(), _free_port()
        (folder / "tokens.csv").write_text(f"{token},admin,admin,system:masters\n")
        subprocess.run(["openssl", "genrsa", "-out", folder / "sa.key", "2048"], check=True, capture_output=True)

        def start(program: str, *arguments: object) -> None:
            with (folder / f"{program}.log").open("wb") as log:
                command = [str(find(program)), *map(str, arguments)]
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
            stack.callback(process.wait)
            stack.callback(process.kill)  # after SIGTERM the API server would wait a minute for open watches

        start(
            "etcd",
            *("--data-dir", "etcd", "--unsafe-no-fsync", "--log-level", "warn"),
            *(
                "--listen-client-urls",
                f"http://127.0.0.1:{client}",
                "--advertise-client-urls",
                f"http://127.0.0.1:{client}",
            ),
            *("--listen-peer-urls", f"http://127.0.0.1:{peer}"),
        )
        start(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{client}",
            f"--secure-port={port}",
            "--bind-address=127.0.0.1",
            "--cert-dir=certificates",
            "--token-auth-file=tokens.csv",
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-account-key-file=sa.key",
            "--service-account-signing-key-file=sa.key",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--disable-admission-plugins=ServiceAccount",
        )
        path = folder / "kubeconfig"
        server = {"server": f"https://127.0.0.1:{port}", "certificate-authority": "certificates/apiserver.crt"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "local", "cluster": server}],
            "users": [{"name": "admin", "user": {"token": token}}],
            "contexts": [{"name": "local", "context": {"cluster": "local", "user": "admin", "namespace": "default"}}],
            "current-context": "local",
        }
        path.write_text(yaml.safe_dump(config))
        _wait_until_ready(folder, port, token)
        yield path


def _wait_until_ready(folder: Path, port: int, token: str) -> None:
    import ssl
    import urllib.request

    unverified = ssl._create_unverified_context()  # the server's certificate is self-signed
    request = urllib.request.Request(
        f"https://127.0.0.1:{port}/api/v1/namespaces/default", headers={"Authorization": f"Bearer {token}"}
    )
    until_s = time.monotonic() + 180
    while True:
        try:
            with urllib.request.urlopen(request, context=unverified, timeout=5):
                return
        except OSError:
            if time.monotonic() > until_s:
                raise RuntimeError((folder / "kube-apiserver.log").read_text()[-2000:]) from None
            time.sleep(0.5)
