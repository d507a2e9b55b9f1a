"""The statement of what a run's model was made from: its content, its signature, and its checks."""

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from llamarefine_jobs.contract.artifact import run_path
from llamarefine_jobs.contract.errors import AccessError, IntegrityError
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.store import Store
from llamarefine_k8s.runs import provenance, signing, verification
from llamarefine_k8s.runs.pipeline import Pipeline
from llamarefine_k8s.runs.records import RunRecord
from tests.k8s.acting import FakeExecutor
from tests.k8s.conftest import Launcher
from tests.k8s.runs.test_pipeline import RecordingObserver

KEYS = {"ed25519": ed25519.Ed25519PrivateKey.generate, "ecdsa": lambda: ec.generate_private_key(ec.SECP256R1())}


def write_keys(folder: Path, kind: str = "ed25519", name: str = "key") -> tuple[Path, Path]:
    """Write a key pair as two PEM files; return the paths of the private and the public key."""
    key = KEYS[kind]()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


def drive(recipe: Recipe, store: Store) -> RunRecord:
    return Pipeline(recipe, store, FakeExecutor(), RecordingObserver(), retry_after_s=()).drive()


def statement_of(store: Store, run: str) -> bytes:
    data = store.read(run_path(run, provenance.FILE))
    assert data
    return data


def states(store: Store, record: RunRecord, public: Path | None = None) -> dict[str, str]:
    """Return the states of the checks of the statement, by name."""
    key = signing.read_public_key(public) if public else None
    checks = [check for check in verification.verify(store, record, key) if check.name.startswith("statement")]
    assert checks
    return {check.name: check.state for check in checks}


@pytest.mark.parametrize("kind", KEYS)
def test_a_signed_run_verifies_by_its_public_key_and_by_no_other(
    kind: str, recipe: Callable[..., Recipe], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = write_keys(tmp_path, kind)
    _, other = write_keys(tmp_path, kind, "other")
    monkeypatch.setenv(signing.SIGNING_KEY, str(private))
    record = drive(recipe(), store)
    assert states(store, record, public) == {"statement signature": "ok", "statement": "ok"}
    assert states(store, record, other)["statement signature"] == "FAIL"


def test_the_statement_names_the_models_files_and_its_materials(
    recipe: Callable[..., Recipe], store: Store, tmp_path: Path
) -> None:
    pinned = recipe()
    record = drive(pinned, store)
    content = json.loads(statement_of(store, record.run))
    merge = store.manifest("merge", str(record.stages["merge"].key))
    assert merge
    assert [(each["name"], each["digest"]["sha256"]) for each in content["subject"]] == [
        (file.path.removeprefix("model/"), file.sha256) for file in merge.part("model/")
    ]
    made_from = {part["name"]: part for part in content["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert set(made_from) == {"base source", "questions source", "preferences source", "prepare", "sft", "dpo"}
    assert made_from["questions source"]["digest"] == {"sha256": pinned.prepare.questions.fingerprint.split(":")[1]}
    assert content["predicate"]["runDetails"]["metadata"]["invocationId"] == record.run
    assert str(tmp_path) not in json.dumps(content), "local paths stay out of the statement"


def test_the_same_artifacts_give_the_same_statement(recipe: Callable[..., Recipe], store: Store) -> None:
    first = statement_of(store, drive(recipe(), store).run)
    assert statement_of(store, drive(recipe(), store).run) == first


def test_driving_a_signed_run_again_without_the_key_keeps_its_signature(
    recipe: Callable[..., Recipe], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = write_keys(tmp_path)
    monkeypatch.setenv(signing.SIGNING_KEY, private.read_text())
    drive(recipe(), store)
    monkeypatch.delenv(signing.SIGNING_KEY)
    assert states(store, drive(recipe(), store), public) == {"statement signature": "ok", "statement": "ok"}


def test_a_changed_statement_fails_signed_or_not(
    recipe: Callable[..., Recipe], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = write_keys(tmp_path)
    monkeypatch.setenv(signing.SIGNING_KEY, str(private))
    record = drive(recipe(), store)
    path = run_path(record.run, provenance.FILE)
    envelope = json.loads(statement_of(store, record.run))
    content = json.loads(base64.b64decode(envelope["payload"]))
    content["subject"][0]["digest"]["sha256"] = "0" * 64
    changed = json.dumps(content).encode()
    store.write(path, json.dumps(envelope | {"payload": base64.b64encode(changed).decode()}).encode())
    assert states(store, record, public) == {"statement signature": "FAIL", "statement": "FAIL"}
    store.write(path, changed)
    assert states(store, record, public) == {"statement signature": "FAIL", "statement": "FAIL"}
    assert states(store, record)["statement"] == "FAIL"


def test_a_replaced_model_with_a_valid_manifest_fails_against_the_signed_statement(
    recipe: Callable[..., Recipe], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anyone who can write to the bucket can write manifests, but not sign."""
    private, public = write_keys(tmp_path)
    monkeypatch.setenv(signing.SIGNING_KEY, str(private))
    record = drive(recipe(), store)
    merge = store.manifest("merge", str(record.stages["merge"].key))
    assert merge
    for entry in list(store.entries(f"artifacts/merge/{merge.key}/")):
        store.objects.delete(entry.path)
    (tmp_path / "evil/model").mkdir(parents=True)
    (tmp_path / "evil/model/content.txt").write_text("another model")
    store.publish(tmp_path / "evil", merge.model_copy(update={"files": (), "attempt": "unpublished"}))
    assert states(store, record, public) == {"statement signature": "ok", "statement": "FAIL"}
    key = signing.read_public_key(public)
    failed = next(check for check in verification.verify(store, record, key) if check.name == "statement")
    assert failed.to_do == "do not use this model", "resubmitting would sign what someone put there"


@pytest.mark.parametrize(
    "changes",
    [
        {"subject": None},
        {"subject": 1},
        {"subject": ["content.txt"]},
        {"subject": [{"name": ["content.txt"], "digest": {"sha256": 1}}]},
        {"subject": [{"name": "content.txt", "digest": {"sha512": "0"}}]},
        {"predicateType": "https://example.com/of-another-kind"},
        {"predicate": []},
    ],
)
def test_another_statement_signed_by_the_key_is_not_accepted_for_the_model(
    changes: dict[str, object], recipe: Callable[..., Recipe], store: Store, tmp_path: Path
) -> None:
    private, public = write_keys(tmp_path)
    record, key = drive(recipe(), store), signing.read_public_key(public)
    merge = store.manifest("merge", str(record.stages["merge"].key))
    assert merge
    content = json.loads(statement_of(store, record.run))
    for applied in ({}, changes):
        payload = json.dumps(content | applied).encode()
        line = signing.sign(payload, serialization.load_pem_private_key(private.read_bytes(), None))  # type: ignore[arg-type]
        store.write(run_path(record.run, provenance.FILE), line)
        if not applied:
            assert provenance.require(store, record.run, merge, key) == line
            continue
        with pytest.raises(IntegrityError, match="do not use this model"):
            provenance.require(store, record.run, merge, key)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"payloadType": 1}', b"[" * 100_000, b'{"_type": 1}', b"\xff"])
def test_a_file_that_is_not_a_statement_is_one_failed_check(
    text: bytes, recipe: Callable[..., Recipe], store: Store
) -> None:
    record = drive(recipe(), store)
    store.write(run_path(record.run, provenance.FILE), text)
    assert states(store, record)["statement"] == "FAIL"


def test_an_unusable_signing_key_is_an_error_before_any_stage_runs(
    recipe: Callable[..., Recipe], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfit = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    executor = FakeExecutor()
    for given in (unfit.decode(), "-----BEGIN nonsense", str(tmp_path / "missing.pem")):
        monkeypatch.setenv(signing.SIGNING_KEY, given)
        with pytest.raises(AccessError) as caught:
            Pipeline(recipe(), store, executor, RecordingObserver(), retry_after_s=()).drive()
        assert "PRIVATE" not in str(caught.value)
        assert unfit.decode()[40:80] not in str(caught.value)
    assert executor.ran == []


def test_pull_writes_the_statement_beside_the_model_and_verify_checks_it(
    launcher: Launcher, recipe_file: Path, tmp_path: Path
) -> None:
    private, public = write_keys(tmp_path)
    signed = {signing.SIGNING_KEY: str(private)}
    assert launcher.run("run", str(recipe_file), "--store", "store", "--into", "out", **signed)[0] == 0
    code, out, err = launcher.run("pull", "--store", "store", "--into", "model")
    assert code == 0, err
    assert "model.intoto.jsonl" in out
    assert (tmp_path / "model.intoto.jsonl").read_bytes() == (tmp_path / "out/model.intoto.jsonl").read_bytes()
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"content.txt"}
    assert launcher.run("verify", "--store", "store", "--public-key", str(public))[0] == 0
    _, other = write_keys(tmp_path, name="other")
    code, out, err = launcher.run("verify", "--store", "store", "--public-key", str(other))
    assert code == 16
    assert "is by another key" in out


@pytest.mark.parametrize(
    "recipe_of_record",
    [{"name": "x"}, {"prepare": []}, {"prepare": {"base": 1}}, {"x": float("inf")}],
)
def test_a_record_without_a_recipe_is_one_failed_check(
    recipe_of_record: dict[str, object], recipe: Callable[..., Recipe], store: Store
) -> None:
    record = drive(recipe(), store)
    assert states(store, record.model_copy(update={"recipe": recipe_of_record}))["statement"] == "FAIL"


def forged(line: bytes, **changes: object) -> bytes:
    return json.dumps(json.loads(line) | changes).encode()


@pytest.mark.parametrize("kind", KEYS)
def test_only_an_envelope_signed_by_the_key_passes(kind: str, tmp_path: Path) -> None:
    keys = {
        name: write_keys(tmp_path, each, name) for name, each in (("own", kind), ("ed", "ed25519"), ("ec", "ecdsa"))
    }
    private = {name: serialization.load_pem_private_key(files[0].read_bytes(), None) for name, files in keys.items()}
    public = signing.read_public_key(keys["own"][1])
    line = signing.sign(b'{"a": 1}', private["own"])  # type: ignore[arg-type]
    own = json.loads(line)["signatures"][0]
    others = [json.loads(signing.sign(b'{"a": 1}', private[name]))["signatures"][0] for name in ("ed", "ec")]  # type: ignore[arg-type]
    claimed = [other | {"keyid": own["keyid"]} for other in others]
    assert signing.is_signed_by(signing.parse(line), public)
    assert signing.is_signed_by(signing.parse(forged(line, signatures=[*others, own])), public), (
        "one of several signatures is by the key"
    )
    bare = {"keyid": own["keyid"], "sig": base64.b64encode(sign_without_type(private["own"], b'{"a": 1}')).decode()}
    for signatures in ([], others, claimed, [own | {"sig": ""}], [own | {"sig": own["sig"][:-8] + "AAAAAA=="}], [bare]):
        assert not signing.is_signed_by(signing.parse(forged(line, signatures=signatures)), public)
    other_bytes = base64.b64encode(b'{"a": 2}').decode()
    assert not signing.is_signed_by(signing.parse(forged(line, payload=other_bytes)), public)
    for changes in ({"payloadType": "application/json"}, {"signatures": None}, {"signatures": [1]}, {"payload": "%"}):
        with pytest.raises(IntegrityError):
            signing.parse(forged(line, **changes))


def sign_without_type(key: object, message: bytes) -> bytes:
    """Sign the payload alone, without its type: not what DSSE signs."""
    from cryptography.hazmat.primitives import hashes

    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(message)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key.sign(message, ec.ECDSA(hashes.SHA256()))
