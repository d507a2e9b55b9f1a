"""A progress line is parsed back to the same values, with any prefix in its log line."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarefine_jobs.contract.progress import Progress, parse

NAMES = st.from_regex(r"[a-z][a-z-]{0,12}", fullmatch=True)
FIGURES = st.none() | st.floats()
PROGRESS = st.builds(
    Progress,
    stage=NAMES,
    step=st.integers(0, 10**9),
    steps=st.integers(0, 10**9),
    phase=st.none() | NAMES,
    loss=FIGURES,
    tokens_per_s=FIGURES,
    eta_s=FIGURES,
)


def same(first: float | None, second: float | None) -> bool:
    """Return whether two values are equal within the precision of a progress line."""
    if first is None or second is None:
        return first is second
    if math.isnan(first) or math.isnan(second):
        return math.isnan(first) and math.isnan(second)
    return math.isclose(first, second, rel_tol=1e-3)


@given(PROGRESS, st.sampled_from(["", "2026-11-01T12:00:00Z ", "[sft] "]))
def test_a_progress_line_is_parsed_back(progress: Progress, before: str) -> None:
    found = parse(before + progress.line())
    assert found is not None
    assert (found.stage, found.step, found.steps, found.phase) == (
        progress.stage,
        progress.step,
        progress.steps,
        progress.phase,
    )
    for name in ("loss", "tokens_per_s", "eta_s"):
        assert same(getattr(found, name), getattr(progress, name)), name
    assert found.line() == progress.line()


@given(st.text(max_size=60))
def test_other_lines_are_not_progress_and_raise_nothing(line: str) -> None:
    assert parse(line) is None


@pytest.mark.parametrize(
    "line",
    [
        "progress",
        "progress stage=sft",
        "progress stage=sft step=x steps=10",
        "progress stage=sft step=1 steps=10 and more",
        "no progress stage",
        "inprogress stage=sft step=1 steps=10",
    ],
)
def test_an_incomplete_line_is_not_progress(line: str) -> None:
    assert parse(line) is None


def test_a_value_of_a_later_version_is_ignored() -> None:
    assert parse("progress stage=sft step=1 steps=2 watts=300") == Progress("sft", 1, 2)
