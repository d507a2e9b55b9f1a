"""The value and the verdict of each metric, on numbers small enough to compute by hand."""

import math

import pytest

from llamarefine_jobs.contract.recipe import Evaluate, Gate
from llamarefine_jobs.models.generation import Answer
from llamarefine_jobs.models.scoring import Score
from llamarefine_jobs.report.metrics import METRICS, MODELS, ComparedRows, ModelResults, check_gates, compare, token_f1

SETTINGS = Evaluate(bootstrap_resamples=500)


@pytest.mark.parametrize(
    ("text", "reference", "f1"),
    [
        ("it copies a file", "it copies a file", 1.0),
        ("file a copies it", "it copies a file", 1.0),  # order does not count
        ("it copies", "it copies a file", 2 * 2 / (2 + 4)),
        ("cudaMalloc", "cudamalloc", 0.0),  # case matters in API names
        ("torch.cuda.empty_cache()", "torch.cuda", 2 * 3 / (7 + 3)),  # . ( and ) are tokens, empty_cache is one
        ("the the the", "the", 2 * 1 / (3 + 1)),  # a repeated word is found once
        ("", "", 1.0),
        ("", "a", 0.0),
        ("a", "", 0.0),
        ("!", "a", 0.0),
        ("größer 漢字", "größer 漢字", 1.0),
    ],
)
def test_token_f1(text: str, reference: str, f1: float) -> None:
    assert token_f1(text, reference) == pytest.approx(f1)


def results(
    *, nats: float = 2.0, chosen: float = -10.0, rejected: float = -10.0, text: str = "yes", rows: int = 40
) -> ModelResults:
    """Return the results of a model that does the same on each of `rows` rows."""
    return ModelResults(
        answers=[Score(-nats * 5, 5)] * rows,
        chosen=[Score(chosen, 5)] * rows,
        rejected=[Score(rejected, 5)] * rows,
        generated=[Answer(text, 5, True)] * rows,
    )


def compare_three(base: ModelResults, sft: ModelResults, merged: ModelResults, beta: float = 0.1) -> dict[str, dict]:
    rows = len(base.answers)
    groups = [str(row) for row in range(rows)]
    compared_rows = ComparedRows({"answers": groups, "pairs": groups, "generated": groups}, ["yes"] * rows)
    lines = compare({"base": base, "sft": sft, "merged": merged}, compared_rows, SETTINGS, beta=beta, seed=0)
    return {line["name"]: line for line in lines}


def verdicts(line: dict) -> list[str]:
    return [change["verdict"] for change in line["changes"]]


def test_loss_is_a_mean_over_tokens_and_not_over_rows() -> None:
    rows = ModelResults(
        [Score(-10, 1), *[Score(-1.0, 9)] * 9], [Score(-1, 1)] * 10, [Score(-1, 1)] * 10, [Answer("", 0, True)] * 10
    )
    found = compare_three(rows, rows, rows)
    assert found["loss"]["values"]["base"]["value"] == pytest.approx((10 + 9) / (1 + 81))
    assert found["perplexity"]["values"]["base"]["value"] == pytest.approx(math.exp(19 / 82))


def test_reward_is_beta_times_the_gain_over_sft() -> None:
    found = compare_three(results(), results(chosen=-9, rejected=-9), results(chosen=-6, rejected=-10), beta=0.5)
    margin = {model: value["value"] for model, value in found["preference_margin"]["values"].items()}
    assert margin == pytest.approx({"base": 0, "sft": 0, "merged": 2.0})
    accuracy = {model: value["value"] for model, value in found["preference_accuracy"]["values"].items()}
    assert accuracy == {"base": 0.5, "sft": 0.5, "merged": 1.0}


def test_sft_is_its_own_reference_by_definition() -> None:
    found = compare_three(results(), results(chosen=-3), results())
    assert found["preference_accuracy"]["values"]["sft"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert found["preference_margin"]["values"]["sft"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert "by definition" in found["preference_accuracy"]["note"]


def test_a_margin_below_rounding_noise_is_a_tie() -> None:
    found = compare_three(results(), results(), results(chosen=-10 + 1e-5))
    assert found["preference_accuracy"]["values"]["merged"]["value"] == 0.5
    assert verdicts(found["preference_accuracy"]) == ["no clear change"] * 3


def test_a_loss_that_moved_by_rounding_noise_shows_no_clear_change() -> None:
    found = compare_three(results(), results(nats=2 - 1e-6), results())
    assert found["loss"]["changes"][0]["value"] == pytest.approx(-1e-6)
    assert verdicts(found["loss"]) == ["no clear change"] * 3


def test_likelihood_metrics_need_no_reference() -> None:
    found = compare_three(results(chosen=-4, rejected=-9), results(chosen=-9, rejected=-4), results())
    values = found["likelihood_accuracy"]["values"]
    assert [values[model]["value"] for model in MODELS] == [1.0, 0.0, 0.5]
    assert found["likelihood_margin"]["values"]["base"]["value"] == 5.0


def test_lower_loss_and_higher_f1_are_better() -> None:
    found = compare_three(results(nats=3.0, text="no"), results(nats=2.0, text="no"), results(nats=2.5, chosen=-3))
    assert [change["value"] for change in found["loss"]["changes"]] == pytest.approx([-1, 0.5, -0.5])
    assert verdicts(found["loss"]) == ["better", "worse", "better"]
    assert verdicts(found["token_f1"]) == ["no clear change", "better", "better"]
    assert verdicts(found["likelihood_margin"]) == ["no clear change", "better", "better"]


def test_three_equal_models_show_no_clear_change_in_any_metric() -> None:
    same = results()
    for line in compare_three(same, same, same).values():
        assert verdicts(line) == ["no clear change"] * 3, line["name"]


def test_longer_answers_are_called_longer_and_not_better() -> None:
    def answering(tokens: int) -> ModelResults:
        rows = results()
        answers = [Answer("yes", tokens + row % 3, True) for row in range(40)]
        return ModelResults(rows.answers, rows.chosen, rows.rejected, answers)

    found = compare_three(answering(5), answering(9), answering(9))
    # Each row grew by the same: the difference has no spread.
    assert found["answer_tokens"]["better"] is None
    assert verdicts(found["answer_tokens"]) == ["longer", "no clear change", "longer"]


def test_one_row_gives_values_and_no_clear_change() -> None:
    found = compare_three(results(rows=1), results(nats=1, rows=1), results(nats=0.5, chosen=-1, rows=1))
    for name, line in found.items():
        assert line["n"] == line["groups"] == 1
        assert verdicts(line) == ["no clear change"] * 3, name
    assert found["loss"]["values"]["base"] == {"value": 2.0, "low": None, "high": None}


def test_every_metric_has_all_fields_that_the_report_prints() -> None:
    found = compare_three(results(), results(), results())
    assert list(found) == [metric.name for metric in METRICS]
    for line in found.values():
        assert line["title"]
        assert line["note"]
        assert set(line["values"]) == set(MODELS)
        assert [(change["from"], change["to"]) for change in line["changes"]] == [
            ("base", "sft"), ("sft", "merged"), ("base", "merged"),
        ]  # fmt: skip


def test_each_bound_of_a_gate_is_checked_separately() -> None:
    metrics = list(compare_three(results(), results(), results(chosen=-5)).values())
    gates = (
        Gate(metric="loss", at_most=1.5),
        Gate(metric="preference_accuracy", at_least=0.6),
        Gate(metric="loss", model="base", at_least=2.0, at_most=5.0),
    )
    checked = [(gate["model"], gate["bound"], gate["passed"]) for gate in check_gates(gates, metrics)]
    assert checked == [
        ("merged", "at_most 1.5", False),
        ("merged", "at_least 0.6", True),
        ("base", "at_least 2.0", True),
        ("base", "at_most 5.0", True),
    ]
