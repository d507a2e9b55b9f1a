"""The files of a merged model besides its weights: configs, tokenizer and model card.

The layout is the one that transformers reads; the merge's proof loads the folder with it. The configs also use the
spellings of older transformers versions. The same inputs give the same bytes: no file holds a date or a path.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.artifact import short
from llamarefine_jobs.contract.errors import DataError
from llamarefine_jobs.contract.prompt import question
from llamarefine_jobs.contract.version import __version__
from llamarefine_jobs.models.encoding import load_tokenizer
from llamarefine_jobs.models.weights import Weights
from llamarefine_jobs.sources.locations import Kind, kind
from llamarefine_jobs.untrusted.safe_json import read_object

_CONFIG = "config.json"
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Older versions of transformers saved this buffer. Every reader recomputes it, and a rounded copy would be wrong.
_COMPUTED = ".rotary_emb.inv_freq"
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


def read_config(base: Path) -> dict[str, Any]:
    """Return the base's config. Raises DataError if it cannot be read or if the base is quantised."""
    try:
        config = read_object(base / _CONFIG)
    except (OSError, ValueError) as error:
        raise DataError(f"the base model's {_CONFIG} cannot be read: {str(error).splitlines()[0]}") from None
    if "quantization_config" in config:
        raise DataError(
            "the base model is quantised, so adapters cannot be merged exactly; start from its 16-bit original"
        )
    return config


def tensors_to_keep(weights: Weights, config: dict[str, Any]) -> list[str]:
    """Return the names of the merged model's tensors. If lm_head is tied to the embeddings, they are written once.

    Raises DataError if the config ties them, but the weights hold two different tensors.
    """
    names = [name for name in weights.shapes if not name.endswith(_COMPUTED)]
    if config.get("tie_word_embeddings") and _HEAD in names and _EMBEDDINGS in names:
        if not _equal(weights, _HEAD, _EMBEDDINGS):
            raise DataError(
                f"the base model's {_CONFIG} ties {_HEAD} to {_EMBEDDINGS}, but these two differ in its weights; "
                "set tie_word_embeddings to false in the config, or remove one of them"
            )
        names.remove(_HEAD)
    return names


def write(folder: Path, base: Path, config: dict[str, Any], parameters: int, context: Context) -> None:
    """Write all files of the merged model except the weights into `folder`."""
    for pattern in _TOKENIZER_FILES:
        for file in base.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    tokenizer = load_tokenizer(base)
    _write_json(folder / _CONFIG, _merged_config(config, tokenizer, context.recipe.merge.dtype))
    _write_json(folder / "generation_config.json", _special_tokens(tokenizer) | {"do_sample": False})
    (folder / "README.md").write_text(card(context, parameters, tokenizer), encoding="utf-8")


def card(context: Context, parameters: int, tokenizer: Any) -> str:
    """Return the model card, in Markdown with YAML front matter."""
    recipe, base = context.recipe, context.recipe.prepare.base
    hub = kind(base.source, hub_id_allowed=True) is Kind.HUB
    origin = f"{base.source} at {base.revision or 'its main branch'}" if hub else Path(base.source).name
    front: dict[str, Any] = {"base_model": base.source} if hub else {}
    front |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["llama", "sft", "dpo"]}
    settings = {stage: context.parents[stage].recipe[stage] for stage in ("sft", "dpo")}
    settings["merge"] = recipe.key_payload("merge")["merge"]
    keys = "\n".join(f"| {name} | `{parent.key}` |" for name, parent in context.parents.items())
    prompt = tokenizer.apply_chat_template(question("QUESTION"), tokenize=False, add_generation_prompt=True)
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        name=base.source if hub else Path(base.source).name,
        origin=origin,
        parameters=f"{parameters:,}",
        dtype=recipe.merge.dtype,
        version=__version__,
        length=recipe.max_length_tokens,
        prompt=prompt,
        key=short(context.key),
        keys=keys,
        settings=yaml.safe_dump(settings, sort_keys=False),
    )


def _merged_config(config: dict[str, Any], tokenizer: Any, dtype: str) -> dict[str, Any]:
    """Return the base's config with the new type, also in the spellings that older versions of transformers read."""
    merged = config | {"dtype": dtype, "torch_dtype": dtype} | _special_tokens(tokenizer)
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        merged.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            merged.setdefault("rope_scaling", rope)
    return {key: value for key, value in merged.items() if key != "_name_or_path"}


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}


def _equal(weights: Weights, one: str, other: str) -> bool:
    import torch

    if weights.shapes[one] != weights.shapes[other]:
        return False
    pairs = zip(weights.blocks(one), weights.blocks(other), strict=True)
    return all(torch.equal(one_block, other_block) for (_, one_block), (_, other_block) in pairs)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


_CARD = """\
---
{front}---
# {name}, fine-tuned

A language model of {parameters} parameters, fine-tuned in two steps: supervised fine-tuning (SFT) on questions and
answers, then direct preference optimisation (DPO) with the SFT policy as the reference. Each step trained a LoRA
adapter; both adapters are merged into the weights. Base model: {origin}. Made by LlamaRefine {version}.

## How to use it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder of this file
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
messages = [{{"role": "user", "content": "Your question"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

The chat template renders a question as below. The answer follows and ends with EOS.

```text
{prompt}```

## What it was made from

The weights are base + scale · B A of the SFT adapter + scale · B A of the DPO adapter, added in fp32 and rounded once
to {dtype}. Before the model was published, it was loaded in fp32 with transformers, and its logits were compared with
the logits of the base with both adapters attached. LlamaRefine tested it with no other software.

| artifact | key |
| --- | --- |
{keys}

This model is the artifact merge `{key}`. Settings of the stages:

```yaml
{settings}```

## Limits

- SFT trained on single questions with one answer each, DPO on preference pairs; none had more than {length} tokens.
- It can state false facts with confidence; check what matters. The run's report compares it with the base model.
- The licences of the base model and of the training data apply; neither is stated here.
"""
