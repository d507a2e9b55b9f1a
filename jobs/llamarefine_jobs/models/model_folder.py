"""What lies around the weights of a merged model: its configs, its tokenizer, its card.

Laid out for transformers, vLLM and llama.cpp's converter. The same inputs give the same bytes: no date, no path.
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
from llamarefine_jobs.sources.pinning import Kind, kind
from llamarefine_jobs.untrusted.safe_json import read_object

_CONFIG = "config.json"
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Written by older versions of transformers. Every reader computes it anew; rounded it would be wrong.
_COMPUTED = ".rotary_emb.inv_freq"
_OF_THE_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


def read_config(base: Path) -> dict[str, Any]:
    """The base's config; DataError where its weights cannot be added to."""
    try:
        config = read_object(base / _CONFIG)
    except (OSError, ValueError) as error:
        raise DataError(f"the base model's {_CONFIG} cannot be read: {str(error).splitlines()[0]}") from None
    if "quantization_config" in config:
        raise DataError("the base model is quantised, so nothing adds to it exactly; start from its 16-bit original")
    return config


def tensors_to_keep(weights: Weights, config: dict[str, Any]) -> list[str]:
    """The names of the tensors that the merged model holds: a tie of the embeddings is kept by writing them once."""
    names = [name for name in weights.shapes if not name.endswith(_COMPUTED)]
    if config.get("tie_word_embeddings") and _HEAD in names and _EMBEDDINGS in names:
        if not _equal(weights, _HEAD, _EMBEDDINGS):
            raise DataError(
                f"the base model's {_CONFIG} ties {_HEAD} to {_EMBEDDINGS}, but its weights hold two that differ; "
                "set tie_word_embeddings to false there, or remove one"
            )
        names.remove(_HEAD)
    return names


def write(folder: Path, base: Path, config: dict[str, Any], parameters: int, context: Context) -> None:
    """Put everything but the weights into `folder`."""
    for pattern in _OF_THE_TOKENIZER:
        for file in base.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    tokenizer = load_tokenizer(base)
    _write_json(folder / _CONFIG, _merged_config(config, tokenizer, context.recipe.merge.dtype))
    _write_json(folder / "generation_config.json", _special_tokens(tokenizer) | {"do_sample": False})
    (folder / "README.md").write_text(card(context, parameters, tokenizer), encoding="utf-8")


def card(context: Context, parameters: int, tokenizer: Any) -> str:
    """The model card."""
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
    """The base's config with the new type, in the spellings that older readers know as well."""
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
    return all(torch.equal(mine, yours) for (_, mine), (_, yours) in pairs)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


_CARD = """\
---
{front}---
# {name}, fine-tuned

A language model of {parameters} parameters, fine-tuned in two steps and merged into one: supervised fine-tuning (SFT)
on questions and answers, then direct preference optimisation (DPO) against the SFT policy, both with LoRA.
Base model: {origin}. Made by LlamaRefine {version}.

## How to ask it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
messages = [{{"role": "user", "content": "Your question"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

The chat template renders a question as below; the answer follows, and ends with EOS.

```text
{prompt}```

## What it was made from

The weights are base + scale · B A of the SFT adapter + scale · B A of the DPO adapter, added in fp32 and rounded once
to {dtype}. Before it was published, its logits were compared with those of the base with both adapters beside it.

| artifact | key |
| --- | --- |
{keys}

This one is merge `{key}`. Settings of the stages:

```yaml
{settings}```

## Limits

- It was trained on conversations of up to {length} tokens, one question and one answer for the most part.
- It may state what is false with confidence; check what matters. What it is good at is in the run's report.
- The base model's licence and that of the training data apply; neither is stated here.
"""
