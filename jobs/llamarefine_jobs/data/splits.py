"""Groups of rows that ask the same, and the split of each group.

Rows that ask the same question, or nearly the same, form one group across both sets. A group is always in one split. A
hash of the group decides which, so new rows do not move the other groups.
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
_CLOSERS = "\"'`()[]{}>»”’.,;:!?…"  # with brackets, so that f() equals f


def fold(text: str) -> str:
    """Return `text` for comparisons: without case, extra white space, and the punctuation around words.

    Punctuation that is part of a name is kept, so C, C++, C# and .NET stay different.
    """
    words = unicodedata.normalize("NFC", text).casefold().split()
    bare = (word.lstrip(_OPENERS).rstrip(_CLOSERS) for word in words)
    return " ".join(word for word in bare if word) or " ".join(words)


def group_rows(
    questions: Sequence[str], dialogues: Sequence[Sequence[str]], similarity: float
) -> tuple[list[str], list[str]]:
    """Return the group of each question and of each dialogue. A dialogue is the sequence of its user turns.

    Two texts are in one group if they are equal after `fold`, or if their word 3-grams have a Jaccard similarity of at
    least `similarity`; a dialogue is represented by its first user turn. A dialogue is also in the group of every
    question that one of its later turns repeats.
    """
    folded_questions = [fold(question) for question in questions]
    folded_dialogues = [[fold(turn) for turn in turns] for turns in dialogues]
    texts = sorted({*folded_questions, *(turns[0] for turns in folded_dialogues)})
    groups = _Groups(texts)
    _join_near_duplicates(groups, texts, similarity)
    known_questions = set(folded_questions)
    for turns in folded_dialogues:
        for later in turns[1:]:
            if later in known_questions:
                groups.join(turns[0], later)
    return [groups.name(text) for text in folded_questions], [groups.name(turns[0]) for turns in folded_dialogues]


def assign_splits(
    sets: Mapping[Any, Collection[str]], seed: int, validation_fraction: float, test_fraction: float
) -> dict[str, str]:
    """Return the split of each group, the same in every set. Every set gets groups in every split.

    Raises DataError, which names the number of groups that are needed, if a set has too few groups.
    """
    split_of: dict[str, str] = {}
    for name, groups in sorted(sets.items(), key=lambda item: (len(item[1]), item[0])):
        filled = {split_of[group] for group in groups if group in split_of}
        free = sorted(set(groups) - split_of.keys(), key=lambda group: _hash_fraction(group, seed))
        fractions = [_hash_fraction(group, seed) for group in free]
        needs_train, needs_validation, needs_test = (int(split not in filled) for split in SPLITS)
        if len(free) < needs_train + needs_validation + needs_test:
            raise DataError(
                f"prepare.{name}: too few different questions are left after the checks ({len(groups)}): train, "
                f"validation and test need at least one each; give at least {len(SPLITS)}, better some hundreds"
            )
        last = len(free) - needs_train
        test_end = max(bisect(fractions, test_fraction), needs_test)
        validation_end = min(
            max(bisect(fractions, test_fraction + validation_fraction), test_end + needs_validation), last
        )
        test_end = min(test_end, validation_end - needs_validation)
        for place, group in enumerate(free):
            split_of[group] = "test" if place < test_end else "validation" if place < validation_end else "train"
    return split_of


class _Groups:
    """Union-find over texts. The name of a group is a hash of its first text in sorted order."""

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
    """Join all pairs of texts whose Jaccard similarity is at least `similarity`, without comparing every pair.

    Two texts that are so similar share at least one of their rarest grams (https://doi.org/10.1145/1242572.1242591),
    so only texts that share one of these grams are compared.
    """
    grams = [_three_grams(text) for text in texts]
    frequency = Counter(gram for found in grams for gram in found)
    holders: defaultdict[str, list[int]] = defaultdict(list)
    for place, found in enumerate(grams):
        rare_first = sorted(found, key=lambda gram: (frequency[gram], gram))
        rarest = rare_first[: len(found) - math.ceil(similarity * len(found) - 1e-9) + 1]
        for other in sorted({other for gram in rarest for other in holders[gram]}):
            if _jaccard(found, grams[other]) >= similarity:
                groups.join(texts[place], texts[other])
        for gram in rarest:
            holders[gram].append(place)


def _three_grams(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[start : start + 3]) for start in range(max(1, len(words) - 2))}


def _jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def _hash_fraction(group: str, seed: int) -> float:
    """Return a number from 0 to 1 that depends on the group and the seed only."""
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
