"""`pull --public-key`: what lands in the folder was signed for that run, whatever is done to the bucket, whenever."""

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
    """An empty store: each test that takes it runs on a folder and on a bucket."""
    return Store(request.getfixturevalue(f"{request.param}_uri"))


@dataclass
class Signed:
    """Two runs of one store, both signed by one key; the model of the second lies in here/model, as it was pulled."""

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
        """What here/ must hold once a run's model is pulled."""
        manifest = self.manifest(record)
        files = {
            file.path: self.store.read(f"{manifest.folder}/{file.path}") or b"" for file in manifest.part("model/")
        }
        assert files
        return files | {"model.intoto.jsonl": statement_of(self.store, record.run)}

    def private_key(self, name: str) -> Any:
        return serialization.load_pem_private_key((self.folder / f"{name}.pem").read_bytes(), None)

    def name_of(self, key: str) -> str:
        """A key's name, as people read it."""
        return short(signing.name_of(signing.read_public_key(self.folder / f"{key}.pub.pem")))


@dataclass
class Made:
    """What two signed runs leave in a store, made once; a folder with the keys."""

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
    """Make a folder hold these files and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def state_of(store: Store) -> dict[str, bytes]:
    return {entry.path: store.read(entry.path) or b"" for entry in store.entries("")}


# What somebody who may write the bucket, and has no key, can do.


def write_statement(signed: Signed, data: bytes) -> None:
    signed.store.write(run_path(signed.record.run, provenance.FILE), data)


def without_a_statement(signed: Signed) -> None:
    signed.store.objects.delete(run_path(signed.record.run, provenance.FILE))


def without_a_signature(signed: Signed) -> None:
    write_statement(signed, signing.parse(statement_of(signed.store, signed.record.run)).payload)


def with_no_signature_in_the_envelope(signed: Signed) -> None:
    write_statement(
        signed, json.dumps(json.loads(statement_of(signed.store, signed.record.run)) | {"signatures": []}).encode()
    )


def signed_by_a_stranger(signed: Signed) -> None:
    payload = signing.parse(statement_of(signed.store, signed.record.run)).payload
    write_statement(signed, signing.sign(payload, signed.private_key("stranger")))


def signed_by_a_stranger_with_our_keys_name(signed: Signed) -> None:
    """And with names that would write lines of their own."""
    payload = signing.parse(statement_of(signed.store, signed.record.run)).payload
    envelope = json.loads(signing.sign(payload, signed.private_key("stranger")))
    name = signing.name_of(signing.read_public_key(signed.folder / "key.pub.pem"))
    signatures = [
        each | {"keyid": keyid} for each in envelope["signatures"] for keyid in (name, "\nok\n", "", "\ud800")
    ]
    write_statement(signed, json.dumps(envelope | {"signatures": signatures * 99}).encode())


def with_a_tampered_statement(signed: Signed) -> None:
    envelope = json.loads(statement_of(signed.store, signed.record.run))
    said = json.loads(base64.b64decode(envelope["payload"]))
    said["subject"][0]["digest"]["sha256"] = "0" * 64
    envelope["payload"] = base64.b64encode(json.dumps(said).encode()).decode()
    write_statement(signed, json.dumps(envelope).encode())


def with_nonsense_for_a_statement(signed: Signed) -> None:
    write_statement(signed, b"[" * 100_000)


def with_the_statement_of_another_run(signed: Signed) -> None:
    write_statement(signed, statement_of(signed.store, signed.other.run))


def swapped_for_the_model_of_another_run(signed: Signed) -> None:
    """Manifest and files, where this run's were."""
    mine, other = signed.manifest(), signed.manifest(signed.other)
    for file in other.files:
        data = signed.store.read(f"{other.folder}/{file.path}")
        signed.store.write(f"{artifact_path('merge', mine.key)}/{other.attempt}/{file.path}", data or b"")
    reseal(signed, other.model_copy(update={"key": mine.key}))


def swapped_along_with_the_statement(signed: Signed) -> None:
    swapped_for_the_model_of_another_run(signed)
    with_the_statement_of_another_run(signed)


def recorded_with_the_model_of_another_run(signed: Signed) -> None:
    """The run's record names another's artifact, which is whole and signed, for that one."""
    stages = signed.record.stages | {"merge": signed.other.stages["merge"]}
    path = run_path(signed.record.run, records.RECORD)
    signed.store.write(path, signed.record.model_copy(update={"stages": stages}).to_bytes())


def remade(signed: Signed, what: str, name: str, data: bytes) -> None:
    """An artifact in which one file is another, with a manifest that fits."""
    manifest = signed.manifest(what=what)
    folder = signed.folder / f"remade-{what}"
    for file in manifest.files:
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.path).write_bytes(signed.store.read(f"{manifest.folder}/{file.path}") or b"")
    (folder / name).write_bytes(data)
    signed.store.objects.delete(f"{artifact_path(manifest.stage, manifest.key)}/{MANIFEST}")
    signed.store.publish(folder, manifest.model_copy(update={"files": (), "attempt": "unpublished"}))


def reseal(signed: Signed, manifest: Manifest) -> None:
    path = f"{artifact_path(manifest.stage, manifest.key)}/{MANIFEST}"
    signed.store.write(path, add_self_digest(manifest.model_dump_json(indent=2), "manifest_sha256"))


def remade_with_another_file(signed: Signed) -> None:
    remade(signed, "model", "model/content.txt", b"another model")


def remade_with_a_file_more(signed: Signed) -> None:
    remade(signed, "model", "model/more.txt", b"more")


def remade_with_a_file_less(signed: Signed) -> None:
    manifest = signed.manifest()
    reseal(
        signed,
        manifest.model_copy(
            update={"files": tuple(file for file in manifest.files if file.path != "model/content.txt")}
        ),
    )


def with_another_byte(signed: Signed) -> None:
    manifest = signed.manifest()
    for file in manifest.part("model/"):
        data = signed.store.read(f"{manifest.folder}/{file.path}")
        assert data
        signed.store.write(f"{manifest.folder}/{file.path}", bytes([data[0] ^ 1]) + data[1:])


DONE_TO_THE_BUCKET: dict[Callable[[Signed], None], str] = {
    without_a_statement: "expected a statement signed by the key {key}, found none; do not use this model",
    without_a_signature: "statement signature is missing; expected one by {key}; do not use this model",
    with_no_signature_in_the_envelope: "statement signature is missing; expected one by {key}",
    signed_by_a_stranger: "statement signature is by another key, which calls itself {stranger}, or of other bytes",
    signed_by_a_stranger_with_our_keys_name: "which calls itself {key}, \\nok\\n, nothing, or of other bytes; expected",
    with_a_tampered_statement: "or of other bytes; expected one by {key}",
    with_nonsense_for_a_statement: "model.intoto.jsonl is neither a statement nor an envelope around one; do not use",
    with_the_statement_of_another_run: "expected a statement about this run, found one about {other}; do not use",
    swapped_for_the_model_of_another_run: "content.txt: expected sha256 {sha256}, as it was signed, found sha256 ",
    swapped_along_with_the_statement: "expected a statement about this run, found one about {other}",
    recorded_with_the_model_of_another_run: "content.txt: expected sha256 {sha256}, as it was signed, found sha256 ",
    remade_with_another_file: "content.txt: expected sha256 {sha256}, as it was signed, found sha256 ",
    remade_with_a_file_more: "more.txt: expected none, as it was signed, found sha256 ",
    remade_with_a_file_less: "content.txt: expected sha256 {sha256}, as it was signed, found none",
    with_another_byte: "model/content.txt: expected sha256 {sha256}, found ",
}


def test_what_was_signed_comes_with_its_statement(signed: Signed, launcher: Launcher) -> None:
    code, out, err = signed.pull(launcher)
    assert (code, err) == (0, "")
    assert f"as the key {signed.name_of('key')} signed it for {signed.record.run}" in out
    assert content(signed.folder / "here") == signed.content(signed.record)
    code, out, err = signed.pull(launcher)
    assert (code, err) == (0, ""), "a folder that holds it already"


@pytest.mark.parametrize("do", DONE_TO_THE_BUCKET, ids=lambda do: do.__name__)
def test_a_model_is_refused(do: Callable[[Signed], None], signed: Signed, launcher: Launcher) -> None:
    before = content(signed.folder / "here")
    assert before == signed.content(signed.other)
    said = DONE_TO_THE_BUCKET[do].format(
        key=signed.name_of("key"),
        stranger=signed.name_of("stranger"),
        other=signed.other.run,
        sha256=signed.manifest().part("model/content.txt")[0].sha256,
    )
    do(signed)
    code, out, err = signed.pull(launcher)
    assert (code, out) == (16, ""), err
    assert len(err.splitlines()) == 1
    assert said in err
    assert content(signed.folder / "here") == before, "nothing changed, nothing half-written"
    assert sorted(path.name for path in (signed.folder / "here").iterdir()) == ["model", "model.intoto.jsonl"]


def test_another_persons_key_is_refused(signed: Signed, launcher: Launcher) -> None:
    before = content(signed.folder / "here")
    code, out, err = signed.pull(launcher, "--into", "here/model", "--public-key", "stranger.pub.pem")
    assert (code, out) == (16, "")
    assert (
        f"calls itself {signed.name_of('key')}, or of other bytes; expected one by {signed.name_of('stranger')}" in err
    )
    assert content(signed.folder / "here") == before
    code, out, err = signed.pull(launcher, "--into", "new/model", "--public-key", "key.pem")
    assert code == 12, "a private key is no public one"
    assert not (signed.folder / "new").exists()


@pytest.mark.parametrize("what", [what for what in PARTS if what != "model"])
def test_adapters_and_the_report_are_held_to_the_statement_too(what: str, signed: Signed, launcher: Launcher) -> None:
    given = ("--what", what, "--into", f"new/{what}", "--public-key", "key.pub.pem")
    code, out, err = signed.pull(launcher, *given)
    assert (code, err) == (0, "")
    assert "signed it" in out
    before = content(signed.folder / "new")
    assert before
    remade(signed, what, "report.md" if what == "report" else "adapter/content.txt", b"another")
    code, out, err = signed.pull(launcher, *given, "--force")
    assert (code, out) == (16, "")
    stage = PARTS[what][0]
    assert f"{signed.record.run}: {stage}: expected sha256 " in err
    assert content(signed.folder / "new") == before
    without_key = signed.pull(launcher, *given[:-2], "--force")
    assert without_key[0] == 0, "who does not ask for a signature gets what the bucket holds"


def test_who_gives_no_key_gets_what_the_bucket_holds(signed: Signed, launcher: Launcher) -> None:
    remade_with_another_file(signed)
    with_nonsense_for_a_statement(signed)
    code, out, err = signed.pull(launcher, *FOR_PULL[:2])
    assert (code, err) == (0, "")
    assert "signed" not in out
    assert (signed.folder / "here/model/content.txt").read_text() == "another model"


def test_a_model_made_again_of_the_same_bytes_is_still_the_signed_one(signed: Signed, launcher: Launcher) -> None:
    """Its manifest is another: who made it when."""
    before = signed.manifest()
    remade(signed, "model", "card.md", b"beside the model")
    assert signed.manifest().sha256() != before.sha256()
    assert signed.pull(launcher)[0] == 0


class Moments:
    """Runs an act before the nth time that anything is asked of the store."""

    def __init__(self, objects: type, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.act = -1, lambda: None
        for verb in ("read", "download", "entries"):
            monkeypatch.setattr(objects, verb, self._counted(getattr(objects, verb)))

    def _counted(self, ask: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self.act()
            return ask(*arguments, **named)

        return counted

    def before(self, count: int, act: Callable[[], None]) -> None:
        self.left, self.act = count, act


def turn(store: Store, before: dict[str, bytes], after: dict[str, bytes]) -> None:
    """Make a store that holds `before`, or something between the two, hold `after`."""
    for path in before.keys() | after.keys():
        if path not in after:
            store.objects.delete(path)
        elif before.get(path) != after[path]:
            store.write(path, after[path])


@pytest.mark.parametrize("begins_good", [True, False], ids=["then it is swapped", "then it is put right"])
@pytest.mark.parametrize(
    "do",
    [
        swapped_for_the_model_of_another_run,
        swapped_along_with_the_statement,
        remade_with_another_file,
        with_another_byte,
    ],
    ids=lambda do: do.__name__,
)
def test_a_swap_at_any_moment_of_a_pull_brings_what_was_signed_or_nothing(
    do: Callable[[Signed], None], begins_good: bool, signed: Signed, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, old = signed.content(signed.record), signed.content(signed.other)
    good = state_of(signed.store)
    do(signed)
    evil = state_of(signed.store)
    assert good != evil
    first, then = (good, evil) if begins_good else (evil, good)
    moments = Moments(type(signed.store.objects), monkeypatch)
    command = ["pull", signed.record.run, "--store", signed.store.uri, *FOR_PULL]
    refused = brought = 0
    for count in range(1, 100):
        turn(signed.store, then, first)
        restore(signed.folder / "here", old)
        moments.before(count, lambda: turn(signed.store, first, then))
        try:
            cli.cli.main(command, standalone_mode=False)
            brought += 1
            assert content(signed.folder / "here") == wanted
        except IntegrityError:
            refused += 1
            assert content(signed.folder / "here") == old
        if moments.left > 0:
            break
    assert count < 99
    assert refused
    assert brought
