"""Text from a data set, a model or whoever writes to the bucket stays text when a browser opens a report."""

import re
from pathlib import Path

import pytest

from llamarefine_jobs.report import page
from llamarefine_jobs.store import Store
from llamarefine_k8s.runs import results
from tests.jobs.report.test_comparison import example_with, make_report

from .browser import ATTACKS, CHROMIUM, visit

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


def poisoned() -> str:
    """Return a report in which every text is an attack: cells, answers, names, metrics, caveats, libraries."""
    text = " ".join(ATTACKS)
    stage = {"stage": text, "seconds": 1.0, "steps": 1, "tokens_per_s": 1.0, "accelerator": text, "backend": text}
    artifact = dict.fromkeys(("stage", "key", "package_version", "git_commit", "image_digest"), text) | {
        "manifest_sha256": "0" * 64,
        "parents": {text: text},
        "libraries": {text: text},
        "files": 1,
        "size_bytes": 1,
        "seed": 1,
        "finished_at": "2026-11-24T02:00:00+00:00",
    }
    return page.html(
        make_report(
            name=text,
            caveats=list(ATTACKS),
            examples=[example_with(attack) for attack in ATTACKS],
            data={"rows_read": 3, text: text, "outcomes": {text: 1, "kept": text}},
            proofs={"dpo": {text: text}, "merge": {}},
            stages=[stage],
            lineage=[artifact],
            gates=[{"metric": text, "model": text, "bound": text, "value": 1.0, "passed": False}],
            store=text,
            prompt_template=text,
        )
    )


@needs_browser
def test_no_text_of_a_report_is_executed_or_fetched(tmp_path: Path) -> None:
    file = tmp_path / "site/report.html"
    file.parent.mkdir()
    file.write_text(poisoned(), encoding="utf-8")
    seen = visit(file)
    assert "owned" not in seen.console
    assert set(seen.requested_paths) <= {"/report.html", "/favicon.ico"}
    assert not re.search(r"<(script|img|iframe|object|embed|form|base|link)\b", seen.dom)
    title = re.search("<title>(.*?)</title>", seen.dom, re.DOTALL)
    assert title
    assert title[1].startswith("&lt;script&gt;"), "the attack is shown as text"


@needs_browser
def test_the_attacks_work_on_an_unprotected_page(tmp_path: Path) -> None:
    """The same texts, not escaped and without the page's policy: without this, the test above proves nothing."""
    file = tmp_path / "site/report.html"
    file.parent.mkdir()
    file.write_text(f"<!doctype html><title>t</title><body>{ATTACKS[0]}{ATTACKS[1]}", encoding="utf-8")
    seen = visit(file)
    assert "owned" in seen.console
    assert "/owned" in seen.requested_paths


@needs_browser
def test_a_page_that_an_attacker_wrote_to_the_bucket_executes_nothing(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    store = Store(s3_uri)
    evil = f"<!doctype html><title>t</title><body>the report {''.join(ATTACKS)}"
    store.write("runs/small-00000000/report/report.html", evil.encode())
    seen = visit(results.report_page(store, "small-00000000"))
    assert "the report" in seen.dom
    assert "owned" not in re.sub("srcdoc=.*", "", seen.dom, flags=re.DOTALL)
    assert not [line for line in seen.console.splitlines() if "CONSOLE" in line and ' "owned"' in line]
    assert "/owned" not in seen.requested_paths


@pytest.mark.parametrize("attack", ATTACKS)
def test_markdown_holds_no_markup_from_the_text(attack: str) -> None:
    text = page.inline(attack)
    assert not re.search(r"(?<!\\)[<>\[\]|`]", text)
    fenced = page.fenced(f"```\n{attack}\n````")
    fence = fenced.split("text")[0]
    assert fenced.count(fence) == 2
    assert fenced.endswith(fence)
