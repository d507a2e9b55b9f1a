"""Commands and a stage with every library at DEBUG: no credential in their output or in their logs."""

import base64
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from llamarefine_jobs.untrusted.log_redaction import redact, redact_logs
from tests.k8s.api_server import served as api_served
from tests.k8s.conftest import LAUNCHER, RECIPE
from tests.s3_server import S3Server

from . import hostile_hub

LOUD = str(Path(__file__).parent / "loud")
BEARER = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhbi1hZG1pbiJ9.c2lnbmF0dXJl"
HUB = "hf_" + "Q7" * 17


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a signing key; the public key is beside it."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    private = ed25519.Ed25519PrivateKey.generate()
    kind = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path_factory.mktemp("keys") / "signing-key.pem"
    path.write_bytes(private.private_bytes(*kind))
    public = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.with_name("public.pem").write_bytes(private.public_key().public_bytes(*public))
    return path


@pytest.fixture
def session(s3: S3Server, the_bucket: str) -> dict[str, str]:
    """Temporary credentials with a session token, as workload identity provides them."""
    import boto3

    given = boto3.client("sts", endpoint_url=s3.endpoint, region_name="us-east-1").assume_role(
        RoleArn="arn:aws:iam::123456789012:role/stages", RoleSessionName="tests"
    )["Credentials"]
    names = {"AccessKeyId": "AWS_ACCESS_KEY_ID", "SecretAccessKey": "AWS_SECRET_ACCESS_KEY"}
    return {
        (names | {"SessionToken": "AWS_SESSION_TOKEN"})[name]: str(given[name]) for name in (*names, "SessionToken")
    }  # type: ignore[literal-required]


@pytest.fixture
def environment(session: dict[str, str], key: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A user's environment: bucket keys, a kubeconfig with a token and a client key, a Hub token."""
    pem = key.read_bytes()
    with api_served() as api:
        api.put("serviceaccounts", {"metadata": {"name": "llamarefine-driver"}})
        settings = {"metadata": {"name": "llamarefine"}, "data": {"llamarefine.yaml": "secret_name: bucket\n"}}
        api.put("configmaps", settings)
        user = {"token": BEARER, "client-key-data": base64.b64encode(pem).decode()}
        kubeconfig = api.kubeconfig(tmp_path, **user)
        yield (
            os.environ
            | {
                "PYTHONPATH": LOUD,
                "PYTHONDONTWRITEBYTECODE": "1",
                "KUBECONFIG": str(kubeconfig),
                "HOME": str(tmp_path),
                "HF_TOKEN": HUB,
                "HF_DEBUG": "1",
                "LLAMAREFINE_SIGNING_KEY": pem.decode(),
            }
            | session
        )


def run_command(environment: dict[str, str], *command: str) -> tuple[int, str]:
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False, cwd=environment["HOME"]
    )
    return done.returncode, done.stdout + done.stderr


def assert_no_credential(text: str, environment: dict[str, str]) -> None:
    """Assert that `text` holds no credential in any spelling, and no signature made with one."""
    key = environment["LLAMAREFINE_SIGNING_KEY"]
    secrets = {
        "the signing key": key.splitlines()[1],
        "the signing key as a kubeconfig has it": base64.b64encode(key.encode()).decode(),
        "the bucket's secret": environment["AWS_SECRET_ACCESS_KEY"],
        "the session's token": environment["AWS_SESSION_TOKEN"],
        "the end of the session's token": environment["AWS_SESSION_TOKEN"][-40:],
        "the session's token in an address": quote(environment["AWS_SESSION_TOKEN"], safe=""),
        "the bearer token": BEARER,
        "the bearer token's signature": BEARER.rpartition(".")[2],
        "the Hub's token": HUB,
    }
    found = {name: text[max(0, text.index(secret) - 200) :][:300] for name, secret in secrets.items() if secret in text}
    assert not found, found
    signed = re.search(r"[Ss]ignature['\"]?\s*[=:\n]\s*b?['\"]?[0-9a-f]{64}", text)
    assert not signed, text[max(0, signed.start() - 300) :][:500] if signed else ""


def test_no_command_prints_a_credential(environment: dict[str, str], key: Path, s3_uri: str, tmp_path: Path) -> None:
    (tmp_path / "questions.csv").write_text("question,answer\nWhat is kind?,A cluster.\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("QUESTIONS", str(tmp_path / "questions.csv")))
    environment |= {"LLAMAREFINE_STORE": s3_uri}
    commands = [
        ["run", str(recipe), "--into", str(tmp_path / "into")],
        ["status"],
        ["logs"],
        ["pull", "--into", str(tmp_path / "model")],
        ["verify", "--public-key", str(key.with_name("public.pem"))],
        ["preflight", str(recipe)],
        ["submit", str(recipe), "--detach", "--no-memory-check"],
    ]
    codes: dict[str, int] = {}
    for command in commands:
        code, text = run_command(environment, *LAUNCHER, *command)
        codes[command[0]] = code
        assert "DEBUG:" in text, f"{command}: the libraries logged"
        assert "send:" in text, f"{command}: the HTTP client logged"
        assert_no_credential(text, environment)
    assert codes == dict.fromkeys(codes, 0) | {"preflight": 1}, (
        "preflight fails because the cluster has only an API server"
    )


def test_failing_commands_print_no_credential(environment: dict[str, str], tmp_path: Path) -> None:
    environment |= {"LLAMAREFINE_STORE": "s3://no-such-bucket-anywhere/prefix"}
    for command in (["status"], ["logs"], ["submit", "nothing.yaml"]):
        code, text = run_command(environment, *LAUNCHER, *command)
        assert code != 0
        assert_no_credential(text, environment)


def test_prepare_prints_no_credential(environment: dict[str, str], s3_uri: str, tmp_path: Path) -> None:
    rows = "question,answer\n" + "".join(f"What is {number}?,It is {number}.\n" for number in range(40))
    recipe = tmp_path / "recipe.yaml"
    small = "tiny-llama, tiny: {vocabulary: 300, hidden_size: 32, intermediate_size: 32, layers: 1, heads: 2, steps: 1}"
    recipe.write_text(RECIPE.replace("tiny-llama", small).replace("QUESTIONS", "hf://datasets/a/private"))
    with hostile_hub.served() as hub:
        hub.repositories["a/private"] = hostile_hub.Repository({"train.csv": rows.encode()})
        environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        stage = [sys.executable, "-m", "llamarefine_jobs.prepare", "--recipe", str(recipe), "--store", s3_uri]
        code, text = run_command(environment, *stage)
    assert code == 0, text[-2000:]
    assert f"Bearer {HUB}" in hub.authorizations, "the token was used"
    assert "DEBUG:" in text
    assert_no_credential(text, environment)


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("Authorization: Bearer abc.def", "Authorization: [hidden]"),
        ("headers={'Authorization': b'AWS4-HMAC-SHA256 Credential=a/b, Signature=0f', 'Host': 'h'}",
         "headers={'Authorization': b'[hidden]', 'Host': 'h'}"),
        (r"send: b'GET / HTTP/1.1\r\nX-Amz-Security-Token: a/b=\r\nHost: h'",
         r"send: b'GET / HTTP/1.1\r\nX-Amz-Security-Token: [hidden]\r\nHost: h'"),
        ("[(b'Host', b'h'), (b'authorization', b'Basic YWI=')]", "[(b'Host', b'h'), (b'authorization', b'[hidden]')]"),
        ("GET /a?X-Amz-Signature=0f&X-Amz-Expires=60 200", "GET /a?X-Amz-Signature=[hidden]&X-Amz-Expires=60 200"),
        ("https://a/b?sv=1&sig=x%2By&se=2", "https://a/b?sv=1&sig=[hidden]&se=2"),
        ("<SessionToken>a/b</SessionToken><Expiration>1", "<SessionToken>[hidden]</SessionToken><Expiration>1"),
        ('{"SecretAccessKey" : "ab", "Token" : "cd", "Type": 1}',
         '{"SecretAccessKey" : "[hidden]", "Token" : "[hidden]", "Type": 1}'),
        ("'WebIdentityToken': 'eyJ', 'RoleArn': 'arn'", "'WebIdentityToken': '[hidden]', 'RoleArn': 'arn'"),
        ("-----BEGIN EC PRIVATE KEY-----\nMC4C\n-----END EC PRIVATE KEY-----\nok", "[hidden]\nok"),
        ("the tokenizer has 3 tokens; max_length_tokens=3, seed: 4", None),
        ("set HF_TOKEN for a private one; sha256: " + "0f" * 32, None),
    ],
)  # fmt: skip
def test_a_credential_is_recognized_by_its_form(text: str, redacted: str | None) -> None:
    assert redact(text) == (redacted or text)


def test_a_logged_traceback_is_redacted(caplog: pytest.LogCaptureFixture) -> None:
    redact_logs()
    try:
        raise ValueError("Authorization: Bearer abc.def")
    except ValueError:
        logging.getLogger("a.library").exception("it said %s", "sig=abc")
    assert "it said sig=[hidden]" in caplog.text
    assert "Authorization: [hidden]" in caplog.text
    assert "abc" not in caplog.text
