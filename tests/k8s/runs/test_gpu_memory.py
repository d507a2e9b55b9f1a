"""Estimated GPU memory for a recipe's base model, wherever it is read from."""

import functools
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llamarefine_jobs.contract.errors import DataError, StoreError
from llamarefine_jobs.contract.memory import Shape, training_bytes
from llamarefine_jobs.contract.recipe import Base, Recipe
from llamarefine_jobs.sources.pinning import pin
from llamarefine_jobs.store import Store
from llamarefine_jobs.store.uri import open_objects
from llamarefine_k8s.runs.gpu_memory import base_config, check_card, estimates
from tests.contract.test_memory import TINYLLAMA
from tests.jobs.tiny import publish as publish_folder
from tests.k8s.conftest import Launcher


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **TINYLLAMA}))
    return folder


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The URL of a web server of tmp_path/web, in place of the Hub."""

    class QuietHandler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(tmp_path / "web")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_a_folder_a_bucket_and_the_hub_give_the_same_estimate(
    base: Path, web: str, s3_uri: str, tmp_path: Path, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_objects(s3_uri).write("base/config.json", (base / "config.json").read_bytes())
    place = tmp_path / "web/owner/small/resolve/v1"
    place.mkdir(parents=True)
    (place / "config.json").write_bytes((base / "config.json").read_bytes())
    monkeypatch.setenv("HF_ENDPOINT", web)
    plain = recipe()
    bases = [Base(source=str(base)), Base(source=f"{s3_uri}/base"), Base(source="owner/small", revision="v1")]
    expected = {
        name: training_bytes(Shape.from_config(TINYLLAMA), section, plain.max_length_tokens)
        for name, section in (("sft", plain.sft), ("dpo", plain.dpo))
    }
    for each in bases:
        assert estimates(plain.with_sources({"base": each}), "store") == expected
    assert estimates(plain.with_sources({"base": bases[2]}), "store", ask_hub=False) == {}


def test_tiny_llama_has_no_estimate(recipe: Callable[..., Recipe]) -> None:
    assert estimates(recipe(), "store") == {}


def test_base_config_raises_without_a_config_or_a_connection_and_estimates_are_empty(
    tmp_path: Path, web: str, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"has no config.json"):
        base_config(Base(source=str(tmp_path)))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="cannot be reached"):
        base_config(Base(source="owner/small"))
    assert estimates(recipe().with_sources({"base": Base(source="owner/small")}), "store") == {}
    monkeypatch.setenv("HF_ENDPOINT", web)
    with pytest.raises(DataError, match="HTTP 404"):
        base_config(Base(source="owner/small"))


@pytest.mark.parametrize(("card_gib", "state"), [(40, "ok"), (30, "warning"), (22, "warning"), (20, "FAIL")])
def test_only_an_estimate_far_over_the_card_is_refused(
    card_gib: int, state: str, recipe: Callable[..., Recipe]
) -> None:
    check = check_card(recipe(), "sft", 31 * 2**30, card_gib * 2**30, "here")
    assert check.state == state
    assert check.text.startswith(f"at least 31.0 GiB of the {card_gib}.0 GiB here, an estimate")
    assert (check.to_do is None) is (state == "ok")


@pytest.mark.parametrize(
    ("settings", "begins", "to_do"),
    [
        (
            "{}",
            "at least 31.0 GiB",
            "lower max_length_tokens, or set dpo.gradient_checkpointing to true or dpo.quantization to nf4",
        ),
        (
            "{micro_batch_rows: 4, quantization: nf4}",
            "about 31.0 GiB",
            "lower dpo.micro_batch_rows or max_length_tokens, or set dpo.gradient_checkpointing to true",
        ),
        (
            "{micro_batch_rows: 1, quantization: nf4, gradient_checkpointing: true}",
            "about 31.0 GiB",
            "lower max_length_tokens",
        ),
    ],
)
def test_only_settings_that_can_still_save_memory_are_named(
    settings: str, begins: str, to_do: str, recipe: Callable[..., Recipe]
) -> None:
    check = check_card(recipe(f"dpo={settings}"), "dpo", 31 * 2**30, 30 * 2**30, "here")
    assert check.text.startswith(begins)
    assert check.to_do == to_do


def test_plan_shows_the_estimate(base: Path, recipe_file: Path, launcher: Launcher) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("tiny-llama", str(base)))
    code, out, err = launcher.run("plan", str(recipe_file))
    assert code == 0, err
    assert "at least 5.2 GiB of GPU memory (estimated)" in out
    planned = json.loads(launcher.run("plan", str(recipe_file), "--json")[1])["stages"]
    assert [stage["estimated_gpu_memory_bytes"] is not None for stage in planned] == [False, True, True, False, False]


NOT_AN_OBJECT = ["", "[]", "[1]", "1", "NaN", '"x"', '{"a"', "\0", "[" * 100_000, '{"a":' * 100_000, "1" + "0" * 5000]
WRONG_SIZES = [
    *({name: value} for name in TINYLLAMA for value in (0, -1, "1", [1], {}, True, 1.5, 1 << 40, 10**400)),
    {"hidden_size": float("nan")},
    {"vocab_size": float("inf")},
    {"head_dim": "x"},
    {"num_key_value_heads": "x"},
]


@pytest.mark.parametrize("text", [*NOT_AN_OBJECT, *(json.dumps(TINYLLAMA | wrong) for wrong in WRONG_SIZES)])
def test_a_base_with_a_nonsensical_config_has_no_estimate(text: str, base: Path, recipe: Callable[..., Recipe]) -> None:
    pinned = recipe().with_sources({"base": Base(source=str(base))})
    assert set(estimates(pinned, "store")) == {"sft", "dpo"}
    (base / "config.json").write_text(text)
    assert estimates(pinned, "store") == {}


def test_the_stored_base_is_used_unless_its_config_was_replaced(
    base: Path, recipe: Callable[..., Recipe], store: Store, tmp_path: Path
) -> None:
    """Anyone who can write to the bucket can replace it; the stage that fetches the base refuses it."""
    pinned = pin(recipe().with_sources({"base": Base(source=str(base))}))
    expected = estimates(pinned, store.uri)
    prepared = tmp_path / "prepared"
    shutil.copytree(base, prepared / "base")
    manifest = publish_folder(store, prepared, "prepare", pinned, {})
    shutil.rmtree(base)
    assert estimates(pinned, store.uri) == expected
    for text in (json.dumps(TINYLLAMA | {"hidden_size": 64}), *NOT_AN_OBJECT):
        store.write(f"{manifest.folder}/base/config.json", text.encode())
        assert estimates(pinned, store.uri) == {}


@pytest.mark.parametrize("text", NOT_AN_OBJECT)
def test_a_base_whose_config_is_not_an_object_is_a_one_line_error(text: str, base: Path) -> None:
    (base / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"config\.json .*; expected a model's folder$") as caught:
        base_config(Base(source=str(base)))
    assert "\n" not in str(caught.value)


def test_plan_works_without_an_estimate(base: Path, recipe_file: Path, launcher: Launcher) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("tiny-llama", str(base)))
    for text in ("[" * 100_000, json.dumps(TINYLLAMA | {"head_dim": "x"})):
        (base / "config.json").write_text(text)
        code, out, err = launcher.run("plan", str(recipe_file), "--store", "store")
        assert (code, err) == (0, "")
        assert "GPU memory" not in out
