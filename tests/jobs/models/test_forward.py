"""Rows go through a model packed as they go through it alone: any neighbours, place, size and attention."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from llamarefine_jobs.models.encoding import Encoded
from llamarefine_jobs.models.packing import Size
from llamarefine_jobs.models.token_loss import NO_TARGET
from tests.jobs import packed, tiny

TOLERANCE = 1e-6  # relative, of the nats of a row


@pytest.fixture(scope="module")
def model() -> Any:
    return packed.make_policy(num_key_value_heads=2).eval()


def nats_of_rows(forward: Any, rows: Sequence[Encoded]) -> list[float]:
    batch = forward.batch(rows)
    with torch.no_grad():
        nats_T = forward.nats(batch)
    sums: list[float] = nats_T.new_zeros(batch.rows).index_add(0, batch.row_of, nats_T).tolist()
    return sums


def nats_alone(model: Any, row: Encoded) -> float:
    """Return the nats of a row's answer from the model's own forward and logits."""
    ids = torch.tensor([row.prompt_ids + row.answer_ids])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1]
    return float(cross_entropy(logits, torch.tensor(row.answer_ids), reduction="sum"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(2, 60), st.integers(0, 5)), max_size=6),
    st.integers(0, 6),
    st.integers(0, 200),
    st.integers(0, 3),
    st.integers(0, 40),
)
def test_a_rows_nats_depend_on_neither_neighbours_nor_place_nor_size(
    model: Any, neighbours: list[tuple[int, int]], place: int, more_tokens: int, more_rows: int, longer: int
) -> None:
    row = packed.row(31)
    rows = [packed.row(tokens, seed) for tokens, seed in neighbours]
    place = min(place, len(rows))
    rows.insert(place, row)
    size = Size(sum(map(len, rows)) + more_tokens, len(rows) + more_rows, max(map(len, rows)) + longer)
    found = nats_of_rows(packed.sized_forward(model, size), rows)
    assert found[place] == pytest.approx(nats_alone(model, row), rel=TOLERANCE)
    assert found[len(rows) :] == [0] * more_rows


@pytest.mark.parametrize("forward_class", ["PackedForward", "PaddedForward"])
def test_score_equals_scoring_each_row_alone(forward_class: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from llamarefine_jobs.models import forward, scoring

    monkeypatch.setattr(scoring, "_BATCH_TOKENS", 310)
    rows = packed.rows()
    way = forward.PackedForward(model) if forward_class == "PackedForward" else forward.PaddedForward(model, packed.PAD)
    done = []
    scores = scoring.score(way, rows, lambda at, of: done.append((at, of)))
    assert [-one.logprob for one in scores] == pytest.approx([nats_alone(model, row) for row in rows], rel=TOLERANCE)
    assert [one.tokens for one in scores] == [len(row.answer_ids) for row in rows]
    assert len(done) > 2
    assert done[-1] == (len(rows), len(rows))
    assert scoring.score(way, []) == []


def test_scoring_leaves_the_mode_and_the_attention_of_the_model(model: Any) -> None:
    from llamarefine_jobs.models.forward import PackedForward
    from llamarefine_jobs.models.scoring import score

    attention = model.config._attn_implementation
    model.train()
    try:
        score(PackedForward(model), packed.rows())
        assert model.training
        assert model.config._attn_implementation == attention
    finally:
        model.eval()


def test_rows_of_one_answer_token_are_packed(model: Any) -> None:
    from llamarefine_jobs.models.forward import PackedForward

    rows = [packed.row(tokens, answer=1) for tokens in (2, 9, 2, 30)]
    assert [len(row.answer_ids) for row in rows] == [1] * 4
    found = nats_of_rows(PackedForward(model), rows)
    assert found == pytest.approx([nats_alone(model, row) for row in rows], rel=TOLERANCE)


SMALL = {
    "vocab_size": packed.TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def mistral(window: int) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            **SMALL,
            num_hidden_layers=2,
            sliding_window=window,
        )
    ).eval()


def qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            **SMALL,
            num_hidden_layers=3,
            use_sliding_window=True,
            sliding_window=16,
            max_window_layers=1,  # the first layer sees the whole row
        )
    )
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.data.normal_(0, 0.5)
    return model.eval()


@pytest.mark.parametrize("make", [lambda: mistral(16), lambda: mistral(512), qwen2], ids=["band", "wide band", "qwen2"])
def test_sliding_windows_and_biases_equal_the_models_own_attention(make: Any) -> None:
    from llamarefine_jobs.models.forward import PackedForward

    model = make()
    rows = packed.rows((3, 70, 16, 17, 120, 40))
    found = nats_of_rows(PackedForward(model), rows)
    assert found == pytest.approx([nats_alone(model, row) for row in rows], rel=TOLERANCE)


def test_a_window_smaller_than_the_rows_changes_their_nats() -> None:
    rows = packed.rows((70, 120))
    narrow, wide = mistral(16), mistral(512)
    for row in rows:
        assert abs(nats_alone(narrow, row) - nats_alone(wide, row)) > 0.01, "the window is not tested"


@pytest.mark.parametrize("rows_per_item", [1, 2])
def test_padded_passes_hold_every_item_once_and_keep_their_limits(model: Any, rows_per_item: int) -> None:
    from llamarefine_jobs.models.forward import PaddedForward

    draw = random.Random(rows_per_item)
    forward = PaddedForward(model, packed.PAD)
    for _ in range(50):
        lengths = [[draw.randrange(2, 300) for _ in range(rows_per_item)] for _ in range(draw.randrange(1, 30))]
        most_tokens, most_items = draw.choice([None, 200, 900]), draw.choice([None, 1, 4])
        passes = forward.passes(lengths, most_tokens, most_items)
        assert sorted(index for indices in passes for index in indices) == list(range(len(lengths)))
        for indices in passes:
            computed = len(indices) * rows_per_item * max(max(lengths[index]) for index in indices)
            assert most_tokens is None or computed <= most_tokens or len(indices) == 1
            assert most_items is None or len(indices) <= most_items


def test_padding_has_no_targets_and_counts_to_its_own_row(model: Any) -> None:
    from llamarefine_jobs.models.forward import PaddedForward

    batch = PaddedForward(model, packed.PAD).batch([Encoded([5], [6, 1]), Encoded([7, 8, 9], [1])])
    assert batch.ids_BT.tolist() == [[5, 6, 1, packed.PAD], [7, 8, 9, 1]]
    assert batch.targets.tolist() == [6, 1, NO_TARGET, NO_TARGET, NO_TARGET, NO_TARGET, 1, NO_TARGET]
    assert batch.row_of.tolist() == [0] * 4 + [1] * 4


def test_a_model_without_an_adapter_is_packed_too() -> None:
    from llamarefine_jobs.models.forward import PackedForward

    model = tiny.make_model(packed.TOKENS).eval()
    row = packed.row(9)
    assert nats_of_rows(PackedForward(model), [row]) == pytest.approx([nats_alone(model, row)], rel=TOLERANCE)
