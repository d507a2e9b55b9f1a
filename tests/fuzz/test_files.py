"""Fuzz manifests, run records, tables, safetensors and configs: valid results or one-line errors, no stray files."""

import hashlib
import io
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llamarefine_jobs.contract.artifact import MANIFEST, artifact_key, artifact_path, run_path
from llamarefine_jobs.contract.recipe import Base, Rows
from llamarefine_jobs.data.reading import read_table
from llamarefine_jobs.models.base import check_model
from llamarefine_jobs.models.lora import read_adapter
from llamarefine_jobs.models.weights import INDEX, SINGLE_FILE, Weights
from llamarefine_jobs.store import Store
from llamarefine_k8s.runs import records, verification
from llamarefine_k8s.runs.gpu_memory import estimates
from llamarefine_k8s.runs.results import Report, read_report

from ..contract.test_memory import TINYLLAMA
from ..jobs import tiny
from ..store import samples
from .target import allow_refusal, fuzzed, mutated

PIECES = [
    b"{", b"}", b"[", b"]", b",", b'"', b"\\", b"\x00", b"\xff\xfe", b"null", b"NaN", b"1e999", b"-1",
    b"9" * 400, b"\r\n", b"\n\n", b";", b"[" * 3000, b'{"a":' * 3000, b"../../../outside", b"/outside",
    b"C:\\outside", b"a/../../outside", b'"\\ud800"', b'"\\u0000"', b"\xe2\x80\xae", b"<script>",
    b"=cmd|' /C calc'!A0", b"x" * 5000, b'"' * 51, b"PK\x03\x04", b"\x1f\x8b\x08", b"PAR1", b"true",
]  # fmt: skip
ROWS = [{"question": f"What is {i}?", "answer": "It is, well, “so”.\nAnd more."} for i in range(4)]
CSV = b'question,answer\r\nWhat is a?,"It is, well, ""so""."\r\nWhat is b?,B\r\n'
JSONL = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def parquet_bytes() -> bytes:
    import pyarrow
    from pyarrow import parquet

    into = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), into)
    return into.getvalue()


PARQUET = parquet_bytes()
SEEDS = {"csv": CSV, "jsonl": JSONL, "parquet": PARQUET}


@st.composite
def mutations(draw: Any, data: bytes) -> bytes:
    """Draw a mutation of `data`, or now and then arbitrary bytes."""
    return draw(st.binary(max_size=400)) if draw(st.integers(0, 19)) == 0 else mutated(draw, data, PIECES)


@pytest.fixture(scope="module")
def inner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the readers; at the end no file may lie beside it."""
    outer = tmp_path_factory.mktemp("outer")
    (outer / "inner").mkdir()
    yield outer / "inner"
    assert [path.name for path in outer.iterdir()] == ["inner"], "a file was written outside the target folder"


@pytest.fixture(scope="module")
def published(inner: Path) -> tuple[Store, bytes, str]:
    """A store with one artifact, the bytes of its manifest, and the manifest's path."""
    store = Store(str(inner / "store"))
    manifest = store.publish(samples.make_folder(inner / "made", size_bytes=2000), samples.draft())
    return store, manifest.to_bytes(), f"{artifact_path(manifest.stage, manifest.key)}/{MANIFEST}"


@fuzzed(0.06)
@given(data=st.data(), has_valid_digest=st.booleans())
def test_a_manifest(data: Any, has_valid_digest: bool, published: tuple[Store, bytes, str], inner: Path) -> None:
    """Also with a valid self-digest, which anyone who can write to the bucket can compute. Fetched files are intact."""
    store, original, path = published
    body = original[: original.rindex(b',\n  "manifest_sha256"')] + b"\n}"
    changed = data.draw(mutations(body))
    digest = hashlib.sha256(changed).hexdigest()
    if has_valid_digest:
        changed = changed[:-2] + f',\n  "manifest_sha256": "{digest}"\n}}\n'.encode()
    store.write(path, changed)
    into = inner / "fetched"
    with allow_refusal("manifest.json"):
        manifest = store.manifest(samples.STAGE, samples.KEY)
        if manifest:
            store.fetch(manifest, into)
            wanted = samples.content(inner / "made")
            assert all(content in wanted.values() for content in samples.content(into).values())
    if into.exists():
        shutil.rmtree(into)


RECORD = json.dumps(
    {
        "run": "small-00000000",
        "state": "done",
        "created_at": "2026-11-24T02:00:00Z",
        "updated_at": "2026-11-24T02:00:00Z",
        "driver": {"pid": 1, "host": "a"},
        "stages": {"sft": {"state": "done", "key": "0" * 64, "log": "runs/a/logs/sft.log"}},
        "recipe": tiny.recipe().model_dump(mode="json"),
    }
).encode()


@fuzzed(0.02)
@given(mutations(RECORD))
@example(RECORD.replace(b"small-00000000", b"../../../outside"))
def test_a_run_record(published: tuple[Store, bytes, str], data: bytes) -> None:
    store = published[0]
    store.write(run_path("small-00000000", "run.json"), data)
    with allow_refusal("run.json"):
        record = records.load(store, "small-00000000")
        assert record
        assert record.run == "small-00000000"
        list(verification.verify(store, record))


@fuzzed(0.03)
@given(mutations(b'{"models": ["base"], "metrics": [], "confidence": 0.95, "gates": [], "examples": []}'))
def test_a_report(published: tuple[Store, bytes, str], data: bytes) -> None:
    store = published[0]
    store.write(run_path("small-00000000", "report", "report.json"), data)
    with allow_refusal("report.json"):
        assert isinstance(read_report(store, "small-00000000"), Report)


@pytest.mark.parametrize("format", SEEDS)
@fuzzed(0.03)
@given(data=st.data())
def test_a_table(format: str, data: Any, inner: Path) -> None:
    path = inner / f"rows.{format}"
    path.write_bytes(data.draw(mutations(SEEDS[format])))
    with allow_refusal(f"{format} rows"):
        table = read_table(Rows(source=str(path)), "prepare.questions", inner / "work", ("question", "answer"))
        assert all(row is None or len(row) == 2 for row in table.rows)


def safetensors_bytes(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


HEADER = json.dumps(
    {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight": {
            "dtype": "F32", "shape": shape, "data_offsets": offsets,
        }
        for half, shape, offsets in (("A", [2, 4], [0, 32]), ("B", [4, 2], [32, 64]))
    }
).encode()  # fmt: skip
CONFIG = b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": false, "target_modules": ["q_proj"]}'


@fuzzed(0.03)
@given(mutations(HEADER), mutations(CONFIG), st.sampled_from([None, None, 0, 7, 100 << 30, (1 << 64) - 1]))
def test_an_adapter(inner: Path, header: bytes, config: bytes, length: int | None) -> None:
    folder = inner / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(header, bytes(64), length))
    (folder / "adapter_config.json").write_bytes(config)
    with allow_refusal("adapters"):
        for update in read_adapter(folder, "SFT").values():
            assert update.b.shape[1] == update.a.shape[0]


MODEL = b'{"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 4, "hidden_size": 4}'
WEIGHT_MAP = b'{"weight_map": {"model.embed_tokens.weight": "model.safetensors"}}'


@fuzzed(0.03)
@given(mutations(MODEL), mutations(WEIGHT_MAP), mutations(HEADER), st.booleans())
def test_a_base(inner: Path, config: bytes, index: bytes, header: bytes, indexed: bool) -> None:
    folder = inner / "base"
    folder.mkdir(exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    (folder / "config.json").write_bytes(config)
    (folder / SINGLE_FILE).write_bytes(safetensors_bytes(header, bytes(64)))
    if indexed:
        (folder / INDEX).write_bytes(index)
    with allow_refusal("base models"):
        check_model(folder)
    with allow_refusal("base models"):
        weights = Weights(folder)
        for name in weights.shapes:
            list(weights.blocks(name))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
SIZES = {name: st.just(value) | JSON for name, value in TINYLLAMA.items()}


@fuzzed(0.03)
@given(
    st.fixed_dictionaries(SIZES, optional={"head_dim": JSON}).map(lambda sizes: json.dumps(sizes).encode())
    | mutations(json.dumps(TINYLLAMA).encode())
)
def test_a_prepared_base_models_config(inner: Path, config: bytes) -> None:
    """`plan`, `submit` and `preflight` read the base model's config.json from the bucket."""
    store = Store(str(inner / "prepared"))
    recipe = tiny.recipe().with_sources({"base": Base(source="owner/small")})
    draft = samples.draft(artifact_key("prepare", recipe, {}), "prepare")
    prepared = store.manifest("prepare", draft.key) or store.publish(inner / "nothing", draft)
    store.write(f"{prepared.folder}/base/config.json", config)
    with allow_refusal("config.json"):
        needed = estimates(recipe, store.uri, ask_hub=False)
        assert not needed or min(needed["sft"], needed["dpo"]) > 0


def test_the_unmutated_inputs_are_valid(inner: Path) -> None:
    for format, data in SEEDS.items():
        (inner / f"seed.{format}").write_bytes(data)
        rows = Rows(source=str(inner / f"seed.{format}"))
        assert read_table(rows, "prepare.questions", inner, ("question", "answer")).rows[0]
    folder = inner / "seed"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(HEADER, bytes(64)))
    (folder / "adapter_config.json").write_bytes(CONFIG)
    assert len(read_adapter(folder, "SFT")) == 1
    assert records.RunRecord.model_validate_json(RECORD)
