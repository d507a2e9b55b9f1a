"""What a run's model was made from, as a statement that travels with it: in-toto's form, SLSA's provenance v1.

It is written when a run ends, ``runs/<run>/model.intoto.jsonl``, and comes beside the model when that is pulled, never
into its folder: two equal runs make equal folders. All of it comes from the artifacts' manifests and the run's recipe,
so the same artifacts give the same bytes; no name of a person, a machine or a local path is in it. Who vouches for it
is whoever holds the key that it is signed with.
https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md, https://slsa.dev/spec/v1.0/provenance
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llamarefine_jobs.contract.artifact import MANIFEST, Manifest, artifact_path, run_path, short
from llamarefine_jobs.contract.errors import IntegrityError, from_os_error
from llamarefine_jobs.contract.version import __version__
from llamarefine_jobs.store import Store
from llamarefine_k8s.runs import signing
from llamarefine_k8s.runs.checks import Check, fail, ok, warning
from llamarefine_k8s.runs.records import RunRecord

if TYPE_CHECKING:
    from llamarefine_k8s.runs.signing import PrivateKey, PublicKey

FILE = "model.intoto.jsonl"
_STATEMENT, _PREDICATE = "https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1"
_BUILD, _BUILDER = "urn:llamarefine:pipeline:1", "urn:llamarefine:driver"
_MODEL = "model/"
_RESULTS = ("merge", "evaluate")  # what is made of the others: the model's own artifact, and the report on it
_NAME = "statement"
_MATERIALS = "what it was made from"
_AGAIN = "submit the same recipe again: nothing is trained anew, and the statement is written anew"
_DO_NOT_USE = "do not use this model"
_PLACES = {
    "the model's files": ("subject",),
    "the run": ("predicate", "runDetails", "metadata", "invocationId"),
    _MATERIALS: ("predicate", "buildDefinition", "resolvedDependencies"),
    "the recipe": ("predicate", "buildDefinition", "externalParameters"),
    "its artifacts": ("predicate", "runDetails", "byproducts"),
    "its form": ("predicateType",),
}


class _Statement(NamedTuple):
    """A run's statement as it was read, once: its bytes, what is signed of them, what that says."""

    data: bytes
    line: signing.Line
    said: Any


def statement(run: str, recipe: Mapping[str, Any], made: Mapping[str, Manifest]) -> bytes:
    """The statement about a finished run's model: canonical JSON, one line. `made` is each stage's manifest."""
    parts = [(manifest, _artifact(manifest)) for manifest in made.values()]
    said = {
        "_type": _STATEMENT,
        "predicateType": _PREDICATE,
        "subject": _files(made["merge"]),
        "predicate": {
            "buildDefinition": {
                "buildType": _BUILD,
                "externalParameters": {
                    "recipe_sha256": hashlib.sha256(_canonical(recipe)).hexdigest(),
                    "stages": {stage: manifest.recipe for stage, manifest in made.items()},
                },
                "internalParameters": {"prompt_template_sha256": made["merge"].prompt_template_sha256},
                "resolvedDependencies": [
                    *_sources(recipe),
                    *(part for manifest, part in parts if manifest.stage not in _RESULTS),
                ],
            },
            "runDetails": {
                "builder": {"id": _BUILDER, "version": {"llamarefine": made["merge"].package_version}},
                "metadata": {
                    "invocationId": run,
                    "startedOn": min(manifest.started_at for manifest in made.values()).isoformat(),
                    "finishedOn": max(manifest.finished_at for manifest in made.values()).isoformat(),
                },
                "byproducts": [part for manifest, part in parts if manifest.stage in _RESULTS],
            },
        },
    }
    return _canonical(said)


def publish(store: Store, record: RunRecord, made: Mapping[str, Manifest], key: "PrivateKey | None") -> None:
    """Write the statement about a run, signed where there is a key. One that is signed is not replaced by its like."""
    payload = statement(record.run, record.recipe, made)
    path = run_path(record.run, FILE)
    if key is None and (earlier := store.read(path)) is not None:
        try:
            if signing.parse(earlier).payload == payload:
                return
        except IntegrityError:
            pass
    store.write(path, signing.sign(payload, key) if key else payload + b"\n")


def require(store: Store, run: str, manifest: Manifest, key: "PublicKey") -> bytes:
    """The statement about a run, if `key` signed it and it names all that `manifest` does; else IntegrityError.

    It names a model's files, and any other artifact's manifest, by their sha256. So what is fetched by this very
    manifest is what was signed, whatever is in the store by then; the same goes for these bytes of the statement.
    """
    try:
        found = _find(store, run)
    except IntegrityError as error:
        raise IntegrityError(f"{run}: {error}; {_DO_NOT_USE}") from None
    if found is None:
        raise IntegrityError(
            f"{run}: expected a statement signed by the key {short(signing.name_of(key))}, found none; {_DO_NOT_USE} "
            f"before it has one: it comes when the run ends, signed where that has {signing.SIGNING_KEY}"
        )
    signature = _signature(found.line, key)
    if signature.state != "ok":
        raise IntegrityError(f"{run}: {signature.name} {signature}")
    about = _at(found.said, _PLACES["the run"]) if _at(found.said, _PLACES["its form"]) == _PREDICATE else None
    if about != run:
        other = f"{about:.80}" if isinstance(about, str) else "something else"
        raise IntegrityError(f"{run}: expected a statement about this run, found one about {other}; {_DO_NOT_USE}")
    if manifest.stage == "merge":
        signed, here = _digests(_at(found.said, _PLACES["the model's files"])), _digests(_files(manifest))
    else:
        place = _PLACES["its artifacts" if manifest.stage in _RESULTS else _MATERIALS]
        here = _digests([_artifact(manifest)])
        signed = {name: digest for name, digest in _digests(_at(found.said, place)).items() if name in here}
    for name in sorted(signed.keys() | here.keys()):
        expected, made = (f"sha256 {digests[name]!s:.64}" if name in digests else "none" for digests in (signed, here))
        if expected != made:
            raise IntegrityError(
                f"{run}: {name}: expected {expected}, as it was signed, found {made}; {_DO_NOT_USE}: somebody changed "
                "it in the store"
            )
    return found.data


def pull(store: Store, run: str, model: Path, signed: bytes | None = None) -> Path | None:
    """Bring the statement about a run beside the folder `model`; None, and nothing done, where there is none.

    `signed` is the statement where `require` gave it: it is not read again.
    """
    data = store.read(run_path(run, FILE)) if signed is None else signed
    if data is None:
        return None
    place = model.absolute().with_name(f"{model.absolute().name}.intoto.jsonl")
    temporary = place.with_name(f".{place.name}-{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, place)
    except OSError as error:
        raise from_os_error(error) from None
    finally:
        temporary.unlink(missing_ok=True)
    return place


def check(
    store: Store, record: RunRecord, made: Mapping[str, Manifest], key: "PublicKey | None" = None
) -> Iterator[Check]:
    """Whether the statement is signed by `key`, and says what the artifacts are: `made`, as the store has them."""
    if record.state != "done" and key is None:
        return
    try:
        found = _find(store, record.run)
    except IntegrityError as error:
        yield fail(_NAME, str(error), _AGAIN)
        return
    if found is None:
        yield (fail if key else warning)(_NAME, "the run has none", _AGAIN)
        return
    yield _signature(found.line, key)
    if {"merge", "prepare", "sft", "dpo", "evaluate"} - made.keys():
        yield fail(_NAME, "cannot be compared: artifacts are missing", "see above")
        return
    try:
        expected = statement(record.run, record.recipe, made)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        yield fail(_NAME, "cannot be compared: the run's record holds no recipe", _AGAIN)
        return
    wrong = _differences(found.said, json.loads(expected))
    if not wrong and record.package_version == __version__ and found.line.payload != expected:
        wrong = ["words that are not of this version"]
    if wrong:
        # An artifact that was made anew of the same bytes has another manifest: only who signed cares.
        told = warning if wrong == [_MATERIALS] and key is None else fail
        # With the key that would sign what is there now, whoever put it there.
        yield told(_NAME, f"says otherwise than the artifacts: {', '.join(wrong)}", _DO_NOT_USE if key else _AGAIN)
    else:
        count = len(found.said["subject"])
        yield ok(_NAME, f"names the {count} files of the model and what they were made from, as they are")


def _find(store: Store, run: str) -> _Statement | None:
    """The statement about a run, or None; IntegrityError for what is none."""
    data = store.read(run_path(run, FILE))
    if data is None:
        return None
    try:
        line = signing.parse(data)
        return _Statement(data, line, json.loads(line.payload))
    except IntegrityError as error:
        raise IntegrityError(f"{FILE} {error}") from None
    except (ValueError, RecursionError):
        raise IntegrityError(f"{FILE} holds no JSON") from None


def _signature(line: signing.Line, key: "PublicKey | None") -> Check:
    name = f"{_NAME} signature"
    # A name is anybody's text, and there may be many.
    by = ", ".join(short(keyid.encode("unicode_escape").decode()) or "nothing" for keyid, _ in line.signatures[:3])
    if key is None:
        if not by:
            return ok(name, f"there is none: the run had no {signing.SIGNING_KEY}")
        return warning(name, f"by a key that calls itself {by}; not checked", "give --public-key")
    if signing.is_signed_by(line, key):
        return ok(name, f"by the key {short(signing.name_of(key))}")
    found = f"is by another key, which calls itself {by}, or of other bytes" if by else "is missing"
    return fail(name, f"{found}; expected one by {short(signing.name_of(key))}", _DO_NOT_USE)


def _differences(said: Any, expected: Any) -> list[str]:
    """The parts of a statement that are not as they should be. Words of a later version may be added, none changed."""
    return [name for name, place in _PLACES.items() if _at(said, place) != _at(expected, place)]


def _at(value: Any, place: tuple[str, ...]) -> Any:
    for name in place:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _digests(parts: Any) -> dict[str, Any]:
    """sha256 by name, of files or artifacts as a statement lists them."""
    return {
        str(_at(part, ("name",))): _at(part, ("digest", "sha256"))
        for part in (parts if isinstance(parts, list) else ())
    }


def _files(merge: Manifest) -> list[dict[str, Any]]:
    return [{"name": file.path.removeprefix(_MODEL), "digest": {"sha256": file.sha256}} for file in merge.part(_MODEL)]


def _artifact(manifest: Manifest) -> dict[str, Any]:
    about = {
        "package_version": manifest.package_version,
        "git_commit": manifest.git_commit,
        "image_digest": manifest.image_digest,
        "libraries": manifest.libraries,
        "backend": manifest.backend,
        "accelerator": manifest.accelerator,
    }
    return {
        "name": manifest.stage,
        "uri": f"{artifact_path(manifest.stage, manifest.key)}/{MANIFEST}",
        "digest": {"sha256": manifest.sha256()},
        "annotations": {name: value for name, value in about.items() if value},
    }


def _sources(recipe: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the run read from outside the store. A path of one machine means nothing on another: its digest does."""
    for name in ("base", "questions", "preferences"):
        source = recipe["prepare"][name]
        kind, colon, value = str(source["fingerprint"] or "").rpartition(":")
        part: dict[str, Any] = {"name": f"{name} source"}
        if kind in ("sha256", "tree-sha256") and colon:
            part["digest"] = {kind: value}
        else:
            known = {"fingerprint": source["fingerprint"], "revision": source["revision"]}
            part |= {"uri": source["source"], "annotations": {key: each for key, each in known.items() if each}}
        yield part


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
