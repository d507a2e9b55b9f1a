"""What is written twice is the same in both places."""

import re
import subprocess
from pathlib import Path, PurePosixPath

import pytest

from llamarefine_jobs.recipe_file import load_recipe

from . import generated
from .generated import ROOT

RECIPES = sorted((ROOT / "jobs/recipes").glob("*.yaml"))
SCHEMA_LINE = "# yaml-language-server: $schema=recipe.schema.json"


def tracked() -> list[str]:
    """The paths of the repository's files: committed, or new and not ignored."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    paths = [path for path in listing if (ROOT / path).is_file()]
    assert len(paths) > 20
    return paths


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8", errors="replace")


def test_there_are_the_two_recipes_of_the_design() -> None:
    assert {"demo.yaml", "tinyllama-nvidia-docs.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_names_its_schema(path: Path) -> None:
    load_recipe(path)
    assert SCHEMA_LINE in path.read_text(encoding="utf-8").splitlines()[:2]


@pytest.mark.parametrize("path", generated.contents())
def test_a_generated_file_is_current(path: str) -> None:
    assert text_of(path) == generated.contents()[path], f"{path} is stale: `make docs` writes it anew"


def test_the_readmes_tree_is_the_real_one() -> None:
    section = re.search(r"^## Where things live\n(.*?)(?=^## |\Z)", text_of("README.md"), re.MULTILINE | re.DOTALL)
    assert section, "README.md has no section `Where things live`"
    block = re.search(r"```[a-z]*\n(.*?)```", section[1], re.DOTALL)
    assert block, "the section has no fenced block"
    listed = [line.split()[0].rstrip("/") for line in block[1].splitlines() if line.strip()]
    assert len(listed) > 5
    assert [path for path in listed if not (ROOT / path).exists()] == []
    folders = {PurePosixPath(path).parts[0] for path in tracked() if "/" in path and not path.startswith(".")}
    assert folders - {PurePosixPath(path).parts[0] for path in listed} == set()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_every_link_to_a_file_leads_to_one(name: str) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text_of(name))
    assert [link for link in links if not (ROOT / name).parent.joinpath(link).exists()] == []


def test_every_defence_that_is_claimed_points_to_something() -> None:
    claimed = set(re.findall(r"`([\w/]+\.py|tests/[\w/]+)`", text_of("SECURITY.md")))
    assert len(claimed) > 20
    paths = tracked()
    there = {name for name in claimed if any(path == name or path.endswith(f"/{name}") for path in paths)}
    assert claimed - there - {name for name in claimed if (ROOT / name).is_dir()} == set()


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", text_of("Makefile"), re.MULTILINE))
    targets |= {f"image-{file.parent.name}" for file in (ROOT / "images").glob("*/Dockerfile")}  # a pattern's rule
    documents = ["README.md", "CONTRIBUTING.md", *(path for path in tracked() if path.endswith("README.md"))]
    named = {found for path in documents for found in re.findall(r"`make ([a-z][a-z0-9-]*)", text_of(path))}
    named |= {
        found for path in documents for found in re.findall(r"^make ([a-z][a-z0-9-]*)", text_of(path), re.MULTILINE)
    }
    assert named
    assert named - targets == set()


def test_no_file_names_a_machines_own_paths() -> None:
    """Places of one machine mean nothing on another. The words are joined here so as not to find themselves."""
    private = re.compile("|".join(("/" + "work/", "/" + "root/", "/home/" + "[a-z]", "/Users/" + "[a-z]")))
    found = [path for path in tracked() if path != "uv.lock" and private.search(text_of(path))]
    assert found == []


def test_no_file_names_a_package_registry() -> None:
    """Where packages come from is each machine's own setting; the lock file names the public index."""
    registry = re.compile(
        "|".join(("pypi" + r"\.org", "pythonhosted" + r"\.org", "index" + "-url", "proxy" + r"\.golang"))
    )
    found = [path for path in tracked() if path != "uv.lock" and registry.search(text_of(path))]
    assert found == []
