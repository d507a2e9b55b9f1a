"""`preflight` without a cluster: local checks, a real bucket with every kind of fault, invalid kubeconfigs."""

import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from llamarefine_jobs.contract.errors import LlamaRefineError
from llamarefine_jobs.contract.recipe import Preferences, Questions, Recipe
from llamarefine_jobs.store.bucket import S3Objects
from llamarefine_jobs.store.folder import FolderObjects
from llamarefine_jobs.store.uri import open_objects
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.cluster.placement import check_placement
from llamarefine_k8s.cluster.preflight import check_sources
from llamarefine_k8s.cluster.submission import start
from llamarefine_k8s.runs import bucket_probe
from llamarefine_k8s.runs.bucket_probe import check_store
from llamarefine_k8s.settings import Settings
from tests.k8s.api_server import ApiServer, Fault, use_kubeconfig
from tests.k8s.conftest import Launcher
from tests.s3_server import S3Server


def preflight(launcher: Launcher, *arguments: str, **environment: str) -> tuple[int, dict[str, str]]:
    """Return the exit code, and state and text of each check by name."""
    code, out, _ = launcher.run("preflight", *arguments, "--json", **environment)
    return code, {check["name"]: f"{check['state']} {check['text']} {check['to_do']}" for check in json.loads(out)}


def test_a_folder_and_a_valid_recipe_pass_and_nothing_is_written(
    launcher: Launcher, recipe_file: Path, tmp_path: Path
) -> None:
    code, checks = preflight(launcher, str(recipe_file), "--store", str(tmp_path / "new" / "store"))
    assert code == 0
    assert list(checks) == ["libraries", "store", "disk", "questions", "preferences", "base", "plan"]
    assert all(text.startswith(("ok", "warning")) for text in checks.values())
    assert not (tmp_path / "new").exists()


def test_every_check_is_made_although_the_first_ones_fail(
    launcher: Launcher, recipe_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    text = recipe_file.read_text().replace("questions: {", "questions: {question_column: ask, ")
    recipe_file.write_text(text.replace("tiny-llama", str(tmp_path / "nowhere")))
    code, out, err = launcher.run("preflight", str(recipe_file), "--store", str(tmp_path / "file"))
    assert code == 1
    lines = {line.split(": ")[0].split()[1]: line for line in out.splitlines()}
    assert lines["store"].startswith("FAIL")
    assert "has no column `ask`, only `question`, `answer`" in lines["questions"]
    assert "has no config.json" in lines["base"]
    assert err.startswith("error: 3 of ")


def check_questions(tmp_path: Path, name: str, data: bytes, **columns: str) -> str:
    """Return state and text of the check of questions in a file with this content."""
    (tmp_path / name).write_bytes(data)
    questions = Questions(source=str(tmp_path / name), **columns)  # type: ignore[arg-type]
    prepare = {"questions": questions.model_dump(), "preferences": Preferences(source="python-docstrings").model_dump()}
    checks = check_sources(
        Recipe.model_validate({"name": "x", "prepare": prepare | {"base": {"source": "tiny-llama"}}})
    )
    check = next(check for check in checks if check.name == "questions")
    return f"{check.state} {check}"


def test_columns_are_read_from_the_first_rows_of_every_kind_of_table(tmp_path: Path) -> None:
    assert check_questions(tmp_path, "a.csv", b"\xef\xbb\xbfquestion,answer\nx,y\n").startswith("ok")
    assert check_questions(tmp_path, "b.csv", b"id;question;answer\n").startswith("ok")
    assert check_questions(tmp_path, "c.tsv", b"question\tanswer\n").startswith("ok")
    assert check_questions(tmp_path, "d.jsonl", b'{"question": "x"}\n{"answer": "y"}').startswith("ok")
    assert check_questions(tmp_path, "e.csv", b"Frage,answer\n", question_column="Frage").startswith("ok")
    long = b'{"question": "x", "answer": "' + "ä".encode() * 2_000_000 + b'"}\n'
    assert check_questions(tmp_path, "f.jsonl", b'{"question": "x", "answer": "y"}\n' + long).startswith("ok")


def test_the_check_of_an_invalid_table_says_what_is_wrong(tmp_path: Path) -> None:
    assert "has no column `answer`, only `question`" in check_questions(tmp_path, "a.jsonl", b'{"question": "x"}\n')
    assert "does not begin with a jsonl row" in check_questions(tmp_path, "b.jsonl", b"[1, 2")
    assert "does not begin with a csv row" in check_questions(tmp_path, "c.csv", b"")
    assert "ends in none of .csv" in check_questions(tmp_path, "d.docx", b"PK")


def test_columns_are_read_from_a_parquet_file(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"question": ["x"], "answer": ["y"]}), tmp_path / "made.parquet")
    data = (tmp_path / "made.parquet").read_bytes()
    assert check_questions(tmp_path, "a.parquet", data).startswith("ok")
    assert "is not a Parquet file" in check_questions(tmp_path, "b.parquet", data[:40])


def test_columns_are_read_from_a_table_in_a_bucket(s3_uri: str, tmp_path: Path) -> None:
    open_objects(s3_uri).write("faq.csv", b"question,antwort\n" + b"x" * 3_000_000)
    questions = {"source": f"{s3_uri}/faq.csv"}
    prepare = {"questions": questions, "preferences": {"source": f"{s3_uri}/absent.jsonl"}}
    checks = {c.name: str(c) for c in check_sources(Recipe.model_validate({"name": "x", "prepare": prepare}))}
    assert "has no column `answer`, only `question`, `antwort`" in checks["questions"]
    assert "there is nothing at" in checks["preferences"]


def test_a_working_bucket_passes_and_no_object_is_left(s3_uri: str) -> None:
    assert [(check.name, check.state) for check in check_store(s3_uri)] == [("bucket", "ok")]
    assert list(open_objects(s3_uri).entries("")) == []


def bucket_problem(uri: str) -> str:
    problems = [check for check in check_store(uri) if check.state != "ok"]
    return str(problems[0]) if problems else "no problem"


def test_a_missing_bucket_is_reported(s3: S3Server) -> None:
    assert "there is no bucket `absent`; create it" in bucket_problem("s3://absent/x")


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("AWS_ACCESS_KEY_ID", "someone-else", "refuses these credentials (InvalidAccessKeyId)"),
        ("AWS_SECRET_ACCESS_KEY", "another", "refuses these credentials (SignatureDoesNotMatch)"),
    ],
)
def test_wrong_credentials_are_reported(
    s3_uri: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, problem: str
) -> None:
    if s3.name != "minio":
        pytest.skip("moto accepts any key")
    monkeypatch.setenv(variable, value)
    assert problem in bucket_problem(s3_uri)


def test_an_https_url_of_an_endpoint_without_tls_is_reported(
    s3_uri: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.endpoint.replace("http:", "https:"))
    assert "does not speak TLS; give it a certificate, or write http:// if that is intended" in bucket_problem(s3_uri)


def test_an_endpoint_that_does_not_answer_is_reported(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert "is the endpoint right and reachable?" in bucket_problem(s3_uri)


def test_a_clock_that_is_far_off_is_reported(s3_uri: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import botocore.auth

    if s3.name != "minio":
        pytest.skip("moto does not check the clock")
    real = botocore.auth.get_current_datetime
    late = timedelta(minutes=20)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *args, **kwargs: real(*args, **kwargs) - late)
    assert "this machine's clock differs too much from the bucket's; correct it (NTP)" in bucket_problem(s3_uri)


def test_a_clock_that_is_a_little_off_is_a_warning(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_probe, "_SKEW_S", -1.0)  # every clock differs by more
    assert "the bucket, which refuses requests that are 900 s off; correct the clock" in bucket_problem(s3_uri)


@pytest.mark.parametrize("kind", [FolderObjects, S3Objects])
def test_a_store_that_ignores_the_condition_of_a_put_is_refused(
    kind: type[FolderObjects | S3Objects], file_uri: str, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_unconditionally(self: FolderObjects | S3Objects, path: str, data: bytes) -> bool:
        self.write(path, data)
        return True

    monkeypatch.setattr(kind, "create", create_unconditionally)
    uri = file_uri if kind is FolderObjects else s3_uri
    assert "If-None-Match is not honoured" in bucket_problem(uri)
    assert list(open_objects(uri).entries("")) == []


KUBECONFIG = """\
apiVersion: v1
kind: Config
current-context: here
contexts: [{name: here, context: {cluster: here, user: me}}]
clusters: [{name: here, cluster: {server: "https://127.0.0.1:9"}}]
users: [{name: me, user: {token: expired}}]
"""


@pytest.mark.parametrize(
    ("config", "arguments", "problem"),
    [
        (None, (), "no cluster to talk to"),
        ("a list of words", (), "the kubeconfig cannot be used"),
        (KUBECONFIG, ("--context", "there"), "the kubeconfig has no context `there`; there are here"),
        (KUBECONFIG, (), "the API server at https://127.0.0.1:9 cannot be reached"),
    ],
)
def test_without_a_cluster_the_other_checks_are_still_made(
    launcher: Launcher, recipe_file: Path, tmp_path: Path, config: str | None, arguments: tuple[str, ...], problem: str
) -> None:
    if config:
        (tmp_path / "config").write_text(config)
    code, checks = preflight(launcher, str(recipe_file), *arguments, KUBECONFIG=str(tmp_path / "config"))
    assert code == 1
    assert problem in checks["cluster"]
    assert checks["questions"].startswith("ok")


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="no GPU here")
def test_the_estimate_is_compared_with_this_machines_gpu(launcher: Launcher, recipe_file: Path, tmp_path: Path) -> None:
    from tests.contract.test_memory import TINYLLAMA

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **TINYLLAMA}))
    recipe_file.write_text(recipe_file.read_text().replace("tiny-llama", str(tmp_path)))
    assert "of this machine's GPU" in preflight(launcher, str(recipe_file), "--local")[1]["GPU memory for sft"]


def test_the_objects_of_a_submitted_run_would_still_be_accepted(
    server: ApiServer, recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kubeconfig(server.kubeconfig(tmp_path), monkeypatch)
    given = Settings(store="s3://bucket/x", gpu_resource=None, secret_name=None)
    start(Cluster(), recipe(), given, lambda text: None)
    before = dict(server.objects)
    checks = {check.name: check for check in check_placement(Cluster(), given, recipe(), {})}
    assert checks["admission"].state == "ok"
    assert server.objects == before
    server.faults.append(Fault("POST .*jobs.*dryRun", status=409))
    failed = [check for check in check_placement(Cluster(), given, recipe(), {}) if check.state == "FAIL"]
    assert [(check.name, "refused (409)" in str(check)) for check in failed] == [("admission: driver", True)]


def test_a_dry_run_raises_what_creating_would_raise(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kubeconfig(server.kubeconfig(tmp_path), monkeypatch)
    manifest = {"kind": "ConfigMap", "metadata": {"name": "x"}}
    assert Cluster().dry_run_create(manifest) == []
    assert server.objects == {}
    server.faults.append(Fault("POST .*dryRun", status=503))
    assert Cluster().dry_run_create(manifest) == [], "a short outage is retried"
    for status, message in ((403, "the cluster forbids it"), (422, "refused")):
        server.faults.append(Fault("POST .*dryRun", status=status))
        with pytest.raises(LlamaRefineError, match=message):
            Cluster().dry_run_create(manifest)
