"""The tiny Llama of the demo (`base.source: tiny-llama`): trained on the spot, so that nothing needs downloading.

It sees the training splits as plain text, questions apart from answers and without the chat
template: it can write a little, and SFT still has everything about answering to teach. Held-out
text never reaches it or its tokenizer. On one thread the same recipe gives the same bytes.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.errors import DataError, DivergedError
from llamarefine_jobs.contract.recipe import TinyModel
from llamarefine_jobs.models.encoding import set_special_tokens

_WINDOW_TOKENS = 64  # a demo row fits; longer windows cost time and teach so small a model nothing
_POSITIONS = 2048
_INITIAL_RANGE = 0.05  # a narrow model learns faster from it than from the 0.02 that suits wide ones
_SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_TURN_MARKS = ("<|system|>", "<|user|>", "<|assistant|>")

Tick = Callable[..., None]


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE of at most `vocabulary` tokens. No token spans a line's end; a turn's mark is one token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    marks = [*_SPECIAL.values(), *(AddedToken(mark, normalized=False) for mark in _TURN_MARKS)]
    least = len(marks) + 256
    if vocabulary < least:
        raise DataError(f"prepare.base.tiny.vocabulary: {vocabulary} is too small; bytes and marks alone are {least}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=marks,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **_SPECIAL)
    set_special_tokens(wrapped)
    return wrapped


def pretrain(
    tiny: TinyModel, tokenizer: Any, texts: Sequence[str], seed: int, into: Path, tick: Tick
) -> dict[str, float]:
    """Train a Llama of `tiny`'s shape on `texts` and save it in `into`; its first and last loss, in nats a token."""
    import torch
    from transformers.utils import logging

    ids = _stream(tokenizer, texts, seed)
    torch.manual_seed(seed)
    model = _untrained(tiny, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=tiny.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, tiny.steps))
    draw = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    started = time.monotonic()
    for step in range(1, tiny.steps + 1):
        starts_B = torch.randint(0, len(ids) - _WINDOW_TOKENS + 1, (tiny.batch_rows, 1), generator=draw)
        ids_BT = ids[starts_B + torch.arange(_WINDOW_TOKENS)]
        loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise DivergedError(f"the tiny Llama's loss is {losses[-1]} at step {step}; lower base.tiny.learning_rate")
        if step % 10 == 0 or step == tiny.steps:
            passed_s = time.monotonic() - started
            eta_s = passed_s / step * (tiny.steps - step)
            tick(step, tiny.steps, loss=losses[-1], tokens_per_s=step * ids_BT.numel() / passed_s, eta_s=eta_s)
    logging.disable_progress_bar()
    model.save_pretrained(into)
    last = losses[-10:]
    return {"first_loss": losses[0], "last_loss": sum(last) / len(last)}


def _stream(tokenizer: Any, texts: Sequence[str], seed: int) -> Any:
    """All texts in random order, EOS after each, as one row of tokens; repeated where it is short."""
    import torch

    shuffled = sorted(texts, key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest())
    ids: list[int] = []
    for text_ids in tokenizer(shuffled, add_special_tokens=False)["input_ids"]:
        ids += [*text_ids, tokenizer.eos_token_id]
    return torch.tensor(ids * math.ceil(_WINDOW_TOKENS / len(ids)))


def _untrained(tiny: TinyModel, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    if tiny.hidden_size % (2 * tiny.heads):
        raise DataError(
            f"prepare.base.tiny.hidden_size: {tiny.hidden_size} must be a multiple of twice the heads ({tiny.heads}), "
            "because rotary positions turn pairs of numbers"
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=tiny.hidden_size,
            intermediate_size=tiny.intermediate_size,
            num_hidden_layers=tiny.layers,
            num_attention_heads=tiny.heads,
            num_key_value_heads=tiny.heads,
            max_position_embeddings=_POSITIONS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
            initializer_range=_INITIAL_RANGE,
        )
    )


def _cosine(step: int, steps: int) -> float:
    """The learning rate's factor: up over the first tenth, then down to a tenth along a cosine."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
