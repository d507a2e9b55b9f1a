"""The pages of the report: self-contained and safe for any text, also when optional parts are missing."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llamarefine_jobs.contract.recipe import Evaluate
from llamarefine_jobs.models.generation import Answer
from llamarefine_jobs.models.scoring import Score
from llamarefine_jobs.report import comparison, page
from llamarefine_jobs.report.metrics import MODELS, ComparedRows, ModelResults, compare
from llamarefine_jobs.report.plots import draw_chart, draw_strip
from tests.jobs import tiny

HOSTILE = (
    "<script>document.title='owned'; fetch('https://example.org/')</script>",
    "</pre></div><img src=x onerror=\"document.title='owned'\">",
    "{{ 7 * 7 }} {% raw %} ${7*7} &lt;b&gt; &amp;",
    "| a | b |\n| --- | --- |\n```\nfence\n````\n# heading\n[link](https://example.org) ![i](https://example.org/i.png)",
    "\u202eright to left\u202c 漢字 🦙 e\u0301 \x00 \x1b[31m",
    "word" * 5000,
    "",
)


def results(shift: float = 0.0, rows: int = 40) -> ModelResults:
    return ModelResults(
        [Score(-20.0 + shift - row % 7, 5) for row in range(rows)],
        [Score(-10.0 + shift * 2, 5)] * rows,
        [Score(-10.0, 5)] * rows,
        [Answer("yes", 5 + row % 3, row % 2 == 0) for row in range(rows)],
    )


def make_report(**changes: Any) -> dict[str, Any]:
    """Return a report with real comparisons and without any optional part, except for `changes`."""
    groups = [str(row) for row in range(40)]
    compared_rows = ComparedRows({"answers": groups, "pairs": groups, "generated": groups}, ["yes, it is"] * 40)
    three = {"base": results(), "sft": results(2), "merged": results(3)}
    metrics = compare(three, compared_rows, Evaluate(bootstrap_resamples=300), beta=0.1, seed=0)
    return {
        "format": 1,
        "name": "tiny",
        "made_at": "2026-11-23T12:00:00+00:00",
        "verdict": comparison.judge(metrics, 0.95),
        "models": list(MODELS),
        "metrics": metrics,
        "confidence": 0.95,
        "bootstrap_resamples": 300,
        "caveats": [],
        "gates": [],
        "examples": [],
        "data": {},
        "curves": {"sft": [], "dpo": []},
        "best_step": {"sft": None, "dpo": None},
        "proofs": {"dpo": {}, "merge": {}},
        "stages": [],
        "lineage": [],
        "recipe": tiny.recipe().model_dump(mode="json"),
        "prompt_template": "<|user|>",
        "prompt_template_sha256": "0" * 64,
        "store": "file:///store",
        "package_version": "0.1.0",
    } | changes


def example_with(text: str) -> dict[str, Any]:
    return {"question": text, "reference": text, "answers": dict.fromkeys(MODELS, text), "stopped": {"base": False}}


def hostile_report() -> dict[str, Any]:
    return make_report(
        name=HOSTILE[0],
        examples=[example_with(text) for text in HOSTILE],
        caveats=list(HOSTILE[:4]),
        data={
            HOSTILE[0]: {HOSTILE[1]: HOSTILE[2]},
            "rows": [{"question": HOSTILE[0], "answers": [HOSTILE[3], None, 3]}],
        },
        proofs={"dpo": {HOSTILE[0]: 1e-9}, "merge": {"nested": {"a": True}}},
        gates=[{"metric": "loss", "model": "merged", "bound": "at_most 1.0", "value": 3.0, "passed": False}],
        store=f"s3://{HOSTILE[1]}",
        curves={
            "sft": [*({"step": step, "loss": 4 - step / 10} for step in range(1, 9)), {"step": 8, "eval_loss": 3.1}],
            "dpo": [{"step": 1, "loss": 0.7}, {"step": 1, "eval_loss": 0.6, "eval_reward_accuracy": 0.4}],
        },
        stages=[
            {"stage": "sft", "key": "0" * 64, "seconds": 3671.0, "steps": 10, "tokens_per_s": 12345.6}
            | {"accelerator": HOSTILE[0], "backend": None}
        ],
    )


class Elements(HTMLParser):
    """The tags of an HTML page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_escapes_hostile_text() -> None:
    found = Elements(page.html(hostile_report()))
    tags = {tag for tag, _ in found.tags}
    assert not tags & {"script", "img", "iframe", "object", "embed", "form", "base", "a"}
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    for text in HOSTILE[:4]:
        assert text in found.text


def test_html_page_loads_nothing_from_elsewhere() -> None:
    text = page.html(hostile_report())
    found = Elements(text)
    names = {name for _, attributes in found.tags for name in attributes}
    assert not names & {"src", "srcset", "href", "xlink:href", "action", "data", "poster"}
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert 'content="default-src &#39;none&#39;' in text or "content=\"default-src 'none'" in text


def test_html_page_has_styles_for_dark_mode_print_and_small_screens() -> None:
    text = page.html(make_report())
    for rule in ("@media (prefers-color-scheme: dark)", "@media print", "@media (max-width:", 'name="viewport"'):
        assert rule in text


def test_markdown_escapes_hostile_text() -> None:
    text = page.markdown(hostile_report())
    assert "<script>" not in re.sub(r"(?ms)^(`{3,})text\n.*?^\1$", "", text)
    fences = re.findall(r"(?m)^(`{3,})text$", text)
    assert max(map(len, fences)) == 5  # one more than the longest run inside
    for line in text.splitlines():
        if line.startswith("| Held-out loss"):
            assert line.count("|") in (5, 6)  # 5 in the table of changes, 6 in the table of values


@pytest.mark.parametrize("render", [page.html, page.markdown])
def test_a_report_without_optional_parts_renders(render: Any) -> None:
    text = render(make_report())
    assert "SFT lowered the held-out loss" in text
    assert "Quality gates" not in text
    assert "Proofs" not in text
    assert "None" not in Elements(text).text


def test_outcomes_of_the_data_card_are_followed_by_their_sum() -> None:
    card = {"questions": {"rows_read": 1234, "outcomes": {"kept: test": 1200, "exact duplicate": 34}, "conflicts": []}}
    rows = re.findall("<tr.*?><th>(.*?)</th><td>(.*?)</td></tr>", page.html(make_report(data=card)))
    assert rows[-3:] == [("kept: test", "1\u202f200"), ("exact duplicate", "34"), ("all rows read", "1\u202f234")]


def test_a_long_answer_is_cut_with_a_note() -> None:
    text = page.html(make_report(examples=[example_with("x" * 50_000)]))
    assert "44,000 more characters in report.json" in text
    assert len(text) < 100_000


def test_a_report_with_a_lone_surrogate_is_written(tmp_path: Path) -> None:
    comparison.write(make_report(examples=[example_with("half \ud83e a llama")]), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["examples"][0]["question"] == "half \ud83e a llama"
    assert "half ? a llama" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("values", "digits", "signed", "written"),
    [
        ({"value": 4.9237, "low": 4.791, "high": 5.065}, 3, False, ("4.924", "4.791 to 5.065")),
        ({"value": 0.0004, "low": 0.0002, "high": 0.0006}, 3, True, ("+0.0004", "0.0002 to 0.0006")),
        ({"value": -0.5, "low": -0.7, "high": -0.3}, 2, True, ("−0.50", "−0.70 to −0.30")),
        ({"value": 0.5, "low": 0.5, "high": 0.5}, 3, False, ("0.500", "")),
        ({"value": 1.0, "low": None, "high": None}, 1, False, ("1.0", "")),
        ({"value": -1e-9, "low": -2e-9, "high": 1e-9}, 3, True, ("0.000", "")),
        ({"value": 12345.6, "low": None, "high": None}, 1, False, ("12\u202f345.6", "")),
    ],
)
def test_narrow_intervals_are_shown_with_more_digits(
    values: dict[str, Any], digits: int, signed: bool, written: tuple[str, str]
) -> None:
    assert page.estimate(values, digits, signed) == written


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (7.21, "7.2 s"), (59.4, "59 s"), (61, "1 min 1 s"), (3671, "1 h 1 min")]
)
def test_durations_are_shown_in_hours_minutes_and_seconds(seconds: float, text: str) -> None:
    assert page.duration(seconds) == text


def line(name: str, verdicts: tuple[str, str, str], base: float, sft: float, merged: float) -> dict[str, Any]:
    values = {"base": base, "sft": sft, "merged": merged}
    steps = (("base", "sft"), ("sft", "merged"), ("base", "merged"))
    return {
        "name": name,
        "values": {model: {"value": value} for model, value in values.items()},
        "changes": [
            {"from": before, "to": after, "value": values[after] - values[before], "verdict": verdict}
            for (before, after), verdict in zip(steps, verdicts, strict=True)
        ],
    }


SAME, BETTER, WORSE = "no clear change", "better", "worse"


SFT_BETTER = "SFT lowered the held-out loss from 5.00 to 4.00 nats per token, "
SFT_UNCLEAR = "SFT did not clearly change the held-out loss (5.00 before, 4.00 nats per token after), "
DPO_BETTER = "DPO raised preference accuracy from 0.50 to 0.90."
DPO_UNCLEAR = "DPO did not clearly change preference accuracy (0.50 before, 0.90 after)."


@pytest.mark.parametrize(
    ("sft", "dpo", "sentence", "detail"),
    [
        (BETTER, BETTER, f"{SFT_BETTER}and {DPO_BETTER}", "Both changes are larger"),
        (
            BETTER,
            SAME,
            f"{SFT_BETTER}but {DPO_UNCLEAR}",
            "The second change is not distinguishable from noise at 95% confidence.",
        ),
        (SAME, BETTER, f"{SFT_UNCLEAR}but {DPO_BETTER}", "The first change is not distinguishable from noise"),
        (SAME, SAME, f"{SFT_UNCLEAR}and {DPO_UNCLEAR}", "this run shows no improvement"),
    ],
)
def test_the_verdict_says_which_changes_are_clear(sft: str, dpo: str, sentence: str, detail: str) -> None:
    loss = line("loss", (sft, SAME, SAME), 5, 4, 4)
    accuracy = line("preference_accuracy", (SAME, dpo, SAME), 0.4, 0.5, 0.9)
    found = comparison.judge([loss, accuracy], 0.95)
    assert found["sentence"] == sentence
    assert detail in found["detail"]


def test_the_verdict_names_a_loss_that_dpo_raised() -> None:
    loss = line("loss", (BETTER, WORSE, WORSE), 4.5, 4, 5)
    accuracy = line("preference_accuracy", (SAME, WORSE, SAME), 0.4, 0.5, 0.3)
    found = comparison.judge([loss, accuracy], 0.95)
    assert "but DPO lowered preference accuracy from 0.50 to 0.30" in found["sentence"]
    assert "DPO also raised the held-out loss by 1.000 nats per token." in found["detail"]
    assert "worse than the base model does" in found["detail"]


def test_a_chart_contains_its_points_and_has_round_ticks() -> None:
    chart = draw_chart({"training": [(1, 4.93), (50, 4.2), (100, 4.14)], "validation": []})
    assert [drawn.name for drawn in chart.lines] == ["training"]
    assert [label for _, label in chart.y_ticks] == ["4", "4.2", "4.4", "4.6", "4.8", "5"]
    assert [label for _, label in chart.x_ticks] == ["0", "20", "40", "60", "80", "100"]
    for x, y in chart.lines[0].points:
        assert chart.left <= x <= chart.width
        assert 0 <= y <= chart.bottom


def test_a_chart_without_points_is_not_drawn() -> None:
    assert draw_chart({"training": [], "validation": []}) is None


@pytest.mark.parametrize("points", [[(0, 0.0)], [(5, 1.0), (10, 1.0)], [(1, -3e-7), (2, 4e9)]])
def test_a_chart_of_extreme_points_is_drawn(points: list[tuple[float, float]]) -> None:
    assert "nan" not in draw_chart({"training": points}).lines[0].path


def test_a_strip_keeps_the_models_order_and_scale() -> None:
    values = {"base": {"value": 0.0, "low": None, "high": None}, "merged": {"value": 3.0, "low": 2.0, "high": 4.0}}
    base, merged = draw_strip(values, width=100)
    assert (base.value, base.low) == (6, None)
    assert merged.low < merged.value < merged.high == 94
    assert base.y < merged.y


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the hostile report on this machine; yield its address and a list of every requested path."""
    comparison.write(hostile_report(), tmp_path)
    requested: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            requested.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/report.html", requested
    server.shutdown()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_shows_the_page_and_requests_nothing_else(served: tuple[str, list[str]], tmp_path: Path) -> None:
    address, requested = served
    shown = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom", address],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    found = Elements(shown.stdout)
    assert "script" not in {tag for tag, _ in found.tags}
    assert HOSTILE[0] in found.text
    assert "owned" not in re.search("<title>(.*?)</title>", shown.stdout)[1].split("–")[1]
    assert "CONSOLE" not in shown.stderr
    assert set(requested) <= {"/report.html", "/favicon.ico"}
