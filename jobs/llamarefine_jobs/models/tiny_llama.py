"""The tiny Llama of the demo (`base.source: tiny-llama`), trained by prepare, so that nothing is downloaded.

It is trained on the training splits as plain text: questions and answers are separate texts, without the chat template.
So it learns some language, and SFT still has to teach it to answer. Neither the model nor its tokenizer sees held-out
text. On one thread the same recipe gives the same bytes.
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

_WINDOW_TOKENS = 64  # a demo row fits; longer windows cost time and do not improve so small a model
_POSITIONS = 2048
_INITIAL_RANGE = 0.05  # a narrow model learns faster with it than with the usual 0.02 of wide models
_SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_TURN_MARKS = ("<|system|>", "<|user|>", "<|assistant|>")

OnStep = Callable[..., None]  # called with (step, steps, loss=, tokens_per_s=, eta_s=)


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """Train a byte-level BPE of at most `vocabulary` tokens.

    No token contains a line break with other text, and each role mark of the chat template is one token.
    Raises DataError if `vocabulary` is too small for the bytes and the marks.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    marks = [*_SPECIAL.values(), *(AddedToken(mark, normalized=False) for mark in _TURN_MARKS)]
    least = len(marks) + 256
    if vocabulary < least:
        raise DataError(
            f"prepare.base.tiny.vocabulary: expected at least {least}, for all bytes and marks; found {vocabulary}"
        )
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
    tiny: TinyModel, tokenizer: Any, texts: Sequence[str], seed: int, into: Path, on_step: OnStep
) -> dict[str, float]:
    """Train a Llama of `tiny`'s shape on `texts` and save it in `into`.

    Returns the first loss and the mean of the last ten losses, in nats a token. Raises DivergedError if a loss is not
    finite.
    """
    import torch
    from transformers.utils import logging

    ids = _stream(tokenizer, texts, seed)
    torch.manual_seed(seed)
    model = _new_model(tiny, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=tiny.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, tiny.steps))
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    started_s = time.monotonic()
    for step in range(1, tiny.steps + 1):
        starts_B = torch.randint(0, len(ids) - _WINDOW_TOKENS + 1, (tiny.batch_rows, 1), generator=generator)
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
            elapsed_s = time.monotonic() - started_s
            eta_s = elapsed_s / step * (tiny.steps - step)
            on_step(step, tiny.steps, loss=losses[-1], tokens_per_s=step * ids_BT.numel() / elapsed_s, eta_s=eta_s)
    logging.disable_progress_bar()
    model.save_pretrained(into)
    last = losses[-10:]
    return {"first_loss": losses[0], "last_loss": sum(last) / len(last)}


def _stream(tokenizer: Any, texts: Sequence[str], seed: int) -> Any:
    """Return all texts as one tensor of tokens, in random order, with EOS after each; repeated up to one window."""
    import torch

    shuffled = sorted(texts, key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest())
    ids: list[int] = []
    for text_ids in tokenizer(shuffled, add_special_tokens=False)["input_ids"]:
        ids += [*text_ids, tokenizer.eos_token_id]
    return torch.tensor(ids * math.ceil(_WINDOW_TOKENS / len(ids)))


def _new_model(tiny: TinyModel, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    if tiny.hidden_size % (2 * tiny.heads):
        raise DataError(
            f"prepare.base.tiny.hidden_size: expected a multiple of twice the heads (2 × {tiny.heads}), because rotary "
            f"positions rotate pairs of numbers; found {tiny.hidden_size}"
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
    """Return the learning rate's factor: linear warmup over the first tenth, then a cosine down to 0.1."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
