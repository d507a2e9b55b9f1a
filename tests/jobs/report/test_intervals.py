"""The bootstrap equals scipy's, gives the known values, and resamples groups instead of rows."""

import numpy as np
import pytest

from llamarefine_jobs.report.intervals import Bootstrap, Estimate, Interval, enough_groups

CONFIDENCE = 0.95


def bootstrap(groups: list[int] | range, *, resamples: int = 2000, seed: int = 0) -> Bootstrap:
    return Bootstrap([str(group) for group in groups], resamples=resamples, seed=seed)


def ones(count: int) -> np.ndarray:
    return np.ones(count)


def test_the_interval_of_a_ratio_equals_scipys() -> None:
    from scipy.stats import bootstrap as scipy_bootstrap

    random = np.random.default_rng(1)
    tokens = random.integers(5, 60, 80).astype(float)
    nats = tokens * random.gamma(4, 0.6, 80)
    theirs = scipy_bootstrap(
        (nats, tokens),
        lambda nats, tokens, axis: nats.sum(axis=axis) / tokens.sum(axis=axis),
        paired=True, n_resamples=20_000, confidence_level=CONFIDENCE, method="BCa", rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    ours = bootstrap(range(80), resamples=20_000).ratio(nats, tokens).interval(CONFIDENCE)
    assert ours.value == pytest.approx(nats.sum() / tokens.sum())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=3e-3)


def test_95_percent_intervals_contain_the_true_value_in_95_percent_of_samples() -> None:
    random = np.random.default_rng(3)
    covered = 0
    for seed in range(400):
        values = random.gamma(2, 1, 60)  # skewed, mean 2
        found = bootstrap(range(60), resamples=600, seed=seed).ratio(values, ones(60)).interval(CONFIDENCE)
        covered += found.low <= 2 <= found.high
    assert 0.91 <= covered / 400 <= 0.98


def test_rows_of_one_group_count_as_one() -> None:
    values = np.random.default_rng(4).normal(size=40)
    single = bootstrap(range(40)).ratio(values, ones(40)).interval(CONFIDENCE)
    repeated = np.repeat(values, 25)
    by_row = bootstrap(range(1000)).ratio(repeated, ones(1000)).interval(CONFIDENCE)
    by_group = bootstrap(list(np.repeat(range(40), 25))).ratio(repeated, ones(1000)).interval(CONFIDENCE)
    assert (by_group.low, by_group.high) == pytest.approx((single.low, single.high))
    assert by_group.high - by_group.low > 4 * (by_row.high - by_row.low)


def test_a_difference_is_paired() -> None:
    random = np.random.default_rng(5)
    hardness = random.normal(scale=10, size=100)  # one value per row, the same for both models
    resamples = bootstrap(range(100))
    before = resamples.ratio(hardness + random.normal(scale=0.1, size=100), ones(100))
    after = resamples.ratio(hardness - 0.2 + random.normal(scale=0.1, size=100), ones(100))
    change = (after - before).interval(CONFIDENCE)
    assert change.side == -1
    assert change.high - change.low < 0.1
    assert before.interval(CONFIDENCE).low < after.interval(CONFIDENCE).value  # unpaired, the change would be unclear


def test_two_equal_models_differ_by_exactly_zero() -> None:
    resamples = bootstrap(range(50))
    values = np.random.default_rng(6).normal(size=50)
    assert (resamples.ratio(values, ones(50)) - resamples.ratio(values, ones(50))).interval(CONFIDENCE) == Interval(
        0, 0, 0
    )


def test_an_accuracy_of_1_still_has_an_interval() -> None:
    """After 100 rows without a failure, Clopper-Pearson's lower bound of the share is .025 ** (1 / 100)."""
    found = bootstrap(range(100)).ratio(ones(100), ones(100), (0, 1)).interval(CONFIDENCE)
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(0.025**0.01)


def test_a_value_by_definition_has_an_interval_of_width_0() -> None:
    resamples = bootstrap(range(100))
    known, measured = resamples.known(0.5), resamples.ratio(ones(100), ones(100), (0, 1))
    assert known.interval(CONFIDENCE) == Interval(0.5, 0.5, 0.5)
    change, value = (measured - known).interval(CONFIDENCE), measured.interval(CONFIDENCE)
    assert change.low == pytest.approx(value.low - 0.5)


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_too_few_groups_give_no_interval_and_no_verdict(groups: int) -> None:
    found = bootstrap(range(groups)).ratio(ones(groups), ones(groups), (0, 1)).interval(CONFIDENCE)
    assert found == Interval(1, None, None)
    assert found.side == 0


def test_six_groups_are_the_fewest_for_an_interval_at_95_percent() -> None:
    assert next(groups for groups in range(1, 12) if enough_groups(groups, CONFIDENCE)) == 6


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(7).normal(size=30)
    one, two, other = (bootstrap(range(30), seed=seed).ratio(values, ones(30)).interval(0.9) for seed in (1, 1, 2))
    assert one == two != other


def test_an_increasing_scale_keeps_the_value_and_the_order() -> None:
    estimate = bootstrap(range(30)).ratio(np.linspace(1, 2, 30), ones(30))
    found = estimate.map(np.exp).interval(CONFIDENCE)
    assert found.value == pytest.approx(np.exp(1.5))
    assert found.low < found.value < found.high


def test_a_wider_confidence_is_a_wider_interval() -> None:
    estimate: Estimate = bootstrap(range(40)).ratio(np.random.default_rng(8).normal(size=40), ones(40))
    narrow, wide = estimate.interval(0.8), estimate.interval(0.99)
    assert wide.low < narrow.low < narrow.high < wide.high
