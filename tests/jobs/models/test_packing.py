"""Packing: sizes, passes, and the numbers of a packed sequence."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamarefine_jobs.models.encoding import Encoded
from llamarefine_jobs.models.packing import Size, choose_sizes, exact_size, pack, round_up, split
from llamarefine_jobs.models.token_loss import NO_TARGET

LENGTHS = st.lists(st.integers(1, 400), min_size=1, max_size=40)
LIMIT = st.none() | st.integers(1, 500)


@given(LENGTHS, LIMIT, LIMIT)
def test_every_item_is_in_exactly_one_pass_and_a_pass_keeps_its_limits(
    lengths: list[int], most_tokens: int | None, most_items: int | None
) -> None:
    passes = split(lengths, most_tokens, most_items)
    assert sorted(itertools.chain(*passes)) == list(range(len(lengths)))
    for indices in passes:
        assert indices
        assert most_items is None or len(indices) <= most_items
        tokens = sum(lengths[index] for index in indices)
        assert most_tokens is None or tokens <= most_tokens or len(indices) == 1


@given(LENGTHS, LIMIT, LIMIT)
def test_the_first_pass_holds_the_longest_item(
    lengths: list[int], most_tokens: int | None, most_items: int | None
) -> None:
    first = split(lengths, most_tokens, most_items)[0]
    assert max(lengths[index] for index in first) == max(lengths)


def test_items_are_split_into_about_equal_passes() -> None:
    lengths = [100, 90, 80, 30, 20, 10, 10, 10]
    assert [sum(lengths[index] for index in indices) for indices in split(lengths, 180)] == [180, 170]
    assert split(lengths, None, None) == [list(range(8))]
    assert split([], 100) == []


@settings(max_examples=200)
@given(st.lists(st.integers(1, 1400), min_size=1, max_size=12), st.integers(1, 4))
def test_no_other_sizes_need_less_padding(pass_tokens: list[int], most_sizes: int) -> None:
    def computed(sizes: tuple[int, ...]) -> float:
        return sum(min((size for size in sizes if size >= tokens), default=np.inf) for tokens in pass_tokens)

    found = choose_sizes(pass_tokens, most_sizes)
    possible = sorted({round_up(tokens) for tokens in pass_tokens})
    assert found == sorted(set(found))
    assert set(found) <= set(possible)
    assert 1 <= len(found) <= most_sizes
    best = min(computed(sizes) for sizes in itertools.combinations(possible, min(most_sizes, len(possible))))
    assert computed(tuple(found)) == best


ROWS = [Encoded([5], [6, 1]), Encoded([7, 8, 9], [1]), Encoded([10, 11], [12, 13, 1])]


def test_a_packed_sequence_holds_each_rows_tokens_places_and_targets() -> None:
    size = Size(16, 5, 5)
    numbers = pack(ROWS, size)
    ids, positions, targets, row_of = numbers[:64].reshape(4, 16).tolist()
    assert ids[:12] == [5, 6, 1, 7, 8, 9, 1, 10, 11, 12, 13, 1]
    assert positions == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2, 3]
    n = NO_TARGET
    assert targets == [6, 1, n, n, n, 1, n, n, 12, 13, 1, n, n, n, n, n]
    assert row_of == [0] * 3 + [1] * 4 + [2] * 5 + [4] * 4
    assert numbers[64:].tolist() == [0, 3, 7, 12, 12, 12, 16, 16, 16, 16]
    assert len(numbers[64:]) == size.segments + 1


@given(st.lists(st.integers(2, 40), min_size=1, max_size=8), st.integers(0, 300), st.integers(0, 5), st.integers(0, 30))
def test_segments_cover_the_sequence_and_none_is_longer_than_the_longest_row(
    lengths: list[int], more_tokens: int, more_rows: int, longer: int
) -> None:
    rows = [Encoded([3], [4] * (length - 1)) for length in lengths]
    exact = exact_size(rows)
    assert exact == Size(sum(lengths), len(lengths), max(lengths))
    size = Size(exact.tokens + more_tokens, exact.rows + more_rows, exact.longest + longer)
    ends = pack(rows, size)[4 * size.tokens :]
    assert ends[0] == 0
    assert ends[-1] == size.tokens
    segments = np.diff(ends)
    assert segments[: len(rows)].tolist() == lengths
    assert segments[len(rows) : size.rows].sum() == 0
    assert segments.min() >= 0
    assert segments.max() <= size.longest
    positions = pack(rows, size)[size.tokens : 2 * size.tokens]
    assert positions.max() < size.longest, "a position that no row has"


@pytest.mark.parametrize("size", [Size(11, 3, 5), Size(16, 2, 5), Size(16, 3, 4)])
def test_rows_that_do_not_fit_a_size_are_refused(size: Size) -> None:
    with pytest.raises(AssertionError, match="3 rows of 12 tokens do not fit"):
        pack(ROWS, size)
