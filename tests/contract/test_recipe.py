"""A recipe is complete by defaults, and every mistake in one is reported in one line with what to do."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llamarefine_jobs.contract.errors import RecipeError
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.recipe_file import load_recipe, parse_recipe, to_yaml

MINIMAL = """
name: mine
prepare:
  questions: {source: rows.csv}
  preferences: {source: pairs.jsonl}
"""


def errors_of(text: str, *overrides: str) -> list[str]:
    """Return the lines of the RecipeError that parsing `text` raises."""
    with pytest.raises(RecipeError) as error:
        parse_recipe(text, "mine.yaml", overrides)
    return str(error.value).splitlines()


def error_of(*overrides: str) -> str:
    """Return the one error line for a valid recipe with these overrides."""
    (line,) = errors_of(MINIMAL, *overrides)
    return line


def test_a_minimal_recipe_is_completed_by_defaults() -> None:
    recipe = parse_recipe(MINIMAL, "mine.yaml")
    assert recipe.prepare.base.source == "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    assert recipe.dpo.beta == 0.1


def test_a_written_recipe_is_read_back_unchanged() -> None:
    overrides = [
        "dpo.beta=0.3",
        "sft.lora.target_layers=[q_proj, v_proj]",
        "evaluate.gates=[{metric: loss, at_most: 5}]",
    ]
    recipe = parse_recipe(MINIMAL, "mine.yaml", overrides)
    assert parse_recipe(to_yaml(recipe), "again.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("sft.epoch=2", "mine.yaml: `sft.epoch` is not a key of a recipe; did you mean `sft.epochs`?"),
        ("dop.beta=2", "mine.yaml: `dop` is not a key of a recipe; did you mean `dpo`?"),
        ("beta=0.2", "mine.yaml: `beta` is not a key of a recipe; did you mean `dpo.beta`?"),
        ("sft.lora.rnak=8", "mine.yaml: `sft.lora.rnak` is not a key of a recipe; did you mean `sft.lora.rank`?"),
        ("sft.beta=0.2", "mine.yaml: `sft.beta` is not a key of a recipe; did you mean `dpo.beta`?"),
        (
            "merge.zzz=1",
            "mine.yaml: `merge.zzz` is not a key of a recipe; expected one of dtype, max_shard_mb",
        ),
    ],
)
def test_an_unknown_key_is_reported_with_the_nearest_valid_one(override: str, line: str) -> None:
    assert error_of(override) == line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sft.epochs=many", ["`sft.epochs`", "valid number", "found 'many'"]),
        ("sft.epochs=true", ["`sft.epochs`", "valid number", "found True"]),
        ("sft.batch_rows=1.5", ["`sft.batch_rows`", "valid integer", "found 1.5"]),
        ("sft.batch_rows='8'", ["`sft.batch_rows`", "valid integer", "found '8'"]),
        ("sft.lora.rslora=1", ["`sft.lora.rslora`", "valid boolean", "found 1"]),
        ("sft.lora=16", ["`sft.lora`", "expected keys below it", "found the value 16"]),
        ("sft=null", ["`sft`", "expected keys below it", "found nothing"]),
        ("sft.lora.target_layers=q_proj", ["`sft.lora.target_layers`", "valid list", "found 'q_proj'"]),
        ("name=2024-01-01", ["`name`", "valid string"]),
        ("prepare.questions=null", ["`prepare.questions`", "expected keys below it"]),
    ],
)
def test_a_value_of_the_wrong_type_is_reported_with_what_was_found(override: str, words: list[str]) -> None:
    line = error_of(override)
    assert [word for word in words if word not in line] == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("dpo.beta=0", ["`dpo.beta`", "greater than 0", "found 0"]),
        ("sft.learning_rate=-1e-4", ["`sft.learning_rate`", "greater than 0"]),
        ("sft.learning_rate=.nan", ["`sft.learning_rate`", "finite number"]),
        ("sft.learning_rate=.inf", ["`sft.learning_rate`"]),
        ("sft.learning_rate='inf'", ["`sft.learning_rate`"]),
        ("sft.warmup_fraction=1", ["`sft.warmup_fraction`", "less than 1"]),
        ("seed=-1", ["`seed`", "greater than or equal to 0", "found -1"]),
        ("max_length_tokens=4", ["`max_length_tokens`", "greater than or equal to 16"]),
        (f"max_length_tokens={10**399}", ["`max_length_tokens`", "less than 2147483648"]),
        (f"sft.micro_batch_rows={10**399}", ["`sft.micro_batch_rows`", "less than 2147483648"]),
        ("merge.dtype=int8", ["`merge.dtype`", "'float16', 'bfloat16' or 'float32'", "found 'int8'"]),
        ("sft.lora.target_layers=[lm_head]", ["`sft.lora.target_layers.0`", "q_proj"]),
        ("sft.lora.target_layers=[]", ["`sft.lora.target_layers`", "at least 1 item"]),
        ("name=Has Spaces", ["`name`"]),
        ("sft={batch_rows: 12, micro_batch_rows: 8}", ["batch_rows 12 must be a multiple of micro_batch_rows 8"]),
        ("sft.gpus=3", ["batch_rows 16 is shared by 3 gpus x 1 nodes: it must be a multiple of 3"]),
        ("sft={gpus: 4, micro_batch_rows: 8}", ["it must be a multiple of 32, the micro_batch_rows of all of them"]),
        ("sft.packing=never", ["`sft.packing` is not a key of a recipe", "backend"]),
        ("prepare.validation_fraction=0", ["must both be over 0"]),
        ("prepare.test_fraction=0.99", ["leave no row to train on"]),
        ("evaluate.gates=[{metric: loss}]", ["`evaluate.gates.0`", "at_least or at_most"]),
        ("evaluate.gates=[{metric: lost, at_most: 1}]", ["`evaluate.gates.0.metric`", "found 'lost'"]),
    ],
)
def test_a_value_out_of_range_is_reported_with_what_is_allowed(override: str, words: list[str]) -> None:
    line = error_of(override)
    assert [word for word in words if word not in line] == []


@pytest.mark.parametrize(
    ("settings", "rows"),
    [("{}", 16), ("{gpus: 2, nodes: 2}", 4), ("{micro_batch_rows: 2}", 2), ("{micro_batch_rows: 2, gpus: 4}", 2)],
)
def test_a_pass_has_at_most_the_rows_that_are_set_or_a_processs_part_of_the_batch(settings: str, rows: int) -> None:
    assert parse_recipe(MINIMAL, "mine.yaml", [f"dpo={settings}"]).dpo.pass_rows == rows


def test_a_missing_key_is_named() -> None:
    assert errors_of("name: mine\nprepare: {questions: {source: a}}") == ["mine.yaml: `prepare.preferences` is missing"]


def test_all_mistakes_are_reported_at_once() -> None:
    assert len(errors_of(MINIMAL, "sft.epoch=2", "dpo.beta=0", "merge.dtype=int8")) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "found nothing"),
        ("- a\n- b", "found a list"),
        ("just words", "found the value 'just words'"),
        ("name: [unclosed", "not YAML"),
        ("name: mine\nname: yours", "`name` is here twice"),
        ("name: a\nprepare:\n\tquestions: x", "not YAML"),
        ("name: !!python/object:os.system {}", "not YAML"),
        ("? [a, b]\n: c", "not YAML"),
        ("[" * 5000, "not YAML"),
        ("name: 2024-99-99", "not YAML"),
        ("{1: 2}", "mine.yaml:"),
        ("name: &a [*a]", "mine.yaml:"),
    ],
)
def test_text_that_is_not_a_recipe_is_reported_in_lines_with_its_place(text: str, words: str) -> None:
    lines = errors_of(text)
    assert words in lines[0]
    assert all(line.startswith("mine.yaml: ") for line in lines)


def test_an_alias_bomb_is_reported_in_short_lines() -> None:
    """Nine lines of YAML that expand to 10^9 items."""
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 9)
    )
    lines = errors_of(f"{bomb}name: *a8\nseed: *a8\nprepare: *a8\n")
    assert max(map(len, lines)) < 1000


def test_an_alias_is_allowed() -> None:
    recipe = parse_recipe(f"{MINIMAL}sft: {{lora: &lora {{rank: 4}}}}\ndpo: {{lora: *lora}}\n", "mine.yaml")
    assert recipe.sft.lora.rank == recipe.dpo.lora.rank == 4


@pytest.mark.parametrize("text", ["2e-4", "2.0e-4", "'2e-4'", "0.0002"])
def test_a_number_that_yaml_reads_as_text_is_accepted(text: str) -> None:
    assert parse_recipe(MINIMAL, "mine.yaml", [f"sft.learning_rate={text}"]).sft.learning_rate == 2e-4


def test_an_integer_is_accepted_as_a_float() -> None:
    assert parse_recipe(MINIMAL, "mine.yaml", ["sft.epochs=2"]).sft.epochs == 2.0


def test_an_override_can_set_a_key_in_an_empty_section() -> None:
    assert parse_recipe(f"{MINIMAL}sft:\n", "mine.yaml", ["sft.lora.rank=4"]).sft.lora.rank == 4


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sft.epochs", "expected key=value"),
        ("=2", "expected key=value"),
        ("name.x=2", "expected keys below `name`, found the value 'mine'"),
        ("sft.epochs=[", "the value is not YAML"),
    ],
)
def test_an_invalid_override_is_reported_with_its_text(override: str, words: str) -> None:
    line = error_of(override)
    assert line.startswith(f"--set {override}: ")
    assert words in line


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("name: größer".encode("latin-1"))
    huge = tmp_path / "huge.yaml"
    huge.write_text(MINIMAL + "# and so on\n" * 200_000)
    for path, words in [
        (tmp_path / "missing.yaml", "no such recipe; `llamarefine init`"),
        (latin, "a recipe is UTF-8 text; byte 8 is not"),
        (tmp_path, "cannot be read: Is a directory"),
        (huge, "found more than 1048576 bytes"),
    ]:
        with pytest.raises(RecipeError, match=words) as error:
            load_recipe(path)
        assert str(error.value).startswith(f"{path}: ")


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_recipe(tmp_path / "bom.yaml").name == "mine"


KEYS = st.sampled_from(
    ["name", "seed", "prepare", "sft", "dpo", "lora", "rank", "gates", "questions", "source", "metric"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
VALUES = st.recursive(
    SCALARS,
    lambda below: (
        st.lists(below, max_size=3) | st.dictionaries(KEYS | st.text(max_size=4) | st.integers(), below, max_size=4)
    ),
    max_leaves=12,
)


def assert_recipe_or_lines(text: str, *overrides: str) -> None:
    """Assert that `text` parses to a recipe or raises a RecipeError whose lines name their place."""
    try:
        recipe = parse_recipe(text, "mine.yaml", overrides)
    except RecipeError as error:
        for line in str(error).splitlines():
            assert line.startswith(("mine.yaml: ", "--set "))
    else:
        assert isinstance(recipe, Recipe)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KEYS, VALUES, max_size=6))
@example({"sft": {"epochs": 10**400}})
@example({"sft": {"a\nb": 1}, "x\ny": 2})
@example({"evaluate": {"gates": [{"metrics": 1}]}})
@example({"seed": {"a": 1}, "evaluate": {"gates": {"0": 1}}})
def test_arbitrary_values_give_a_recipe_or_its_errors(values: dict[Any, Any]) -> None:
    whole = yaml.safe_load(MINIMAL) | values
    assert_recipe_or_lines(yaml.safe_dump(whole, allow_unicode=True))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
@example("a: 0x")
@example("&a : *a")
@example("<<: 1")
@example("? ? a")
@example("!!binary a")
@example("a: !!float b")
@example("a: !!timestamp b")
@example("a: 1e999999999")
@example("a: 0x" + "f" * 4000)
@example("a: " + "1" * 5000)
def test_arbitrary_text_gives_a_recipe_or_its_errors(text: str) -> None:
    assert_recipe_or_lines(text)
    assert_recipe_or_lines(MINIMAL, f"sft.epochs={text}".replace("\n", " "))
