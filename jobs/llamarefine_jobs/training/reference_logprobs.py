"""The log-probabilities that DPO's reference gives to the answers: computed once, and kept in every checkpoint."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from llamarefine_jobs.context import Context
from llamarefine_jobs.models.encoding import Encoded
from llamarefine_jobs.models.forward import Forward
from llamarefine_jobs.models.scoring import score
from llamarefine_jobs.training.checkpoint_files import require_file
from llamarefine_jobs.training.objectives import Example

_FILE = "reference_logprobs.safetensors"
_NAME = "nats"  # (pairs, 2) in fp64: of the chosen and of the rejected answer


def examples_with_reference(
    forward: Forward, pairs: Sequence[tuple[Encoded, Encoded]], checkpoint: Path | None, context: Context
) -> list[Example]:
    """Return the pairs as examples with the reference's log-probabilities.

    They are read from `checkpoint` if there is one. Otherwise they are computed with the adapter disabled; each process
    computes its share. Raises ValueError if the checkpoint's are not those of these pairs; PreemptedError on SIGTERM.
    """
    nats = list(_read(checkpoint, len(pairs))) if checkpoint else _compute(forward, pairs, context)
    return [Example(pair, (nats[2 * place], nats[2 * place + 1])) for place, pair in enumerate(pairs)]


def write_reference(folder: Path, examples: Sequence[Example]) -> None:
    """Write the reference's log-probabilities of all examples into the folder of a checkpoint."""
    import torch
    from safetensors.torch import save_file

    save_file({_NAME: torch.tensor([example.reference for example in examples], dtype=torch.float64)}, folder / _FILE)


def _compute(forward: Forward, pairs: Sequence[tuple[Encoded, Encoded]], context: Context) -> list[float]:
    """Return the log-probabilities of all answers, chosen and rejected in turn, the same in every process."""
    answers = [answer for pair in pairs for answer in pair]
    context.note(f"the reference scores {len(answers)} answers once")

    def of_own_answers() -> list[float]:
        own = context.world.shard(range(len(answers)))
        with forward.model.disable_adapter():
            scores = score(forward, [answers[place] for place in own], lambda done, of: context.check_stop())
        nats = [0.0] * len(answers)
        for place, found in zip(own, scores, strict=True):
            nats[place] = found.logprob
        return nats

    return context.world.sum_over_processes(of_own_answers)


def _read(checkpoint: Path, pairs: int) -> Iterator[float]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    require_file(checkpoint, _FILE)
    try:
        nats = load_file(checkpoint / _FILE)[_NAME]
    except (SafetensorError, KeyError, OSError) as error:
        raise ValueError(f"its {_FILE} cannot be read ({type(error).__name__})") from None
    if nats.shape != (pairs, 2) or not bool(nats.isfinite().all()):
        raise ValueError(f"its {_FILE} does not hold two finite numbers for each of the {pairs} pairs")
    yield from nats.flatten().tolist()
