"""A model's tensors, read and written as safetensors in blocks of rows, so no whole model is in memory.

The safetensors library reads them. It can only write tensors that are in memory, so this module writes the format
itself: eight bytes with the header's length, the header (JSON: type, shape and offsets of each tensor), the tensors.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.errors import DataError
from llamarefine_jobs.untrusted.safe_json import read_object

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BLOCK_ELEMENTS = 1 << 20  # an fp32 block of this size fits the CPU's cache; four times the size takes twice the time

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NAMES = {name: code for code, name in _FLOATS.items()}
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_PLAIN_NAME = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)  # a safetensors file in the index's folder
_ENTRY_BYTES = 160  # upper bound of a tensor's entry in the header, without its name

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Tensor:
    file: Path
    shape: Shape


class Weights:
    """Reads the tensors of a model folder: one safetensors file, or several with an index. Keeps the files' order.

    Raises DataError, on first use, if the files are not complete safetensors of float tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def blocks(self, name: str) -> Iterator[tuple[int, Any]]:
        """Yield a tensor in blocks of at most BLOCK_ELEMENTS (or one row), each with the index of its first row."""
        from safetensors import safe_open

        rows, *rest = self._tensors[name].shape
        step = max(1, BLOCK_ELEMENTS // max(1, prod(rest)))
        # The file is opened for each tensor: pages that were read from an open file stay mapped and count as memory.
        with safe_open(self._tensors[name].file, framework="pt") as file:
            tensor = file.get_slice(name)
            for begin in range(0, rows, step):
                yield begin, tensor[begin : min(rows, begin + step)]

    @cached_property
    def _tensors(self) -> dict[str, _Tensor]:
        from safetensors import SafetensorError, safe_open

        found: dict[str, _Tensor] = {}
        try:
            for path, listed in self._files():
                with safe_open(path, framework="pt") as file:
                    names = file.offset_keys()
                    if missing := sorted((listed or set()) - set(names)):
                        raise DataError(f"the base model's index lists {missing[0]} in {path.name}, which lacks it")
                    for name in names:
                        if listed is None or name in listed:
                            found[name] = _Tensor(path, _float_shape(name, file.get_slice(name)))
        except (SafetensorError, OSError) as error:
            raise DataError(f"the base model's weights cannot be read: {str(error).splitlines()[0]}") from None
        return found

    def _files(self) -> list[tuple[Path, set[str] | None]]:
        """Return each file with its tensors according to the index; without an index the single file, with None."""
        index, single = self.folder / INDEX, self.folder / SINGLE_FILE
        if not index.exists():
            if not single.exists():
                raise DataError(f"the base model has neither {SINGLE_FILE} nor {INDEX}; only safetensors can be read")
            return [(single, None)]
        try:
            places = read_object(index)["weight_map"]
            files = sorted(set(places.values()))
            refused = [file for file in files if not _PLAIN_NAME.fullmatch(file)]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"the base model's {INDEX} is not an index of tensors") from None
        if refused:
            raise DataError(
                f"the base model's {INDEX} names {refused[0]!r:.80}; expected safetensors files in the same folder"
            )
        return [(self.folder / file, {name for name, place in places.items() if place == file}) for file in files]


def write_weights(
    folder: Path,
    shapes: Mapping[str, Shape],
    dtype: str,
    max_file_bytes: int,
    blocks: Callable[[str], Iterable[Any]],
) -> None:
    """Write tensors with the given shapes into `folder`, as one file or as several with an index.

    `blocks(name)` yields the bytes of a tensor, in order, in pieces of any length. No file is longer than
    `max_file_bytes`, except for a larger tensor, which gets a file for itself.
    """
    shards = _shards(shapes, dtype, max_file_bytes)
    names = [SINGLE_FILE] if len(shards) == 1 else [_shard_name(place, len(shards)) for place in range(len(shards))]
    for file_name, tensors in zip(names, shards, strict=True):
        with (folder / file_name).open("wb") as file:
            file.write(_header({name: shapes[name] for name in tensors}, dtype))
            for name in tensors:
                for block in blocks(name):
                    file.write(block)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(prod(shape) for shape in shapes.values()) * _BYTES[dtype]},
            "weight_map": {name: file for file, tensors in zip(names, shards, strict=True) for name in tensors},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(shapes: Mapping[str, Shape], dtype: str, max_file_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled_bytes = 0
    for name, shape in shapes.items():
        needed_bytes = prod(shape) * _BYTES[dtype] + len(name) + _ENTRY_BYTES
        if shards[-1] and filled_bytes + needed_bytes > max_file_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(name)
        filled_bytes += needed_bytes
    return shards


def _shard_name(place: int, count: int) -> str:
    return f"model-{place + 1:05d}-of-{count:05d}.safetensors"


def _header(shapes: Mapping[str, Sequence[int]], dtype: str) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    begin = 0
    for name, shape in shapes.items():
        end = begin + prod(shape) * _BYTES[dtype]
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _float_shape(name: str, tensor: Any) -> Shape:
    code, shape = tensor.get_dtype(), tuple(tensor.get_shape())
    if code not in _FLOATS:
        raise DataError(
            f"the base model's {name} has the type {code}; expected {', '.join(_FLOATS.values())}: "
            "adapters cannot be merged exactly into a quantised base"
        )
    if not shape:
        raise DataError(f"the base model's {name} is a single number; no Llama has such a tensor")
    return shape
