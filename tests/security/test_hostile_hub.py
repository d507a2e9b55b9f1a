"""A Hub that lies, leads astray or does not end: one line, the right exit code, and no file outside its cache."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from . import hostile_hub, hub_visitor
from .hostile_hub import Repository

CSV = b"question,answer\nq,a\n"
CODE = b"open('owned', 'w')\n"
CONFIG = {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "modeling.Own"}}


def of_rows(**attack: Any) -> Repository:
    return Repository({"train.csv": CSV}, **attack)


def attacks(outside: Path) -> dict[str, tuple[Repository, int, str]]:
    """By name: what the Hub does, the exit code that it is answered by, and words of the reason."""
    return {
        "dataset:a/name-up": (Repository({"../../owned.csv": CSV}), 11, "no plain relative path"),
        "dataset:a/name-deep": (Repository({"a/../../../owned.csv": CSV}), 11, "no plain relative path"),
        "dataset:a/name-absolute": (Repository({str(outside / "owned.csv"): CSV}), 11, "no plain relative path"),
        "dataset:a/name-backslash": (Repository({"..\\..\\owned.csv": CSV}), 11, "no plain relative path"),
        "dataset:a/name-control": (Repository({"a\n\x1b[2Jowned.csv": CSV}), 11, "no plain relative path"),
        "dataset:a/name-long": (Repository({"owned" * 60 + ".csv": CSV}), 11, "no plain relative path"),
        "dataset:a/name-case": (Repository({"a.csv": CSV, "A.csv": b"question,answer\n1,2\n"}), 11, "are one file"),
        "dataset:a/name-accent": (Repository({"ä.csv": CSV, "a\u0308.csv": CSV}), 11, "are one file"),
        "dataset:a/etag-up": (of_rows(etag="../../../owned"), 11, "as ETag"),
        "dataset:a/etag-absolute": (of_rows(etag=str(outside / "owned")), 11, "as ETag"),
        "dataset:a/etag-linked": (of_rows(extra={"X-Linked-Etag": '"../../owned"'}), 11, "as X-Linked-Etag"),
        "dataset:a/commit-up": (of_rows(commit="../../../owned"), 11, "as a commit"),
        "dataset:a/commit-absolute": (of_rows(commit=str(outside / "owned")), 11, "as a commit"),
        "dataset:a/commit-later": (of_rows(extra={"X-Repo-Commit": "../../owned"}), 11, "as X-Repo-Commit"),
        "dataset:a/many": (Repository({f"{number}.csv": CSV for number in range(10_001)}), 11, "10001 files"),
        "dataset:a/huge": (of_rows(sizes={"train.csv": 1 << 50}), 11, "expected at most 256"),
        "dataset:a/below-nothing": (of_rows(sizes={"train.csv": -(1 << 50)}), 11, "more than it listed"),
        "dataset:a/other-size": (of_rows(extra={"X-Linked-Size": "7"}), 20, "should be of size 7"),
        "dataset:a/other-huge-size": (of_rows(extra={"X-Linked-Size": str(1 << 50)}), 11, "too large"),
        "dataset:a/endless-body": (of_rows(endless="body"), 11, "more than it listed"),
        "dataset:a/endless-listing": (of_rows(endless="listing"), 11, "more than it listed"),
        "dataset:a/endless-pages": (of_rows(endless="pages"), 11, "from one request to the next"),
        "dataset:a/packed": (of_rows(encoding="gzip"), 11, "sends compressed data"),
        "dataset:a/to-a-file": (of_rows(redirect="file:///etc/passwd"), 11, "which is not a Hub"),
        "dataset:a/to-ftp": (of_rows(redirect="ftp://127.0.0.1/owned"), 11, "leads to ftp://"),
        "dataset:a/to-metadata": (of_rows(redirect="http://169.254.169.254/latest"), 11, "leads to http://169.254"),
        "dataset:a/to-itself": (of_rows(redirect="/a/to-itself/resolve/main/train.csv"), 20, "20 redirects"),
        "dataset:a/no-listing": (of_rows(listing={"a": 1}), 11, "cannot be downloaded"),
        "dataset:a/deep-listing": (of_rows(listing=RAW_DEPTH), 11, "cannot be downloaded"),
        "dataset:a/own-client": (of_rows(extra={"X-Xet-Hash": "a" * 64, "X-Xet-Refresh-Route": "/owned"}), 0, ""),
        "dataset:a/script": (Repository({"script.py": CODE, "train.csv": CSV}), 0, ""),
        "dataset:a/gone": (Repository({}), 11, ""),
        "model:a/code": (Repository({"config.json": json.dumps(CONFIG).encode(), "modeling.py": CODE}), 11, "own"),
        "model:a/pickle": (
            Repository({"config.json": b'{"model_type": "llama"}', "pytorch_model.bin": b"\x80", "m.pt": b"\x80"}),
            11,
            "expected weights in safetensors",
        ),
    }  # fmt: skip


RAW_DEPTH = b"[" * 100_000


@dataclass
class Visit:
    """How each repository was answered, what the Hub was asked for, and what lies where."""

    ended: dict[str, dict[str, Any]]
    asked: list[str]
    outer: Path


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    """All of them, by prepare's own code in one process: the Hub's library reads its settings as it is imported."""
    outer = tmp_path_factory.mktemp("outer")
    with hostile_hub.served() as hub:
        given = attacks(outer)
        hub.repositories = {name.partition(":")[2]: attack for name, (attack, _, _) in given.items()}
        hub.repositories["a/good"] = of_rows()
        done = subprocess.run(
            [sys.executable, hub_visitor.__file__, str(outer / "1/2/3/work"), "dataset:a/good", *given],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            cwd=outer,
            env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(outer / "1/2/3/cache")},
        )
        ended = {line["of"]: line for line in map(json.loads, done.stdout.splitlines())}
        yield Visit(ended, hub.asked, outer)


NAMES = list(attacks(Path("/outside")))


def test_what_a_good_repository_holds_is_brought(visit: Visit) -> None:
    assert visit.ended["dataset:a/good"]["exit_code"] == 0, visit.ended["dataset:a/good"]["said"]


@pytest.mark.parametrize("name", NAMES)
def test_it_ends_in_one_line(name: str, visit: Visit) -> None:
    _, exit_code, words = attacks(visit.outer)[name]
    found = visit.ended[name]
    assert found["exit_code"] == exit_code, found["said"]
    assert words in found["said"]
    assert "\n" not in found["said"]
    assert "\x1b" not in found["said"]


def test_nothing_lies_outside_the_cache(visit: Visit) -> None:
    assert len(visit.ended) == len(NAMES) + 1
    assert {path.name for path in (visit.outer / "1/2/3").iterdir()} == {"work", "cache"}
    assert [path.name for path in visit.outer.iterdir()] == ["1"]
    assert not list(visit.outer.rglob("owned*"))


def test_no_code_and_no_pickle_is_asked_for(visit: Visit) -> None:
    files = [line for line in visit.asked if "/resolve/" in line]
    assert files
    assert not [line for line in files if line.endswith((".py", ".bin", ".pt"))]
    assert not [line for line in visit.asked if "/owned" in line], "a route that an answer named was not followed"


def test_a_bounded_number_of_bytes_and_requests_came(visit: Visit) -> None:
    assert sum("endless-pages" in line for line in visit.asked) <= 210
    assert sum(path.stat().st_size for path in (visit.outer / "1").rglob("*") if path.is_file()) < 256 << 20


def test_the_stage_itself_says_one_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: small\nprepare:\n  base: {source: tiny-llama}\n"
        "  questions: {source: hf://datasets/a/etag}\n  preferences: {source: python-docstrings}\n"
    )
    with hostile_hub.served() as hub:
        hub.repositories["a/etag"] = of_rows(etag=str(tmp_path / "owned"))
        done = subprocess.run(
            [sys.executable, "-m", "llamarefine_jobs.prepare", "--recipe", recipe, "--store", tmp_path / "store"],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")},
        )
    assert done.returncode == 11
    assert "Traceback" not in done.stderr
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("prepare: error: prepare.questions: a/etag cannot be downloaded")
    )
    assert not list(tmp_path.glob("owned*"))
