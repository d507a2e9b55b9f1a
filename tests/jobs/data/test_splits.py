"""Groups and splits: rows that ask the same are always in the same split."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarefine_jobs.contract.errors import DataError
from llamarefine_jobs.data.splits import SPLITS, assign_splits, fold, group_rows

# Few words, so that equal and nearly equal texts are frequent.
questions = st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=7).map(" ".join), max_size=14)


def jaccard(one: str, other: str) -> float:
    grams = []
    for text in (one, other):
        words = text.split()
        grams.append({tuple(words[start : start + 3]) for start in range(max(1, len(words) - 2))})
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is CUDA?", "what  is\ncuda"),
        ("What is `cudaMalloc()` for?", "what is cudaMalloc for"),
        ("caf\u00e9", "CAFE\u0301"),
        ("Memory, and what?", "memory and what"),
    ],
)
def test_fold_ignores_case_spacing_and_outer_punctuation(one: str, other: str) -> None:
    assert fold(one) == fold(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("in C?", "in C++?"), ("C#", "C"), (".NET", "net"), ("x != y", "x == y"), ("?", "!"), ("x²", "x2")],
)
def test_fold_keeps_punctuation_that_is_part_of_a_name(one: str, other: str) -> None:
    assert fold(one) != fold(other)


@given(questions, st.sampled_from([0.3, 0.5, 0.75, 0.9, 1.0]))
def test_groups_are_exactly_the_chains_of_similar_questions(texts: list[str], similarity: float) -> None:
    groups, _ = group_rows(texts, [], similarity)
    expected = list(range(len(texts)))
    for _ in texts:
        for one in range(len(texts)):
            for other in range(one):
                if jaccard(texts[one], texts[other]) >= similarity:
                    expected[one] = expected[other] = min(expected[one], expected[other])
    for one in range(len(texts)):
        for other in range(one):
            assert (groups[one] == groups[other]) == (expected[one] == expected[other])


def test_a_dialogue_is_in_the_group_of_its_first_turn_and_of_every_repeated_question() -> None:
    texts = ["What is a warp?", "What is a block?", "What is a grid?"]
    dialogues = [["what is a warp", "thanks"], ["Hello!", "What is a BLOCK?"], ["Hello", "thanks"], ["Bye"]]
    (warp, block, grid), (first, second, third, fourth) = group_rows(texts, dialogues, 0.9)
    assert first == warp
    assert second == third == block
    assert len({warp, block, grid, fourth}) == 4


@given(
    st.sets(st.integers(0, 60), min_size=3, max_size=40),
    st.sets(st.integers(0, 60), min_size=3, max_size=40),
    st.integers(0, 50),
)
def test_every_set_has_every_split_and_every_group_has_one_split(one: set[int], other: set[int], seed: int) -> None:
    sets = {"questions": {str(group) for group in one}, "preferences": {str(group) for group in other}}
    try:
        placed = assign_splits(sets, seed, 0.05, 0.1)
    except DataError:
        # Refused only if the larger set has too few groups that the smaller set does not have.
        assert len(max(one, other, key=len) - min(one, other, key=len)) < len(SPLITS)
        return
    assert placed.keys() == sets["questions"] | sets["preferences"]
    for groups in sets.values():
        assert {placed[group] for group in groups} == set(SPLITS)


@pytest.mark.parametrize("seed", range(5))
def test_new_groups_do_not_move_the_others(seed: int) -> None:
    groups = {str(number) for number in range(320)}
    fewer = set(sorted(groups)[:250])
    before = assign_splits({"questions": fewer}, seed, 0.1, 0.1)
    after = assign_splits({"questions": groups}, seed, 0.1, 0.1)
    assert before == {group: after[group] for group in fewer}


def test_the_splits_have_the_requested_fractions_and_depend_on_the_seed() -> None:
    groups = {"questions": {str(number) for number in range(4000)}}
    placed = assign_splits(groups, 1, 0.05, 0.1)
    for split, fraction in (("test", 0.1), ("validation", 0.05)):
        count = sum(1 for place in placed.values() if place == split)
        assert abs(count - 4000 * fraction) < 4 * math.sqrt(4000 * fraction)
    assert placed != assign_splits(groups, 2, 0.05, 0.1)


@pytest.mark.parametrize("count", [1, 2])
def test_the_error_for_too_few_groups_names_the_number_that_is_needed(count: int) -> None:
    with pytest.raises(DataError, match="at least 3"):
        assign_splits({"questions": {str(number) for number in range(count)}}, 1, 0.05, 0.1)
