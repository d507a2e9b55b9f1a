"""Tokenizers, and the encoding of published rows. Training, evaluation and inference all use this module."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.errors import DataError
from llamarefine_jobs.contract.prompt import CHAT_TEMPLATE, Message, answer
from llamarefine_jobs.untrusted.remote_code import refuse_remote_code
from llamarefine_jobs.untrusted.safe_json import read_object

PublishedRow = dict[str, Any]

_ADDED_TOKEN_KEYS = ("added_tokens", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
_MOST_ADDED_TOKENS = 10_000  # Llama 3 has 256


@dataclass(frozen=True)
class Encoded:
    """The tokens of a prompt and of its answer. The answer ends with EOS, and only its tokens count in the loss."""

    prompt_ids: list[int]
    answer_ids: list[int]

    def __post_init__(self) -> None:
        # The first token of an answer is predicted by the last one of its prompt.
        assert self.prompt_ids, "a row without a prompt"
        assert self.answer_ids, "a row without an answer"

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in a model folder, with our chat template and a pad token that is not EOS.

    Raises DataError, in one line, if the tokenizer does not load or has no such pad token.
    """
    from transformers import AutoTokenizer

    try:
        refuse_remote_code(folder)
        _check_added_tokens(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # transformers raises anything for a malformed config, such as AttributeError
        raise DataError(f"the tokenizer in {folder} does not load: {as_one_line(error)}") from None
    set_special_tokens(tokenizer)
    return tokenizer


def as_one_line(error: BaseException) -> str:
    """Return a library's error message as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _check_added_tokens(folder: Path) -> None:
    """Raise ValueError if too many tokens are added to the vocabulary: loading takes quadratic time in their number."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            found = read_object(folder / name)
            lists = [found] if name == "added_tokens.json" else [found.get(key) or () for key in _ADDED_TOKEN_KEYS]
            added = sum(len(tokens) for tokens in lists if isinstance(tokens, dict | list | tuple))
            if added > _MOST_ADDED_TOKENS:
                raise ValueError(f"{name} adds {added} tokens to the vocabulary, expected at most {_MOST_ADDED_TOKENS}")


def set_special_tokens(tokenizer: Any) -> None:
    """Set our chat template, right padding, and a pad token that is not EOS. The vocabulary does not grow.

    Raises DataError if the tokenizer has no EOS token, or no token that can serve as the pad token.
    """
    if tokenizer.eos_token is None:
        raise DataError("the base model's tokenizer has no EOS token, so no answer could end; choose another base")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        # If EOS were the pad token, the EOS that the model must learn would be masked. Another special token is used.
        for candidate in (tokenizer.unk_token, "<unk>", "<|finetune_right_pad_id|>", tokenizer.bos_token):
            if candidate and candidate != tokenizer.eos_token and candidate in tokenizer.get_vocab():
                tokenizer.pad_token = candidate
                return
        raise DataError(
            "the base model's tokenizer has no pad token, and no special token besides EOS that could be used as one; "
            "add a pad token to the tokenizer's files"
        )


def encode_prompt(tokenizer: Any, prompt: Sequence[Message]) -> list[int]:
    """Return the tokens of a prompt, up to the first token of the answer."""
    return _tokenize(tokenizer, [_render_prompt(tokenizer, prompt)])[0]


def encode(tokenizer: Any, prompt: Sequence[Message], text: str) -> Encoded:
    """Return the tokens of a prompt and of its answer, which ends with EOS.

    Raises DataError if the tokenizer joins the end of the prompt and the beginning of the answer into one token.
    """
    return encode_all(tokenizer, [(prompt, text)])[0]


def encode_all(tokenizer: Any, rows: Sequence[tuple[Sequence[Message], str]]) -> list[Encoded]:
    """Return the tokens of many prompts with answers. Faster than one by one: the tokenizer uses all CPU cores."""
    prompts = [_render_prompt(tokenizer, prompt) for prompt, _ in rows]
    wholes = [tokenizer.apply_chat_template([*prompt, *answer(text)], tokenize=False) for prompt, text in rows]
    encoded = []
    for prompt_ids, ids in zip(_tokenize(tokenizer, prompts), _tokenize(tokenizer, wholes), strict=True):
        if ids[: len(prompt_ids)] != prompt_ids:
            raise DataError(
                "the base model's tokenizer joins the end of a prompt and the beginning of its answer into one token; "
                "choose a base whose tokenizer never joins a line break with the text after it"
            )
        encoded.append(Encoded(prompt_ids, ids[len(prompt_ids) :]))
    return encoded


def _render_prompt(tokenizer: Any, prompt: Sequence[Message]) -> str:
    text: str = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    return text


def _tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    try:
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    except BaseException as error:
        # The native library's PanicException derives from BaseException, not from Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"the base model's tokenizer fails on a text: {as_one_line(error)}; choose another base"
        ) from None
    return ids


def read_rows(folder: Path, split: str) -> list[PublishedRow]:
    """Return the rows of one split, as prepare published them."""
    with (folder / f"{split}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def encode_questions(tokenizer: Any, rows: Sequence[PublishedRow]) -> list[Encoded]:
    """Return the tokens of each question row. The last message of a row is its answer."""
    return encode_all(tokenizer, [(row["messages"][:-1], row["messages"][-1]["content"]) for row in rows])


def encode_pairs(tokenizer: Any, rows: Sequence[PublishedRow]) -> list[tuple[Encoded, Encoded]]:
    """Return the tokens of each preference row: its prompt with the chosen answer, and with the rejected answer."""
    chosen = encode_all(tokenizer, [(row["prompt"], row["chosen"]) for row in rows])
    rejected = encode_all(tokenizer, [(row["prompt"], row["rejected"]) for row in rows])
    return list(zip(chosen, rejected, strict=True))
