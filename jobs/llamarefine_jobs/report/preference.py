"""The preference figures, defined once: likelihood margin, tie, reward margin, accuracy.

DPO's validation and the report both use this module, so the same scores give the same figures.
Axis: P pairs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llamarefine_jobs.models.scoring import Score
from llamarefine_jobs.report.intervals import Floats

TIE_NATS = 1e-3


class Preference(NamedTuple):
    """Each pair's credit for the accuracy, and its reward margin; both of shape P. Means over pairs are the figures."""

    credit: Floats
    reward_margin: Floats


def preference(policy_margins: Floats, reference_margins: Floats, beta: float) -> Preference:
    """Compare a policy with its reference by the likelihood margins of both, of shape P.

    The reward of an answer is beta * (log p under the policy - log p under the reference). A pair's reward margin is
    the reward of its chosen answer minus the reward of its rejected answer.
    """
    gains = policy_margins - reference_margins
    return Preference(accuracy_credit(gains), beta * gains)


def likelihood_margins(chosen: Sequence[Score], rejected: Sequence[Score]) -> Floats:
    """Return log p(chosen) - log p(rejected) of each pair, in nats, each summed over the tokens of the answer."""
    pairs = zip(chosen, rejected, strict=True)
    return np.array([chosen.logprob - rejected.logprob for chosen, rejected in pairs], dtype=np.float64)


def accuracy_credit(margins_nats: Floats) -> Floats:
    """Return each pair's credit: 1 for a positive margin, 0 for a negative one, one half for a tie.

    A tie is a margin whose absolute value, before it is multiplied with beta, is below TIE_NATS. The log-probabilities
    are computed in fp32, so their last digits change with the batch and with the order of a sum: the sign of a margin
    that small is rounding noise.
    """
    credit: Floats = (np.sign(np.where(np.abs(margins_nats) < TIE_NATS, 0, margins_nats)) + 1) / 2
    return credit
