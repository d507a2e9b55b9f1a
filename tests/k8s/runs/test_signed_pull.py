"""`pull --public-key` writes only what was signed for the run, whatever an attacker does to the bucket, and when."""

import base64
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from llamarefine_jobs.contract.artifact import MANIFEST, Manifest, artifact_path, run_path, short
from llamarefine_jobs.contract.errors import IntegrityError
from llamarefine_jobs.contract.self_digest import add_self_digest
from llamarefine_jobs.recipe_file import parse_recipe
from llamarefine_jobs.sources.pinning import pin
from llamarefine_jobs.store import Store
from llamarefine_k8s import cli
from llamarefine_k8s.runs import provenance, records, signing
from llamarefine_k8s.runs.records import RunRecord
from llamarefine_k8s.runs.results import PARTS, part_of
from tests.k8s.conftest import RECIPE, Launcher
from tests.k8s.runs.test_provenance import drive, statement_of, write_keys
from tests.store.samples import content

FOR_PULL = ("--into", "here/model", "--public-key", "key.pub.pem")


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    """An empty store, in a folder and in a bucket."""
    return Store(request.getfixturevalue(f"{request.param}_uri"))


@dataclass
class Signed:
    """Two runs of one store, both signed by one key; here/model holds the second run's model, as after a pull."""

    store: Store
    record: RunRecord
    other: RunRecord
    folder: Path

    def pull(self, launcher: Launcher, *arguments: str) -> tuple[int, str, str]:
        given = arguments or FOR_PULL
        return launcher.run("pull", self.record.run, "--store", self.store.uri, *given)

    def manifest(self, record: RunRecord | None = None, what: str = "model") -> Manifest:
        return part_of(self.store, record or self.record, what)

    def content(self, record: RunRecord) -> dict[str, bytes]:
        """Return the files that here/ must hold after a run's model was pulled."""
        manifest = self.manifest(record)
        files = {
            file.path: self.store.read(f"{manifest.folder}/{file.path}") or b"" for file in manifest.part("model/")
        }
        assert files
        return files | {"model.intoto.jsonl": statement_of(self.store, record.run)}

    def private_key(self, name: str) -> Any:
        return serialization.load_pem_private_key((self.folder / f"{name}.pem").read_bytes(), None)

    def name_of(self, key: str) -> str:
        """Return the short name of a key."""
        return short(signing.name_of(signing.read_public_key(self.folder / f"{key}.pub.pem")))


@dataclass
class Made:
    """The content of a store after two signed runs, made once for all tests, and a folder with the keys."""

    folder: Path
    record: RunRecord
    other: RunRecord
    state: dict[str, bytes]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    private, _ = write_keys(folder)
    write_keys(folder, name="stranger")
    (folder / "questions.csv").write_text("question,answer\nWhat is kind?,A cluster.\n")
    text = RECIPE.replace("QUESTIONS", str(folder / "questions.csv"))
    store = Store(str(folder / "store"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(signing.SIGNING_KEY, str(private))
        record, other = (
            drive(pin(parse_recipe(text, "small", overrides)), store) for overrides in ([], ["merge.dtype=float32"])
        )
    assert record.run != other.run
    return Made(folder, record, other, state_of(store))


@pytest.fixture
def signed(made: Made, store: Store, tmp_path: Path) -> Signed:
    for path, data in made.state.items():
        store.write(path, data)
    for key in made.folder.glob("*.pem"):
        shutil.copy(key, tmp_path)
    signed = Signed(store, made.record, made.other, tmp_path)
    restore(tmp_path / "here", signed.content(signed.other))
    return signed


def restore(folder: Path, files: dict[str, bytes]) -> None:
    """Make a folder contain exactly these files."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def state_of(store: Store) -> dict[str, bytes]:
    return {entry.path: store.read(entry.path) or b"" for entry in store.entries("")}


# What an attacker who can write to the bucket, but has no key, can do.


def write_statement(signed: Signed, data: bytes) -> None:
    signed.store.write(run_path(signed.record.run, provenance.FILE), data)


def delete_the_statement(signed: Signed) -> None:
    signed.store.objects.delete(run_path(signed.record.run, provenance.FILE))


def remove_the_envelope(signed: Signed) -> None:
    write_statement(signed, signing.parse(statement_of(signed.store, signed.record.run)).payload)


def remove_the_signatures(signed: Signed) -> None:
    write_statement(
        signed, json.dumps(json.loads(statement_of(signed.store, signed.record.run)) | {"signatures": []}).encode()
    )


def use_another_key(signed: Signed) -> None:
    payload = signing.parse(statement_of(signed.store, signed.record.run)).payload
    write_statement(signed, signing.sign(payload, signed.private_key("stranger")))


def use_another_key_with_our_name(signed: Signed) -> None:
    """Also under names with line breaks, which must not break the error message into lines."""
    payload = signing.parse(statement_of(signed.store, signed.record.run)).payload
    envelope = json.loads(signing.sign(payload, signed.private_key("stranger")))
    name = signing.name_of(signing.read_public_key(signed.folder / "key.pub.pem"))
    signatures = [
        each | {"keyid": keyid} for each in envelope["signatures"] for keyid in (name, "\nok\n", "", "\ud800")
    ]
    write_statement(signed, json.dumps(envelope | {"signatures": signatures * 99}).encode())


def change_the_statement(signed: Signed) -> None:
    envelope = json.loads(statement_of(signed.store, signed.record.run))
    content = json.loads(base64.b64decode(envelope["payload"]))
    content["subject"][0]["digest"]["sha256"] = "0" * 64
    envelope["payload"] = base64.b64encode(json.dumps(content).encode()).decode()
    write_statement(signed, json.dumps(envelope).encode())


def write_nonsense_as_the_statement(signed: Signed) -> None:
    write_statement(signed, b"[" * 100_000)


def use_the_statement_of_another_run(signed: Signed) -> None:
    write_statement(signed, statement_of(signed.store, signed.other.run))


def swap_in_the_model_of_another_run(signed: Signed) -> None:
    """Replace this run's manifest and files by those of another run."""
    mine, other = signed.manifest(), signed.manifest(signed.other)
    for file in other.files:
        data = signed.store.read(f"{other.folder}/{file.path}")
        signed.store.write(f"{artifact_path('merge', mine.key)}/{other.attempt}/{file.path}", data or b"")
    write_manifest(signed, other.model_copy(update={"key": mine.key}))


def swap_in_model_and_statement_of_another_run(signed: Signed) -> None:
    swap_in_the_model_of_another_run(signed)
    use_the_statement_of_another_run(signed)


def record_the_model_of_another_run(signed: Signed) -> None:
    """Make the run's record name another run's artifact, which is intact and signed for that run."""
    stages = signed.record.stages | {"merge": signed.other.stages["merge"]}
    path = run_path(signed.record.run, records.RECORD)
    signed.store.write(path, signed.record.model_copy(update={"stages": stages}).to_bytes())


def republish(signed: Signed, what: str, name: str, data: bytes) -> None:
    """Publish an artifact again with one file added or changed, and with a valid manifest."""
    manifest = signed.manifest(what=what)
    folder = signed.folder / f"republished-{what}"
    for file in manifest.files:
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.path).write_bytes(signed.store.read(f"{manifest.folder}/{file.path}") or b"")
    (folder / name).write_bytes(data)
    signed.store.objects.delete(f"{artifact_path(manifest.stage, manifest.key)}/{MANIFEST}")
    signed.store.publish(folder, manifest.model_copy(update={"files": (), "attempt": "unpublished"}))


def write_manifest(signed: Signed, manifest: Manifest) -> None:
    path = f"{artifact_path(manifest.stage, manifest.key)}/{MANIFEST}"
    signed.store.write(path, add_self_digest(manifest.model_dump_json(indent=2), "manifest_sha256"))


def republish_with_another_file(signed: Signed) -> None:
    republish(signed, "model", "model/content.txt", b"another model")


def republish_with_a_file_more(signed: Signed) -> None:
    republish(signed, "model", "model/more.txt", b"more")


def republish_with_a_file_less(signed: Signed) -> None:
    manifest = signed.manifest()
    write_manifest(
        signed,
        manifest.model_copy(
            update={"files": tuple(file for file in manifest.files if file.path != "model/content.txt")}
        ),
    )


def change_a_byte(signed: Signed) -> None:
    manifest = signed.manifest()
    for file in manifest.part("model/"):
        data = signed.store.read(f"{manifest.folder}/{file.path}")
        assert data
        signed.store.write(f"{manifest.folder}/{file.path}", bytes([data[0] ^ 1]) + data[1:])


ATTACKS: dict[Callable[[Signed], None], str] = {
    delete_the_statement: "expected a statement signed by the key {key}, found none; do not use this model",
    remove_the_envelope: "statement signature is missing; expected one by {key}; do not use this model",
    remove_the_signatures: "statement signature is missing; expected one by {key}",
    use_another_key: "statement signature is by another key, which claims the name {stranger}, or over other bytes",
    use_another_key_with_our_name: "which claims the name {key}, \\nok\\n, nothing, or over other bytes; expected",
    change_the_statement: "or over other bytes; expected one by {key}",
    write_nonsense_as_the_statement: "model.intoto.jsonl is neither a statement nor an envelope around one; do not use",
    use_the_statement_of_another_run: "expected a statement about this run, found one about {other}; do not use",
    swap_in_the_model_of_another_run: "content.txt: expected sha256 {sha256}, as it was signed, found sha256 ",
    swap_in_model_and_statement_of_another_run: "expected a statement about this run, found one about {other}",
    record_the_model_of_another_run: "content.txt: expected sha256 {sha256}, as it was signed, found sha256 ",
    republish_with_another_file: "content.txt: expected sha256 {sha256}, as it was signed, found sha256 ",
    republish_with_a_file_more: "more.txt: expected none, as it was signed, found sha256 ",
    republish_with_a_file_less: "content.txt: expected sha256 {sha256}, as it was signed, found none",
    change_a_byte: "model/content.txt: expected sha256 {sha256}, found ",
}


def test_a_signed_model_is_pulled_with_its_statement(signed: Signed, launcher: Launcher) -> None:
    code, out, err = signed.pull(launcher)
    assert (code, err) == (0, "")
    assert f"signed for {signed.record.run} by the key {signed.name_of('key')}" in out
    assert content(signed.folder / "here") == signed.content(signed.record)
    code, out, err = signed.pull(launcher)
    assert (code, err) == (0, ""), "pulling again into the same folder"


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_an_attacked_model_is_refused(attack: Callable[[Signed], None], signed: Signed, launcher: Launcher) -> None:
    before = content(signed.folder / "here")
    assert before == signed.content(signed.other)
    message = ATTACKS[attack].format(
        key=signed.name_of("key"),
        stranger=signed.name_of("stranger"),
        other=signed.other.run,
        sha256=signed.manifest().part("model/content.txt")[0].sha256,
    )
    attack(signed)
    code, out, err = signed.pull(launcher)
    assert (code, out) == (16, ""), err
    assert len(err.splitlines()) == 1
    assert message in err
    assert content(signed.folder / "here") == before, "the old folder is unchanged"
    assert sorted(path.name for path in (signed.folder / "here").iterdir()) == ["model", "model.intoto.jsonl"]


def test_a_key_that_did_not_sign_refuses_the_model(signed: Signed, launcher: Launcher) -> None:
    before = content(signed.folder / "here")
    code, out, err = signed.pull(launcher, "--into", "here/model", "--public-key", "stranger.pub.pem")
    assert (code, out) == (16, "")
    assert (
        f"claims the name {signed.name_of('key')}, or over other bytes; expected one by {signed.name_of('stranger')}"
        in err
    )
    assert content(signed.folder / "here") == before
    code, out, err = signed.pull(launcher, "--into", "new/model", "--public-key", "key.pem")
    assert code == 12, "a private key is not accepted as a public one"
    assert not (signed.folder / "new").exists()


@pytest.mark.parametrize("what", [what for what in PARTS if what != "model"])
def test_adapters_and_the_report_are_checked_against_the_statement_too(
    what: str, signed: Signed, launcher: Launcher
) -> None:
    given = ("--what", what, "--into", f"new/{what}", "--public-key", "key.pub.pem")
    code, out, err = signed.pull(launcher, *given)
    assert (code, err) == (0, "")
    assert "signed for" in out
    before = content(signed.folder / "new")
    assert before
    republish(signed, what, "report.md" if what == "report" else "adapter/content.txt", b"another")
    code, out, err = signed.pull(launcher, *given, "--force")
    assert (code, out) == (16, "")
    stage = PARTS[what][0]
    assert f"{signed.record.run}: {stage}: expected sha256 " in err
    assert content(signed.folder / "new") == before
    without_key = signed.pull(launcher, *given[:-2], "--force")
    assert without_key[0] == 0, "without --public-key, pull copies what the bucket holds"


def test_without_a_key_pull_copies_what_the_bucket_holds(signed: Signed, launcher: Launcher) -> None:
    republish_with_another_file(signed)
    write_nonsense_as_the_statement(signed)
    code, out, err = signed.pull(launcher, *FOR_PULL[:2])
    assert (code, err) == (0, "")
    assert "signed" not in out
    assert (signed.folder / "here/model/content.txt").read_text() == "another model"


def test_a_model_made_again_with_the_same_bytes_is_still_accepted(signed: Signed, launcher: Launcher) -> None:
    """Only its manifest differs."""
    before = signed.manifest()
    republish(signed, "model", "card.md", b"beside the model")
    assert signed.manifest().sha256() != before.sha256()
    assert signed.pull(launcher)[0] == 0


class Trigger:
    """Calls a function just before the nth read from the store."""

    def __init__(self, objects: type, monkeypatch: pytest.MonkeyPatch) -> None:
        self.remaining, self.action = -1, lambda: None
        for verb in ("read", "download", "entries"):
            monkeypatch.setattr(objects, verb, self._counted(getattr(objects, verb)))

    def _counted(self, read: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.remaining -= 1
            if self.remaining == 0:
                self.action()
            return read(*arguments, **named)

        return counted

    def before_read(self, count: int, action: Callable[[], None]) -> None:
        self.remaining, self.action = count, action


def change_store(store: Store, before: dict[str, bytes], after: dict[str, bytes]) -> None:
    """Make a store that contains `before`, or something between the two, contain `after`."""
    for path in before.keys() | after.keys():
        if path not in after:
            store.objects.delete(path)
        elif before.get(path) != after[path]:
            store.write(path, after[path])


@pytest.mark.parametrize("starts_intact", [True, False], ids=["attacked during the pull", "restored during the pull"])
@pytest.mark.parametrize(
    "attack",
    [
        swap_in_the_model_of_another_run,
        swap_in_model_and_statement_of_another_run,
        republish_with_another_file,
        change_a_byte,
    ],
    ids=lambda attack: attack.__name__,
)
def test_an_attack_at_any_moment_of_a_pull_yields_the_signed_model_or_nothing(
    attack: Callable[[Signed], None], starts_intact: bool, signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, old = signed.content(signed.record), signed.content(signed.other)
    good = state_of(signed.store)
    attack(signed)
    evil = state_of(signed.store)
    assert good != evil
    first, then = (good, evil) if starts_intact else (evil, good)
    trigger = Trigger(type(signed.store.objects), monkeypatch)
    command = ["pull", signed.record.run, "--store", signed.store.uri, *FOR_PULL]
    refused = pulled = 0
    for count in range(1, 100):
        change_store(signed.store, then, first)
        restore(signed.folder / "here", old)
        trigger.before_read(count, lambda: change_store(signed.store, first, then))
        try:
            cli.cli.main(command, standalone_mode=False)
            pulled += 1
            assert content(signed.folder / "here") == expected
        except IntegrityError:
            refused += 1
            assert content(signed.folder / "here") == old
        if trigger.remaining > 0:
            break
    assert count < 99
    assert refused
    assert pulled
