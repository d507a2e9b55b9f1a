"""`preflight` without a cluster: what `run` needs, a real bucket in each of its moods, a kubeconfig that is none."""

import json
import shutil
from datetime import timedelta
from pathlib import Path

import pytest

from llamarefine_jobs.contract.recipe import Preferences, Questions, Recipe
from llamarefine_jobs.store.bucket import S3Objects
from llamarefine_jobs.store.folder import FolderObjects
from llamarefine_jobs.store.uri import open_objects
from llamarefine_k8s.cluster.preflight import check_sources
from llamarefine_k8s.runs import bucket_probe
from llamarefine_k8s.runs.bucket_probe import check_store
from tests.k8s.conftest import Launcher
from tests.s3_server import S3Server


def told(launcher: Launcher, *arguments: str, **environment: str) -> tuple[int, dict[str, str]]:
    """The exit code, and state and text of each check by name."""
    code, out, _ = launcher.run("preflight", *arguments, "--json", **environment)
    return code, {check["name"]: f"{check['state']} {check['text']} {check['to_do']}" for check in json.loads(out)}


def test_a_folder_and_a_good_recipe_pass_and_nothing_is_left(
    launcher: Launcher, recipe_file: Path, tmp_path: Path
) -> None:
    code, said = told(launcher, str(recipe_file), "--store", str(tmp_path / "new" / "store"))
    assert code == 0
    assert list(said) == ["libraries", "store", "disk", "questions", "preferences", "base", "plan"]
    assert all(text.startswith(("ok", "warning")) for text in said.values())
    assert not (tmp_path / "new").exists()


def test_every_check_is_made_though_the_first_ones_fail(launcher: Launcher, recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    text = recipe_file.read_text().replace("questions: {", "questions: {question_column: ask, ")
    recipe_file.write_text(text.replace("tiny-llama", str(tmp_path / "nowhere")))
    code, out, err = launcher.run("preflight", str(recipe_file), "--store", str(tmp_path / "file"))
    assert code == 1
    lines = {line.split(": ")[0].split()[1]: line for line in out.splitlines()}
    assert lines["store"].startswith("FAIL")
    assert "has no column `ask`, only `question`, `answer`" in lines["questions"]
    assert "holds no config.json" in lines["base"]
    assert err.startswith("error: 3 of ")


def rows(tmp_path: Path, name: str, data: bytes, **columns: str) -> str:
    """What is said of questions that lie in a file."""
    (tmp_path / name).write_bytes(data)
    questions = Questions(source=str(tmp_path / name), **columns)  # type: ignore[arg-type]
    prepare = {"questions": questions.model_dump(), "preferences": Preferences(source="python-docstrings").model_dump()}
    checks = check_sources(
        Recipe.model_validate({"name": "x", "prepare": prepare | {"base": {"source": "tiny-llama"}}})
    )
    check = next(check for check in checks if check.name == "questions")
    return f"{check.state} {check}"


def test_columns_are_found_in_the_head_of_every_kind_of_table(tmp_path: Path) -> None:
    assert rows(tmp_path, "a.csv", b"\xef\xbb\xbfquestion,answer\nx,y\n").startswith("ok")
    assert rows(tmp_path, "b.csv", b"id;question;answer\n").startswith("ok")
    assert rows(tmp_path, "c.tsv", b"question\tanswer\n").startswith("ok")
    assert rows(tmp_path, "d.jsonl", b'{"question": "x"}\n{"answer": "y"}').startswith("ok")
    assert rows(tmp_path, "e.csv", b"Frage,answer\n", question_column="Frage").startswith("ok")
    long = b'{"question": "x", "answer": "' + "ä".encode() * 2_000_000 + b'"}\n'
    assert rows(tmp_path, "f.jsonl", b'{"question": "x", "answer": "y"}\n' + long).startswith("ok")


def test_what_is_wrong_with_a_table_is_told(tmp_path: Path) -> None:
    assert "has no column `answer`, only `question`" in rows(tmp_path, "a.jsonl", b'{"question": "x"}\n')
    assert "does not begin with a jsonl row" in rows(tmp_path, "b.jsonl", b"[1, 2")
    assert "does not begin with a csv row" in rows(tmp_path, "c.csv", b"")
    assert "ends in none of .csv" in rows(tmp_path, "d.docx", b"PK")


def test_a_parquet_files_columns_are_found(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"question": ["x"], "answer": ["y"]}), tmp_path / "made.parquet")
    data = (tmp_path / "made.parquet").read_bytes()
    assert rows(tmp_path, "a.parquet", data).startswith("ok")
    assert "is not a Parquet file" in rows(tmp_path, "b.parquet", data[:40])


def test_a_table_in_a_bucket_is_looked_at_there(s3_uri: str, tmp_path: Path) -> None:
    open_objects(s3_uri).write("faq.csv", b"question,antwort\n" + b"x" * 3_000_000)
    questions = {"source": f"{s3_uri}/faq.csv"}
    prepare = {"questions": questions, "preferences": {"source": f"{s3_uri}/absent.jsonl"}}
    checks = {c.name: str(c) for c in check_sources(Recipe.model_validate({"name": "x", "prepare": prepare}))}
    assert "has no column `answer`, only `question`, `antwort`" in checks["questions"]
    assert "there is nothing at" in checks["preferences"]


def test_a_good_bucket_passes_and_keeps_nothing(s3_uri: str) -> None:
    assert [(check.name, check.state) for check in check_store(s3_uri)] == [("bucket", "ok")]
    assert list(open_objects(s3_uri).entries("")) == []


def bucket(uri: str) -> str:
    found = [check for check in check_store(uri) if check.state != "ok"]
    return str(found[0]) if found else "nothing is wrong"


def test_a_missing_bucket_is_told(s3: S3Server) -> None:
    assert "there is no bucket `absent`; create it" in bucket("s3://absent/x")


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("AWS_ACCESS_KEY_ID", "someone-else", "refuses these credentials (InvalidAccessKeyId)"),
        ("AWS_SECRET_ACCESS_KEY", "another", "refuses these credentials (SignatureDoesNotMatch)"),
    ],
)
def test_a_wrong_key_is_told(
    s3_uri: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    if s3.name != "minio":
        pytest.skip("moto takes any key")
    monkeypatch.setenv(variable, value)
    assert said in bucket(s3_uri)


def test_an_endpoint_without_tls_where_tls_is_asked_is_told(
    s3_uri: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.endpoint.replace("http:", "https:"))
    assert "does not speak TLS; give it a certificate, or write http:// if that is intended" in bucket(s3_uri)


def test_nobody_at_the_endpoint_is_told(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert "is the endpoint right and reachable?" in bucket(s3_uri)


def test_a_clock_that_is_far_off_is_told(s3_uri: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import botocore.auth

    if s3.name != "minio":
        pytest.skip("moto has no clock")
    true = botocore.auth.get_current_datetime
    late = timedelta(minutes=20)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *args, **kwargs: true(*args, **kwargs) - late)
    assert "this machine's clock differs too much from the bucket's; correct it (NTP)" in bucket(s3_uri)


def test_a_clock_that_is_a_little_off_is_a_warning(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_probe, "_SKEW_S", -1.0)  # every clock is off by more
    assert "the bucket, which refuses requests that are 900 s off; correct the clock" in bucket(s3_uri)


@pytest.mark.parametrize("kind", [FolderObjects, S3Objects])
def test_a_store_that_ignores_the_condition_of_a_put_is_refused(
    kind: type[FolderObjects | S3Objects], file_uri: str, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(self: FolderObjects | S3Objects, path: str, data: bytes) -> bool:
        self.write(path, data)
        return True

    monkeypatch.setattr(kind, "create", careless)
    uri = file_uri if kind is FolderObjects else s3_uri
    assert "If-None-Match is not honoured" in bucket(uri)
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
    ("config", "arguments", "said"),
    [
        (None, (), "no cluster to talk to"),
        ("a list of words", (), "the kubeconfig cannot be used"),
        (KUBECONFIG, ("--context", "there"), "the kubeconfig has no context `there`; there are here"),
        (KUBECONFIG, (), "the API server at https://127.0.0.1:9 cannot be reached"),
    ],
)
def test_without_a_cluster_the_rest_is_checked_all_the_same(
    launcher: Launcher, recipe_file: Path, tmp_path: Path, config: str | None, arguments: tuple[str, ...], said: str
) -> None:
    if config:
        (tmp_path / "config").write_text(config)
    code, found = told(launcher, str(recipe_file), *arguments, KUBECONFIG=str(tmp_path / "config"))
    assert code == 1
    assert said in found["cluster"]
    assert found["questions"].startswith("ok")


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="no GPU here")
def test_this_machines_gpu_is_compared_with(launcher: Launcher, recipe_file: Path, tmp_path: Path) -> None:
    from tests.contract.test_memory import TINYLLAMA

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **TINYLLAMA}))
    recipe_file.write_text(recipe_file.read_text().replace("tiny-llama", str(tmp_path)))
    assert "of this machine's GPU" in told(launcher, str(recipe_file), "--local")[1]["GPU memory for sft"]
