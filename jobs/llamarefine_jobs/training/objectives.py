"""The losses of SFT and DPO over a step's examples, each a sum over a pass that is divided by the step's weight.

An example is what must be in the same pass: one row for SFT; a chosen and a rejected row for DPO.
Tensor axes: T positions of a pass, R rows of a pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llamarefine_jobs.models.encoding import Encoded
from llamarefine_jobs.models.forward import row_sums


@dataclass(frozen=True)
class Example:
    """Rows that share a pass, and for DPO the log-probability in nats that the reference gives to each answer."""

    rows: tuple[Encoded, ...]
    reference: tuple[float, ...] = ()

    def __len__(self) -> int:
        """Return the number of tokens."""
        return sum(len(row) for row in self.rows)


class Objective(Protocol):
    """A training loss. A step's loss is the sum of its passes' losses, however the step is split into passes."""

    rows_per_example: int

    def weight(self, examples: Sequence[Example]) -> int:
        """Return the number that the sums over the whole step are divided by."""

    def loss(self, nats_T: Any, batch: Any, reference_R: Any, weight: Any) -> Any:
        """Return the part of the step's loss that comes from one pass."""


class SftObjective:
    """Mean negative log-likelihood of the step's answer tokens, as TRL's SFTTrainer computes it."""

    rows_per_example = 1

    def weight(self, examples: Sequence[Example]) -> int:
        return sum(len(row.answer_ids) for example in examples for row in example.rows)

    def loss(self, nats_T: Any, batch: Any, reference_R: Any, weight: Any) -> Any:
        return nats_T.sum() / weight


class DpoObjective:
    """Mean over the step's pairs of -log sigmoid(reward margin) (https://arxiv.org/abs/2305.18290, equation 7).

    Rows alternate between chosen and rejected answers. Pairs that are not there, in a packed sequence with room for
    more, are empty rows.
    """

    rows_per_example = 2

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def weight(self, examples: Sequence[Example]) -> int:
        return len(examples)

    def loss(self, nats_T: Any, batch: Any, reference_R: Any, weight: Any) -> Any:
        from torch.nn.functional import logsigmoid

        margins = self.margins(nats_T, batch, reference_R)
        answered_R = row_sums(batch.targets.ge(0), batch)
        return (-logsigmoid(margins) * (answered_R[0::2] > 0)).sum() / weight

    def margins(self, nats_T: Any, batch: Any, reference_R: Any) -> Any:
        """Return the reward margin of each pair, (R / 2,)."""
        rewards_R = self.beta * (-row_sums(nats_T, batch) - reference_R)
        return rewards_R[0::2] - rewards_R[1::2]
