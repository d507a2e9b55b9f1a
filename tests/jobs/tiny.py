"""A prepare artifact on which training takes a second: a random Llama, made-up questions and pairs."""

import json
import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.artifact import Manifest, Parent, artifact_key
from llamarefine_jobs.contract.prompt import TEMPLATE_SHA256, answer, question
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import STAGES
from llamarefine_jobs.contract.version import __version__
from llamarefine_jobs.models.encoding import set_special_tokens
from llamarefine_jobs.process.sigterm import Stop
from llamarefine_jobs.recipe_file import parse_recipe
from llamarefine_jobs.sources.pinning import pin
from llamarefine_jobs.store import Store

RECIPE = """\
name: tiny
seed: 3
cpu_threads: 1
max_length_tokens: 128
prepare:
  base: {source: tiny-llama}
  questions: {source: python-docstrings}
  preferences: {source: python-docstrings}
sft: {epochs: 2, learning_rate: 0.01, micro_batch_rows: 4, batch_rows: 8, log_every_steps: 1, lora: {rank: 4}}
dpo: {epochs: 2, learning_rate: 0.002, micro_batch_rows: 4, batch_rows: 8, log_every_steps: 1, lora: {rank: 4}}
"""

_WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
]
_SPLITS = {"train": slice(0, 60), "validation": slice(60, 70), "test": slice(70, 80)}


def recipe(*overrides: str) -> Recipe:
    """Return the tiny recipe with pinned sources."""
    return pin(parse_recipe(RECIPE, "tiny", overrides))


def make_tokenizer(texts: list[str], vocabulary: int = 400) -> Any:
    """Train a byte-level BPE tokenizer of at most `vocabulary` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    set_special_tokens(tokenizer)
    return tokenizer


def make_model(tokens: int, seed: int = 0, **config: Any) -> Any:
    """Return a random Llama with two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=tokens, **(shape | ids | config)))


def made_up_rows(count: int = 80) -> list[tuple[str, str]]:
    """Return questions and answers of random words."""
    generator = random.Random(0)
    return [
        (
            f"What is {' '.join(generator.choices(_WORDS, k=2))} {i}?",
            f"It is {' '.join(generator.choices(_WORDS, k=6))}.",
        )
        for i in range(count)
    ]


def write_prepared(folder: Path, seed: int = 0) -> Path:
    """Write what prepare publishes into `folder`: base/, questions/, preferences/, data_card.json."""
    rows = made_up_rows()
    tokenizer = make_tokenizer([question_text + answer_text for question_text, answer_text in rows])
    make_model(len(tokenizer), seed).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    write_splits(folder, {split: rows[part] for split, part in _SPLITS.items()})
    return folder


def write_splits(folder: Path, splits: dict[str, list[tuple[str, str]]]) -> None:
    """Write questions/ and preferences/ with these rows. A rejected answer is the chosen answer's words in reverse."""
    for split, rows in splits.items():
        _write_rows(
            folder / "questions" / f"{split}.jsonl",
            [
                {"messages": [*question(question_text), *answer(answer_text)], "group": f"{i:x}"}
                for i, (question_text, answer_text) in enumerate(rows)
            ],
        )
        _write_rows(
            folder / "preferences" / f"{split}.jsonl",
            [
                {
                    "prompt": question(question_text),
                    "chosen": answer_text,
                    "rejected": " ".join(answer_text.split()[::-1]),
                    "group": f"{i:x}",
                }
                for i, (question_text, answer_text) in enumerate(rows)
            ],
        )
    (folder / "data_card.json").write_text("{}")


def publish_prepared(store: Store, folder: Path, recipe: Recipe) -> Manifest:
    """Publish `folder` as the prepare artifact of `recipe`."""
    return publish(store, folder, "prepare", recipe, {})


def publish(
    store: Store, folder: Path, stage: str, recipe: Recipe, parents: dict[str, Manifest], **more: Any
) -> Manifest:
    """Publish `folder` as the artifact of `stage`; `more` are further fields of its manifest."""
    now = datetime.now(UTC)
    return store.publish(
        folder,
        Manifest(
            stage=stage,
            key=artifact_key(stage, recipe, parents),
            parents={name: Parent(key=parent.key, manifest_sha256=parent.sha256()) for name, parent in parents.items()},
            recipe=recipe.key_payload(stage),
            seed=recipe.seed,
            prompt_template_sha256=TEMPLATE_SHA256,
            package_version=__version__,
            started_at=now,
            finished_at=now,
            **more,
        ),
    )


def make_context(
    stage: str, recipe: Recipe, folder: Path, parents: dict[str, Manifest], inputs: dict[str, Path]
) -> Context:
    """Return the context of a stage in `folder`, with a store and an empty output folder there."""
    (folder / "output").mkdir(parents=True)
    return Context(
        stage=STAGES[stage],
        recipe=recipe,
        store=Store(str(folder / "store")),
        key="0" * 64,
        parents=parents,
        inputs=inputs,
        output=folder / "output",
        work=folder,
        started_at=datetime.now(UTC),
        stop=Stop(),
    )


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
