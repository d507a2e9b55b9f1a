"""Rows and their tokens, in the one way that training, evaluation and inference share."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.errors import DataError
from llamarefine_jobs.contract.prompt import CHAT_TEMPLATE, Message, answer
from llamarefine_jobs.untrusted.remote_code import refuse_remote_code
from llamarefine_jobs.untrusted.safe_json import read_object

Row = dict[str, Any]

_ADDED = ("added_tokens", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
_MOST_ADDED = 10_000  # Llama 3 has 256


@dataclass(frozen=True)
class Encoded:
    """A prompt's tokens and an answer's, EOS at its end. Only the answer's carry a loss."""

    prompt_ids: list[int]
    answer_ids: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, with the one chat template and a pad token that is not EOS."""
    from transformers import AutoTokenizer

    try:
        refuse_remote_code(folder)
        _check_added(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # for a strange config it raises what comes: AttributeError, errors of its own
        raise DataError(f"{folder} holds no tokenizer that loads: {as_one_line(error)}") from None
    set_special_tokens(tokenizer)
    return tokenizer


def as_one_line(error: BaseException) -> str:
    """What a library says of a file, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _check_added(folder: Path) -> None:
    """Tokens that are added one by one take a time that grows with the square of their number."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            found = read_object(folder / name)
            lists = [found] if name == "added_tokens.json" else [found.get(key) or () for key in _ADDED]
            added = sum(len(tokens) for tokens in lists if isinstance(tokens, dict | list | tuple))
            if added > _MOST_ADDED:
                raise ValueError(f"{name} adds {added} tokens to the vocabulary, expected at most {_MOST_ADDED}")


def set_special_tokens(tokenizer: Any) -> None:
    """Give `tokenizer` the one chat template and a pad token that is not EOS, without growing the vocabulary."""
    if tokenizer.eos_token is None:
        raise DataError("the base model's tokenizer has no EOS token, so no answer could ever end; choose another base")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        # Padding with EOS would mask the EOS that the model must learn. Any other special token serves.
        for candidate in (tokenizer.unk_token, "<unk>", "<|finetune_right_pad_id|>", tokenizer.bos_token):
            if candidate and candidate != tokenizer.eos_token and candidate in tokenizer.get_vocab():
                tokenizer.pad_token = candidate
                return
        raise DataError(
            "the base model's tokenizer has no pad token and no special token besides EOS that could serve as one; "
            "add a pad token to the tokenizer's folder"
        )


def encode_prompt(tokenizer: Any, prompt: Sequence[Message]) -> list[int]:
    """The tokens of a prompt, up to where the answer begins."""
    text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    return _ids(tokenizer, text)


def _ids(tokenizer: Any, text: str) -> list[int]:
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the native library, and no Exception to Python
            raise
        raise DataError(
            f"the base model's tokenizer gives up on a text: {as_one_line(error)}; choose another"
        ) from None
    return ids


def encode(tokenizer: Any, prompt: Sequence[Message], text: str) -> Encoded:
    """The tokens of a prompt and of its answer, which ends with EOS."""
    prompt_ids = encode_prompt(tokenizer, prompt)
    whole = tokenizer.apply_chat_template([*prompt, *answer(text)], tokenize=False)
    ids = _ids(tokenizer, whole)
    if ids[: len(prompt_ids)] != prompt_ids:
        raise DataError(
            "the base model's tokenizer joins the end of a prompt with the beginning of its answer into one token; "
            "choose a base whose tokenizer keeps a line's end apart"
        )
    return Encoded(prompt_ids, ids[len(prompt_ids) :])


def read_rows(folder: Path, split: str) -> list[Row]:
    """The rows of one split, as prepare wrote them."""
    with (folder / f"{split}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def encode_questions(tokenizer: Any, rows: Sequence[Row]) -> list[Encoded]:
    """Prompt and answer of each row, tokenised: the last message is the answer."""
    return [encode(tokenizer, row["messages"][:-1], row["messages"][-1]["content"]) for row in rows]


def encode_pairs(tokenizer: Any, rows: Sequence[Row]) -> list[tuple[Encoded, Encoded]]:
    """Each row's prompt with its chosen and with its rejected answer, tokenised."""
    return [
        (encode(tokenizer, row["prompt"], row["chosen"]), encode(tokenizer, row["prompt"], row["rejected"]))
        for row in rows
    ]
