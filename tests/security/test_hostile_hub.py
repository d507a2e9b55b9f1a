"""A malicious Hub causes a one-line error with the right exit code, and no file outside the cache."""

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


def one_csv(**attack: Any) -> Repository:
    return Repository({"train.csv": CSV}, **attack)


def attacks(outside: Path) -> dict[str, tuple[Repository, int, str]]:
    """Return by name: the attack, the expected exit code, and words that the error must contain."""
    return {
        "dataset:a/name-up": (Repository({"../../owned.csv": CSV}), 11, "not a plain relative path"),
        "dataset:a/name-deep": (Repository({"a/../../../owned.csv": CSV}), 11, "not a plain relative path"),
        "dataset:a/name-absolute": (Repository({str(outside / "owned.csv"): CSV}), 11, "not a plain relative path"),
        "dataset:a/name-backslash": (Repository({"..\\..\\owned.csv": CSV}), 11, "not a plain relative path"),
        "dataset:a/name-control": (Repository({"a\n\x1b[2Jowned.csv": CSV}), 11, "not a plain relative path"),
        "dataset:a/name-long": (Repository({"owned" * 60 + ".csv": CSV}), 11, "not a plain relative path"),
        "dataset:a/name-case": (Repository({"a.csv": CSV, "A.csv": b"question,answer\n1,2\n"}), 11, "are one file"),
        "dataset:a/name-accent": (Repository({"ä.csv": CSV, "a\u0308.csv": CSV}), 11, "are one file"),
        "dataset:a/etag-up": (one_csv(etag="../../../owned"), 11, "as ETag"),
        "dataset:a/etag-absolute": (one_csv(etag=str(outside / "owned")), 11, "as ETag"),
        "dataset:a/etag-linked": (one_csv(extra={"X-Linked-Etag": '"../../owned"'}), 11, "as X-Linked-Etag"),
        "dataset:a/commit-up": (one_csv(commit="../../../owned"), 11, "as a commit"),
        "dataset:a/commit-absolute": (one_csv(commit=str(outside / "owned")), 11, "as a commit"),
        "dataset:a/commit-later": (one_csv(extra={"X-Repo-Commit": "../../owned"}), 11, "as X-Repo-Commit"),
        "dataset:a/many": (Repository({f"{number}.csv": CSV for number in range(10_001)}), 11, "10001 files"),
        "dataset:a/huge": (one_csv(sizes={"train.csv": 1 << 50}), 11, "expected at most 256"),
        "dataset:a/below-nothing": (one_csv(sizes={"train.csv": -(1 << 50)}), 11, "more than it listed"),
        "dataset:a/other-size": (one_csv(extra={"X-Linked-Size": "7"}), 20, "should be of size 7"),
        "dataset:a/other-huge-size": (one_csv(extra={"X-Linked-Size": str(1 << 50)}), 11, "too large"),
        "dataset:a/endless-body": (one_csv(endless="body"), 11, "more than it listed"),
        "dataset:a/endless-listing": (one_csv(endless="listing"), 11, "more than it listed"),
        "dataset:a/endless-pages": (one_csv(endless="pages"), 11, "from one request to the next"),
        "dataset:a/packed": (one_csv(encoding="gzip"), 11, "sends compressed data"),
        "dataset:a/to-a-file": (one_csv(redirect="file:///etc/passwd"), 11, "which is not a Hub"),
        "dataset:a/to-ftp": (one_csv(redirect="ftp://127.0.0.1/owned"), 11, "leads to ftp://"),
        "dataset:a/to-metadata": (one_csv(redirect="http://169.254.169.254/latest"), 11, "leads to http://169.254"),
        "dataset:a/to-itself": (one_csv(redirect="/a/to-itself/resolve/main/train.csv"), 20, "20 redirects"),
        "dataset:a/no-listing": (one_csv(listing={"a": 1}), 11, "cannot be downloaded"),
        "dataset:a/deep-listing": (one_csv(listing=RAW_DEPTH), 11, "cannot be downloaded"),
        "dataset:a/own-client": (one_csv(extra={"X-Xet-Hash": "a" * 64, "X-Xet-Refresh-Route": "/owned"}), 0, ""),
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
    """The result for each repository, the requests to the Hub, and the folder around the cache."""

    results: dict[str, dict[str, Any]]
    requests: list[str]
    outer: Path


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    """Read all repositories in another process, because the Hub's library reads its settings on import."""
    outer = tmp_path_factory.mktemp("outer")
    with hostile_hub.served() as hub:
        all_attacks = attacks(outer)
        hub.repositories = {name.partition(":")[2]: attack for name, (attack, _, _) in all_attacks.items()}
        hub.repositories["a/good"] = one_csv()
        done = subprocess.run(
            [sys.executable, hub_visitor.__file__, str(outer / "1/2/3/work"), "dataset:a/good", *all_attacks],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            cwd=outer,
            env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(outer / "1/2/3/cache")},
        )
        results = {line["repository"]: line for line in map(json.loads, done.stdout.splitlines())}
        yield Visit(results, hub.requests, outer)


NAMES = list(attacks(Path("/outside")))


def test_a_good_repository_is_downloaded(visit: Visit) -> None:
    assert visit.results["dataset:a/good"]["exit_code"] == 0, visit.results["dataset:a/good"]["error"]


@pytest.mark.parametrize("name", NAMES)
def test_an_attack_ends_in_a_one_line_error(name: str, visit: Visit) -> None:
    _, exit_code, words = attacks(visit.outer)[name]
    result = visit.results[name]
    assert result["exit_code"] == exit_code, result["error"]
    assert words in result["error"]
    assert "\n" not in result["error"]
    assert "\x1b" not in result["error"]


def test_no_file_is_written_outside_the_cache(visit: Visit) -> None:
    assert len(visit.results) == len(NAMES) + 1
    assert {path.name for path in (visit.outer / "1/2/3").iterdir()} == {"work", "cache"}
    assert [path.name for path in visit.outer.iterdir()] == ["1"]
    assert not list(visit.outer.rglob("owned*"))


def test_no_code_and_no_pickle_is_requested(visit: Visit) -> None:
    files = [line for line in visit.requests if "/resolve/" in line]
    assert files
    assert not [line for line in files if line.endswith((".py", ".bin", ".pt"))]
    assert not [line for line in visit.requests if "/owned" in line], "a route named in an answer is not followed"


def test_the_bytes_and_requests_are_limited(visit: Visit) -> None:
    assert sum("endless-pages" in line for line in visit.requests) <= 210
    assert sum(path.stat().st_size for path in (visit.outer / "1").rglob("*") if path.is_file()) < 256 << 20


def test_the_stage_prints_a_one_line_error(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: small\nprepare:\n  base: {source: tiny-llama}\n"
        "  questions: {source: hf://datasets/a/etag}\n  preferences: {source: python-docstrings}\n"
    )
    with hostile_hub.served() as hub:
        hub.repositories["a/etag"] = one_csv(etag=str(tmp_path / "owned"))
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
