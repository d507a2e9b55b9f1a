"""Models and checkpoints that bring code of their own are refused, before any library looks at them.

What guards against a wrong byte is the manifest; whoever may write the bucket writes manifests too. This guards
against them: it holds for what is in the files, whoever vouches for it.
"""

from pathlib import Path

from llamarefine_jobs.contract.errors import DataError, IntegrityError
from llamarefine_jobs.json_file import read_object

_CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json")
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_TENSORS = (".pt", ".pth")  # torch's own pickles: read as tensors and plain values, of which the trainer needs three
_INERT = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md")


def refuse_own_code(folder: Path) -> None:
    """Raise DataError where a config in `folder` names Python modules, or an attention kernel of a repository."""
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
    """Raise IntegrityError where a model or an adapter that was brought holds what none of ours does, or names code."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if file.suffix not in _INERT:
            raise IntegrityError(f"it holds {file.relative_to(folder).as_posix()}, which no model of ours does")
    try:
        refuse_own_code(folder)
    except DataError as error:
        raise IntegrityError(str(error)) from None


def pickles_in(folder: Path) -> list[str]:
    """The names of the files in `folder` that a pickle is read from."""
    return sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)


def refuse_pickled_code(checkpoint: Path) -> None:
    """Raise IntegrityError where a checkpoint holds more than tensors and plain values; nothing in it is run.

    The optimizer's, the scheduler's and the random generators' states are torch's pickles. They are read here as the
    trainer reads them, by an unpickler that knows tensors, numbers and texts, and refuses a call of anything else.
    """
    import torch
    from transformers.trainer_pt_utils import safe_globals

    for file in sorted(path for path in checkpoint.rglob("*") if not path.is_dir()):
        name = file.relative_to(checkpoint).as_posix()
        if file.suffix not in (*_INERT, *_TENSORS):
            raise IntegrityError(f"the checkpoint holds {name}, which no checkpoint of ours does; {_REMEDY}")
        if file.suffix in _TENSORS:
            try:
                with safe_globals():
                    torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except MemoryError:
                raise
            except Exception as error:
                reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
                raise IntegrityError(
                    f"the checkpoint's {name} is more than tensors and plain values ({reason}); {_REMEDY}"
                ) from None


_REMEDY = "nothing of it was run: find out who wrote it, then remove the checkpoint and run again"
