"""Which rows ask the same, and which split each belongs to.

Rows that ask the same or nearly the same form a group, over both sets; a group never crosses a
split. A group's split is a hash of the group itself, so new rows leave the others where they are.
"""

import hashlib
import math
import unicodedata
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llamarefine_jobs.contract.errors import DataError

SPLITS = ("train", "validation", "test")

_OPENERS = "\"'`([{<«“‘¿¡"
_CLOSERS = "\"'`()[]{}>»”’.,;:!?…"  # f() is f


def fold(text: str) -> str:
    """`text` for comparison only: case, white space, and the punctuation around words do not count.

    What stands inside or names a word stays: C, C++ and C# are three languages, .NET is one more.
    """
    words = unicodedata.normalize("NFC", text).casefold().split()
    bare = (word.lstrip(_OPENERS).rstrip(_CLOSERS) for word in words)
    return " ".join(word for word in bare if word) or " ".join(words)


def group_rows(
    questions: Sequence[str], dialogues: Sequence[Sequence[str]], similarity: float
) -> tuple[list[str], list[str]]:
    """A group for each question, and for each dialogue, which is given by its user turns.

    Two are in one group when their first user turns are equal after `fold`, or their word 3-grams
    have a Jaccard similarity of at least `similarity`; a dialogue also joins every question that a
    later turn of it asks again.
    """
    folded_questions = [fold(question) for question in questions]
    folded_dialogues = [[fold(turn) for turn in turns] for turns in dialogues]
    texts = sorted({*folded_questions, *(turns[0] for turns in folded_dialogues)})
    groups = _Groups(texts)
    _join_near_duplicates(groups, texts, similarity)
    asked = set(folded_questions)
    for turns in folded_dialogues:
        for later in turns[1:]:
            if later in asked:
                groups.join(turns[0], later)
    return [groups.name(text) for text in folded_questions], [groups.name(turns[0]) for turns in folded_dialogues]


def assign_splits(
    sets: Mapping[Any, Collection[str]], seed: int, validation_fraction: float, test_fraction: float
) -> dict[str, str]:
    """The split of each group, the same in every set that has it. No set is left without a split.

    Raises DataError, which says how many are needed, where a set has too few groups.
    """
    placed: dict[str, str] = {}
    for name, groups in sorted(sets.items(), key=lambda item: (len(item[1]), item[0])):
        held = {placed[group] for group in groups if group in placed}
        free = sorted(set(groups) - placed.keys(), key=lambda group: _share(group, seed))
        shares = [_share(group, seed) for group in free]
        needs_train, needs_validation, needs_test = (int(split not in held) for split in SPLITS)
        if len(free) < needs_train + needs_validation + needs_test:
            raise DataError(
                f"prepare.{name}: too few different questions are left after the checks ({len(groups)}): train, "
                f"validation and test need one each of their own; give at least {len(SPLITS)}, better some hundreds"
            )
        last = len(free) - needs_train
        test_end = max(bisect(shares, test_fraction), needs_test)
        validation_end = min(
            max(bisect(shares, test_fraction + validation_fraction), test_end + needs_validation), last
        )
        test_end = min(test_end, validation_end - needs_validation)
        for place, group in enumerate(free):
            placed[group] = "test" if place < test_end else "validation" if place < validation_end else "train"
    return placed


class _Groups:
    """Union-find over texts. A group is named by its first text in sorted order."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.parent = {text: text for text in texts}

    def first(self, text: str) -> str:
        while self.parent[text] != text:
            self.parent[text] = self.parent[self.parent[text]]
            text = self.parent[text]
        return text

    def join(self, one: str, other: str) -> None:
        low, high = sorted((self.first(one), self.first(other)))
        self.parent[high] = low

    def name(self, text: str) -> str:
        return hashlib.sha256(self.first(text).encode()).hexdigest()[:16]


def _join_near_duplicates(groups: _Groups, texts: Sequence[str], similarity: float) -> None:
    """Join every two texts whose Jaccard similarity reaches `similarity`: all of them, none missed.

    Two sets that similar share a gram among the rarest of each (https://doi.org/10.1145/1242572.1242591),
    so only texts that share one of those few are compared.
    """
    grams = [_three_grams(text) for text in texts]
    frequency = Counter(gram for found in grams for gram in found)
    holders: defaultdict[str, list[int]] = defaultdict(list)
    for place, found in enumerate(grams):
        rare_first = sorted(found, key=lambda gram: (frequency[gram], gram))
        decisive = rare_first[: len(found) - math.ceil(similarity * len(found) - 1e-9) + 1]
        for other in sorted({other for gram in decisive for other in holders[gram]}):
            if _jaccard(found, grams[other]) >= similarity:
                groups.join(texts[place], texts[other])
        for gram in decisive:
            holders[gram].append(place)


def _three_grams(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[start : start + 3]) for start in range(max(1, len(words) - 2))}


def _jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def _share(group: str, seed: int) -> float:
    """A number from 0 to 1 that only the group and the seed decide."""
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
