"""The statement of what a run's model was made from: an in-toto statement with SLSA's provenance v1 predicate.

It is written when a run ends, as ``runs/<run>/model.intoto.jsonl``. `pull` puts it beside the model's folder, never
into it, so that equal runs give equal folders. Everything in it comes from the artifacts' manifests and the run's
recipe, so the same artifacts give the same bytes; it contains no name of a person or a machine and no local path. A
signature shows that the holder of the signing key vouches for it.
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
_RESULTS = ("merge", "evaluate")  # the model's own artifact and the report on it; the other stages are materials
_NAME = "statement"
_MATERIALS = "what it was made from"
_RESUBMIT = "submit the same recipe again: it rewrites the statement without training anything again"
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
    """A run's statement as read from the store, once: its bytes, the envelope in them, and its parsed payload."""

    data: bytes
    envelope: signing.Envelope
    content: Any


def statement(run: str, recipe: Mapping[str, Any], made: Mapping[str, Manifest]) -> bytes:
    """Return the statement about a finished run's model: canonical JSON, one line. `made` is each stage's manifest."""
    parts = [(manifest, _artifact(manifest)) for manifest in made.values()]
    content = {
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
    return _canonical(content)


def publish(store: Store, record: RunRecord, made: Mapping[str, Manifest], key: "PrivateKey | None") -> None:
    """Write the statement about a run, signed if there is a key.

    Without a key, an existing statement with the same content is kept, because it may be signed.
    """
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
    """Return the bytes of a run's statement; IntegrityError unless `key` signed it and it matches `manifest`.

    The statement names the sha256 of each of the model's files, and of every other artifact's manifest. So whatever is
    fetched by this manifest object is what was signed, even if the store changes meanwhile; likewise, the returned
    bytes are the checked ones.
    """
    try:
        found = _find(store, run)
    except IntegrityError as error:
        raise IntegrityError(f"{run}: {error}; {_DO_NOT_USE}") from None
    if found is None:
        raise IntegrityError(
            f"{run}: expected a statement signed by the key {short(signing.name_of(key))}, found none; {_DO_NOT_USE}: "
            f"a run writes its statement when it ends, and signs it if {signing.SIGNING_KEY} is set"
        )
    signature = _check_signature(found.envelope, key)
    if signature.state != "ok":
        raise IntegrityError(f"{run}: {signature.name} {signature}")
    content = found.content
    about = _at(content, _PLACES["the run"]) if _at(content, _PLACES["its form"]) == _PREDICATE else None
    if about != run:
        other = f"{about:.80}" if isinstance(about, str) else "something else"
        raise IntegrityError(f"{run}: expected a statement about this run, found one about {other}; {_DO_NOT_USE}")
    if manifest.stage == "merge":
        signed, here = _digests(_at(content, _PLACES["the model's files"])), _digests(_files(manifest))
    else:
        place = _PLACES["its artifacts" if manifest.stage in _RESULTS else _MATERIALS]
        here = _digests([_artifact(manifest)])
        signed = {name: digest for name, digest in _digests(_at(content, place)).items() if name in here}
    for name in sorted(signed.keys() | here.keys()):
        expected, made = (f"sha256 {digests[name]!s:.64}" if name in digests else "none" for digests in (signed, here))
        if expected != made:
            raise IntegrityError(
                f"{run}: {name}: expected {expected}, as it was signed, found {made}; {_DO_NOT_USE}: it was "
                "changed in the store"
            )
    return found.data


def pull(store: Store, run: str, model: Path, signed: bytes | None = None) -> Path | None:
    """Write a run's statement beside the folder `model` and return its path; None if the run has no statement.

    `signed` is the statement that `require` returned, if it was called: it is not read again.
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
    """Check that a run's statement is signed by `key` and matches its artifacts, `made`, as they are in the store."""
    if record.state != "done" and key is None:
        return
    try:
        found = _find(store, record.run)
    except IntegrityError as error:
        yield fail(_NAME, str(error), _RESUBMIT)
        return
    if found is None:
        yield (fail if key else warning)(_NAME, "the run has no statement", _RESUBMIT)
        return
    yield _check_signature(found.envelope, key)
    if {"merge", "prepare", "sft", "dpo", "evaluate"} - made.keys():
        yield fail(_NAME, "cannot be compared with the artifacts: some are missing", "see above")
        return
    try:
        expected = statement(record.run, record.recipe, made)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        yield fail(_NAME, "cannot be compared with the artifacts: the run's record holds no recipe", _RESUBMIT)
        return
    content = found.content
    wrong = _differences(content, json.loads(expected))
    if not wrong and record.package_version == __version__ and found.envelope.payload != expected:
        wrong = ["keys that this version does not write"]
    if wrong:
        # An artifact that was made again with the same bytes has another manifest; that matters only for a signature.
        outcome = warning if wrong == [_MATERIALS] and key is None else fail
        # With a key, resubmitting is no advice: it would sign what is in the store now, whoever put it there.
        advice = _DO_NOT_USE if key else _RESUBMIT
        yield outcome(_NAME, f"differs from the artifacts in {', '.join(wrong)}", advice)
    else:
        count = len(content["subject"])
        yield ok(_NAME, f"matches the {count} files of the model and what they were made from")


def _find(store: Store, run: str) -> _Statement | None:
    """Read the statement about a run; None if there is none, IntegrityError if it cannot be parsed."""
    data = store.read(run_path(run, FILE))
    if data is None:
        return None
    try:
        envelope = signing.parse(data)
        return _Statement(data, envelope, json.loads(envelope.payload))
    except IntegrityError as error:
        raise IntegrityError(f"{FILE} {error}") from None
    except (ValueError, RecursionError):
        raise IntegrityError(f"{FILE} holds no JSON") from None


def _check_signature(envelope: signing.Envelope, key: "PublicKey | None") -> Check:
    name = f"{_NAME} signature"
    # Names are untrusted text, and there may be many.
    by = ", ".join(short(keyid.encode("unicode_escape").decode()) or "nothing" for keyid, _ in envelope.signatures[:3])
    if key is None:
        if not by:
            return ok(name, f"not signed: the run had no {signing.SIGNING_KEY}")
        return warning(name, f"by a key that claims the name {by}; not checked", "give --public-key")
    if signing.is_signed_by(envelope, key):
        return ok(name, f"by the key {short(signing.name_of(key))}")
    found = f"is by another key, which claims the name {by}, or over other bytes" if by else "is missing"
    return fail(name, f"{found}; expected one by {short(signing.name_of(key))}", _DO_NOT_USE)


def _differences(content: Any, expected: Any) -> list[str]:
    """Return the parts of a statement that differ from `expected`. Keys that a later version adds are ignored."""
    return [name for name, place in _PLACES.items() if _at(content, place) != _at(expected, place)]


def _at(value: Any, place: tuple[str, ...]) -> Any:
    """Return the value at a path of keys in parsed JSON; None if the path does not exist."""
    for name in place:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _digests(parts: Any) -> dict[str, Any]:
    """Return the sha256 by name of the files or artifacts in a list of a statement."""
    return {
        str(_at(part, ("name",))): _at(part, ("digest", "sha256"))
        for part in (parts if isinstance(parts, list) else ())
    }


def _files(merge: Manifest) -> list[dict[str, Any]]:
    return [{"name": file.path.removeprefix(_MODEL), "digest": {"sha256": file.sha256}} for file in merge.part(_MODEL)]


def _artifact(manifest: Manifest) -> dict[str, Any]:
    annotations = {
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
        "annotations": {name: value for name, value in annotations.items() if value},
    }


def _sources(recipe: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what the run read from outside the store, by digest if there is one (paths are local to a machine)."""
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
