"""Generation: batches change no answer, take in waiting prompts, and respect every limit."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llamarefine_jobs.models.encoding import load_tokenizer
from llamarefine_jobs.models.generation import Answer, generate, speed
from tests.jobs import tiny

POSITIONS = 64
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(tiny.write_prepared(tmp_path_factory.mktemp("prepared")) / "base")


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    """Return a model whose answers end at very different lengths: its logits of EOS vary more than the others."""
    model = tiny.make_model(len(tokenizer), max_position_embeddings=POSITIONS, initializer_range=0.3)
    model.lm_head.weight.data[tokenizer.eos_token_id] *= 2
    return model.eval()


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    """Return 40 prompts of 1 to 40 tokens, in an order that is not that of their lengths."""
    generator = torch.Generator().manual_seed(2)
    lengths = (torch.randperm(40, generator=generator) + 1).tolist()
    return [torch.randint(5, len(tokenizer), (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def expected(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[Answer]:
    """Return the answer to each prompt alone, decoded token by token without a cache."""
    return [decode_alone(model, tokenizer, prompt) for prompt in prompts]


def decode_alone(model: Any, tokenizer: Any, prompt: list[int]) -> Answer:
    ids, limit = list(prompt), min(NEW_TOKENS, POSITIONS - len(prompt))
    while len(ids) - len(prompt) < limit:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    new = ids[len(prompt) :]
    return Answer(tokenizer.decode(new, skip_special_tokens=True), len(new), len(new) < limit)


@pytest.mark.parametrize("batch_rows", [1, 3, 8, 100])
def test_a_batch_gives_the_answers_that_each_prompt_has_alone(
    model: Any, tokenizer: Any, prompts: list[list[int]], expected: list[Answer], batch_rows: int
) -> None:
    answers = generate(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch_rows=batch_rows)
    assert answers == expected
    assert {answer.stopped for answer in answers} == {True, False}
    assert len({answer.tokens for answer in answers}) > 8, "the answers must end at different lengths"


@pytest.fixture
def batches(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, int]]]:
    """Return the list of batches that the model generated: rows, tokens of the longest row, new tokens."""
    seen: list[tuple[int, int, int]] = []
    original = model.generate

    def record(input_ids: Any, **options: Any) -> Any:
        output = original(input_ids=input_ids, **options)
        seen.append((*input_ids.shape, output.shape[1] - input_ids.shape[1]))
        return output

    monkeypatch.setattr(model, "generate", record)
    return seen


def test_prompts_that_wait_take_the_places_of_answers_that_ended(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    expected: list[Answer],
    batches: list[tuple[int, int, int]],
) -> None:
    """Without this, a batch has as many steps as its longest answer has tokens."""
    batch_rows = 8
    generate(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch_rows=batch_rows)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    fixed = [order[start : start + batch_rows] for start in range(0, len(order), batch_rows)]
    steps = sum(max(expected[index].tokens + expected[index].stopped for index in batch) for batch in fixed)
    assert sum(new for _, _, new in batches) < 0.8 * steps
    assert len(batches) <= 2 * len(fixed)
    assert all(rows == batch_rows for rows, _, _ in batches[: len(fixed)])


def test_progress_counts_the_answers_that_have_ended(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    seen: list[tuple[int, int]] = []
    generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=NEW_TOKENS,
        batch_rows=8,
        on_batch=lambda done, of: seen.append((done, of)),
    )
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (len(prompts), len(prompts))


def test_an_answer_ends_at_the_models_last_position(
    model: Any, tokenizer: Any, batches: list[tuple[int, int, int]]
) -> None:
    """A shorter prompt of the same batch still gets its full answer."""
    generator = torch.Generator().manual_seed(3)
    long, short = (torch.randint(5, len(tokenizer), (n,), generator=generator).tolist() for n in (POSITIONS - 5, 9))
    answers = generate(model, tokenizer, [long, short], max_new_tokens=NEW_TOKENS, batch_rows=2)
    assert answers == [decode_alone(model, tokenizer, prompt) for prompt in (long, short)]
    assert answers[0].tokens <= 5
    assert all(longest + new <= POSITIONS for _, longest, new in batches)


def test_a_seed_decides_what_is_drawn_at_a_temperature(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    def draw(seed: int) -> list[Answer]:
        torch.manual_seed(seed)
        return generate(model, tokenizer, prompts, max_new_tokens=8, batch_rows=8, temperature=2.0, top_p=0.9)

    assert draw(1) == draw(1) != draw(2)


def test_no_prompts_have_no_answers(model: Any, tokenizer: Any) -> None:
    assert generate(model, tokenizer, [], max_new_tokens=8, batch_rows=8) == []


def test_speed_counts_the_answers_tokens() -> None:
    found = speed([Answer("a", 3, True), Answer("b", 7, False)], 2.5)
    assert (found.answers, found.tokens, found.seconds, found.tokens_per_s) == (2, 10, 2.5, 4.0)
    assert str(found) == "2 answers, 10 tokens in 2.5 s, 4 tokens/s"
    assert str(speed([Answer("", 0, True)], 0.0)) == "1 answer, 0 tokens in 0.0 s, 0 tokens/s"
