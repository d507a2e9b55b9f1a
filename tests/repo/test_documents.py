"""Documents are true to the code: what is written twice is the same in both places, and what they name exists."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path, PurePosixPath

import pytest

from llamarefine_jobs.contract.stages import STAGES
from llamarefine_jobs.recipe_file import load_recipe, parse_recipe

from . import generated
from .documents import ROOT, anchors, documents, links, make_targets, text_of, tracked, words_of_code

RECIPES = sorted((ROOT / "jobs/recipes").glob("*.yaml"))
SCHEMA_LINE = "# yaml-language-server: $schema=recipe.schema.json"


def test_both_packaged_recipes_exist() -> None:
    assert {"demo.yaml", "tinyllama-nvidia-docs.yaml"} <= {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_names_its_schema(path: Path) -> None:
    load_recipe(path)
    assert SCHEMA_LINE in path.read_text(encoding="utf-8").splitlines()[:2]


def test_the_readmes_recipe_is_complete() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", text_of("README.md"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    parse_recipe(blocks[0], "README.md")


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


def test_the_layers_in_contributing_are_those_that_lint_checks() -> None:
    rows = re.findall(r"^\| (`[^|]*`) \|", text_of("CONTRIBUTING.md"), re.MULTILINE)
    described = [set(re.findall(r"`(\w+)`", row)) for row in rows]
    contracts = tomllib.loads(text_of("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    checked = [
        {name.strip() for name in layer.split("|")}
        for contract in contracts
        if contract["name"].startswith(("Who may import whom", "The launcher: commands"))
        for layer in contract["layers"]
    ]
    assert len(checked) > 12
    assert described == checked


def test_every_package_has_its_folder_of_tests() -> None:
    elsewhere = {"contract": "tests/contract", "store": "tests/store", "untrusted": "tests/security"}
    packages = [
        (side, path.parent.name)
        for side in ("jobs", "k8s")
        for path in (ROOT / side / f"llamarefine_{side}").glob("*/__init__.py")
    ]
    assert len(packages) > 10
    folders = [elsewhere.get(name, f"tests/{side}/{name}") for side, name in packages]
    assert [folder for folder in folders if not list((ROOT / folder).glob("test_*.py"))] == []


def test_the_stage_table_in_the_jobs_readme_equals_the_one_in_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| .*? \|$", text_of("jobs/README.md"), re.MULTILINE)
    described = {
        name: (set(re.findall(r"`(\S+?)`", reads)), set(re.findall(r"`(\S+?)`", writes)))
        for name, reads, writes in rows
    }
    expected = {
        name: (
            {part for parent, parts in stage.reads.items() if parent not in stage.key_only for part in parts},
            set(stage.writes),
        )
        for name, stage in STAGES.items()
    }
    assert {name: described.get(name) for name in expected} == expected


def test_the_name_of_an_environment_variable_is_written_once() -> None:
    """A name that is written twice can be misspelt once, and then nothing reads the variable."""
    places: dict[str, list[str]] = {}
    for path in tracked():
        if path.endswith(".py") and path.startswith(("jobs/", "k8s/")):
            for node in ast.walk(ast.parse(text_of(path))):
                if isinstance(node, ast.Constant) and re.fullmatch(r"LLAMAREFINE_[A-Z_]+", str(node.value)):
                    places.setdefault(node.value, []).append(path)
    assert len(places) > 8
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


@pytest.mark.parametrize("name", documents())
def test_every_link_leads_to_a_file_and_to_a_heading_in_it(name: str) -> None:
    broken = []
    for path, anchor in links(text_of(name)):
        target = ROOT / name if not path else (ROOT / name).parent / path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(f"{path}#{anchor}")
    assert broken == []


def test_links_and_anchors_are_found() -> None:
    found = [link for name in documents() for link in links(text_of(name))]
    assert len(found) > 25
    assert sum(1 for _, anchor in found if anchor) > 2


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", text_of("Makefile"), re.MULTILINE))
    targets |= {f"image-{file.parent.name}" for file in (ROOT / "images").glob("*/Dockerfile")}  # a pattern's rule
    named = {name: make_targets(text_of(name)) for name in documents()}
    assert len(set().union(*named.values())) > 15
    assert {name: unknown for name, found in named.items() if (unknown := found - targets)} == {}


def test_make_help_lists_every_target() -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):(?!=)", text_of("Makefile"), re.MULTILINE))
    assert len(targets) > 20
    command = ["make", "--no-print-directory", "help"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in printed.splitlines()} == targets


def test_every_path_of_the_repository_that_is_named_exists() -> None:
    paths = tracked()
    folders = {str(parent) for path in paths for parent in PurePosixPath(path).parents} - {"."}
    entries = {*paths, *folders}
    top = tuple(f"{folder}/" for folder in folders if "/" not in folder and not folder.startswith("."))
    unknown, found = {}, 0
    for name in documents():
        for word in words_of_code(text_of(name)):
            if not re.fullmatch(r"[\w./-]+", word) or not (word.endswith(".py") or word.startswith(top)):
                continue
            found += 1
            path = word.rstrip("/")
            if path not in entries and not any(entry.endswith(f"/{path}") for entry in paths):
                unknown[word] = name
    assert found > 100
    assert unknown == {}


def test_every_module_that_is_named_exists() -> None:
    named = {
        word: name
        for name in documents()
        for word in words_of_code(text_of(name))
        if re.fullmatch(r"(tests|llamarefine_jobs|llamarefine_k8s)(\.\w+)+", word)
    }
    assert len(named) > 1
    modules = {path.removeprefix("jobs/").removeprefix("k8s/") for path in tracked() if path.endswith(".py")}
    for word, name in named.items():
        path = word.replace(".", "/")
        assert {f"{path}.py", f"{path}/__init__.py", f"{path}/__main__.py"} & modules, f"{name} names {word}"


def test_every_claimed_defence_names_code_and_a_test() -> None:
    claimed = set(re.findall(r"`([\w/]+\.py|tests/[\w/]+)`", text_of("SECURITY.md")))
    assert len({name for name in claimed if name.startswith("tests/")}) > 20
    assert len({name for name in claimed if not name.startswith("tests/")}) > 20


def test_no_file_names_a_machines_own_paths() -> None:
    """Paths of one machine mean nothing on another. The words are joined here so that this file does not match."""
    private = re.compile("|".join(("/" + "work/", "/" + "root/", "/home/" + "[a-z]", "/Users/" + "[a-z]")))
    found = [path for path in tracked() if path != "uv.lock" and private.search(text_of(path))]
    assert found == []


def test_no_file_names_a_package_registry() -> None:
    """Each machine decides where its packages come from; the lock file names the public index."""
    registry = re.compile(
        "|".join(("pypi" + r"\.org", "pythonhosted" + r"\.org", "index" + "-url", "proxy" + r"\.golang"))
    )
    found = [path for path in tracked() if path != "uv.lock" and registry.search(text_of(path))]
    assert found == []
