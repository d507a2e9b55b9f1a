"""The base model: copied unchanged, or refused in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llamarefine_jobs.contract.errors import DataError, StoreError
from llamarefine_jobs.contract.prompt import CHAT_TEMPLATE, question
from llamarefine_jobs.contract.recipe import Base
from llamarefine_jobs.models import tiny_llama
from llamarefine_jobs.models.base import describe_base, fetch_base, install_base
from llamarefine_jobs.models.encoding import encode_prompt, load_tokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random Llama as the Hub might hold it: another chat template, EOS as the pad token."""
    folder = tmp_path_factory.mktemp("original")
    tokenizer = tiny_llama.train_tokenizer(["some text"], 300)
    tokenizer.chat_template, tokenizer.pad_token = "{{ messages }}", tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    shape = LlamaConfig(
        vocab_size=304, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, eos_token_id=2
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "base"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_weights_are_copied_unchanged_and_the_special_tokens_are_set(folder: Path, tmp_path: Path) -> None:
    into = tmp_path / "installed"
    install_base(folder, into)
    assert (into / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    tokenizer = load_tokenizer(into)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    generation = json.loads((into / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    model = LlamaForCausalLM.from_pretrained(into)
    assert describe_base(into)["parameters"] == sum(tensor.numel() for tensor in model.parameters())


def test_a_sharded_base_is_copied_with_its_index_but_without_pickles(folder: Path, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20kB")
    (folder / WEIGHTS).unlink(missing_ok=True)
    (folder / "pytorch_model.bin").write_bytes(b"\x80pickle")
    into = tmp_path / "installed"
    install_base(folder, into)
    shards = {file.name for file in folder.glob("model-*.safetensors")}
    assert len(shards) > 1
    assert {file.name for file in into.glob("*.safetensors")} == shards
    assert not (into / "pytorch_model.bin").exists()
    LlamaForCausalLM.from_pretrained(into)


def replace_weights_by_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def remove_a_layer(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def truncate_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def point_index_outside(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder.parent / "outside.safetensors")
    names = dict.fromkeys(load_file(folder / WEIGHTS), "../outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replace_weights_by_a_pickle, "only pytorch_model.bin, a pickle"),
        (lambda folder: (folder / WEIGHTS).unlink(), "expected weights in safetensors, found none"),
        (truncate_weights, "cannot be read"),
        (remove_a_layer, "model.layers.1.mlp.up_proj.weight"),
        (point_index_outside, "expected safetensors files in the same folder"),
        (lambda folder: edit(folder / "config.json", auto_map={"AutoModel": "x.Y"}), "code of its own"),
        (
            lambda folder: edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}),
            "code of its own",
        ),
        (lambda folder: edit(folder / "config.json", model_type="gpt2"), "found gpt2"),
        (lambda folder: edit(folder / "config.json", quantization_config={"bits": 4}), "quantised"),
        (lambda folder: edit(folder / "config.json", vocab_size=303), "303 tokens"),
        (lambda folder: edit(folder / "config.json", num_hidden_layers=10**9), "no matrix model.layers.2."),
        (lambda folder: edit(folder / "config.json", num_hidden_layers=True), "num_hidden_layers: True"),
        (lambda folder: edit(folder / "config.json", intermediate_size=10**12), "the weights hold (32, 16)"),
        (lambda folder: edit(folder / "config.json", num_attention_heads=10**9), "the weights hold (16, 16)"),
        (lambda folder: edit(folder / "config.json", head_dim=10**9), "the weights hold (16, 16)"),
        (lambda folder: edit(folder / "config.json", num_key_value_heads=10**9), "k_proj"),
        (lambda folder: edit(folder / "config.json", max_position_embeddings="x"), "does not load"),
        (lambda folder: edit(folder / "config.json", torch_dtype="evil", dtype="evil"), "does not load"),
        (
            lambda folder: edit(
                folder / "tokenizer_config.json", extra_special_tokens=[f"<{i}>" for i in range(10001)]
            ),
            "adds 10001 tokens",
        ),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "does not load"),
    ],
)
def test_a_base_that_cannot_be_used_is_refused_in_one_line(
    folder: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(DataError) as caught:
        install_base(folder, tmp_path / "installed")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    tiny_llama.train_tokenizer(["many words " + " ".join(map(str, range(3000)))], 700).save_pretrained(folder)
    with pytest.raises(DataError, match="do not belong together"):
        install_base(folder, tmp_path / "installed")


def test_a_repository_folder_of_the_hubs_cache_is_read_at_its_revision(original: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--owner--name"
    commit = "0123456789abcdef"
    shutil.copytree(original, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    for revision in (None, "main", commit):
        base = Base(source=str(cached), revision=revision)
        assert fetch_base(base, tmp_path) == (cached / "snapshots" / commit, commit)
    with pytest.raises(DataError, match="no snapshot of v2"):
        fetch_base(Base(source=str(cached), revision="v2"), tmp_path)


def test_a_cached_hub_id_needs_no_network(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    cached = tmp_path / "models--owner--name"
    shutil.copytree(original, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert fetch_base(Base(source="owner/name"), tmp_path) == (cached / "snapshots" / commit, commit)
    with pytest.raises(StoreError, match="cannot be reached and owner/other is not in the cache"):
        fetch_base(Base(source="owner/other"), tmp_path)


def test_a_base_in_a_bucket_is_downloaded(original: Path, tmp_path: Path, s3_uri: str) -> None:
    from llamarefine_jobs.store.uri import open_objects

    objects = open_objects(s3_uri)
    for file in original.iterdir():
        objects.write(f"base/{file.name}", file.read_bytes())
    folder, _ = fetch_base(Base(source=f"{s3_uri}/base"), tmp_path)
    install_base(folder, tmp_path / "installed")


@pytest.mark.parametrize("source", ["https://example.org/model", "/no/such/folder"])
def test_a_source_that_is_not_a_base_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prepare\.base: "):
        fetch_base(Base(source=source), tmp_path)


def test_a_regular_expression_that_a_tokenizer_cannot_finish_is_refused_in_one_line(folder: Path) -> None:
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    edit(folder / "tokenizer.json", pre_tokenizer=pattern)
    with pytest.raises(DataError, match="fails on a text"):
        encode_prompt(load_tokenizer(folder), question("a" * 30_000 + "!"))


@pytest.mark.parametrize("template", ["{% for i in range(10**12) %}{{ i }}{% endfor %}", "{{ ''.__class__.__mro__ }}"])
def test_a_bases_own_chat_template_is_neither_rendered_nor_copied(folder: Path, tmp_path: Path, template: str) -> None:
    edit(folder / "tokenizer_config.json", chat_template=template)
    (folder / "chat_template.jinja").write_text(template)
    into = tmp_path / "installed"
    tokenizer = install_base(folder, into)
    assert encode_prompt(tokenizer, question("a"))
    assert not [file for file in into.iterdir() if template in file.read_text(errors="replace")]
