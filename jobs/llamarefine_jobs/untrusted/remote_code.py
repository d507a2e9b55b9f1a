"""Refuse models and adapters that bring code of their own, before any library reads their files.

Manifests protect against wrong bytes, but anyone who can write to the bucket can write manifests, too. These checks
read the files themselves, so they do not depend on who published them.
"""

from pathlib import Path

from llamarefine_jobs.contract.errors import DataError, IntegrityError
from llamarefine_jobs.untrusted.safe_json import read_object

_CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json")
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INERT = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md")


def refuse_remote_code(folder: Path) -> None:
    """Raise DataError if a config in `folder` names Python modules, or an attention kernel from a repository."""
    for name in _CONFIGS:
        if not (folder / name).is_file():
            continue
        try:
            config = read_object(folder / name)
        except ValueError as error:
            raise DataError(f"the model in {folder.name}/: {error}") from None
        named = ["auto_map"] if "auto_map" in config else [key for key in _KERNELS if "/" in str(config.get(key))]
        if named:
            raise DataError(
                f"the model in {folder.name}/ needs code of its own ({named[0]} in {name}), which is never run; "
                "choose another base"
            )


def refuse_programs(folder: Path) -> None:
    """Raise IntegrityError if a downloaded model or adapter has a file of an unexpected type, or names code."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if file.suffix not in INERT:
            raise IntegrityError(f"it holds {file.relative_to(folder).as_posix()}, a type of file that no model has")
    try:
        refuse_remote_code(folder)
    except DataError as error:
        raise IntegrityError(str(error)) from None


def pickles_in(folder: Path) -> list[str]:
    """Return the names of the files in `folder` that have a pickle's suffix."""
    return sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
