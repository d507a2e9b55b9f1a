"""ACCEPTANCE.md, the list of the store's guarantees, names every test of this folder and no other."""

import ast
import re
from collections import Counter
from pathlib import Path

FOLDER = Path(__file__).parent
LIST = (FOLDER / "ACCEPTANCE.md").read_text(encoding="utf-8")
LISTED = Counter(re.findall(r"`(test_\w+)`", LIST))


def find_tests(file: Path) -> list[str]:
    module = ast.parse(file.read_text(encoding="utf-8"))
    return [node.name for node in module.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


TESTS = Counter(name for file in FOLDER.glob("test_*.py") for name in find_tests(file))


def test_each_test_of_this_folder_is_listed_once() -> None:
    assert len(TESTS) > 50
    assert set(TESTS.values()) == {1}, "a test's name must be unique, because the list gives no file"
    assert [name for name in TESTS if LISTED[name] != 1] == []


def test_each_listed_test_exists() -> None:
    assert sorted(set(LISTED) - set(TESTS)) == []
    files = re.findall(r"(?m)^## .*`(test_\w+\.py)`$", LIST)
    assert {*files, Path(__file__).name} == {file.name for file in FOLDER.glob("test_*.py")}


def test_guarantees_are_numbered_in_order() -> None:
    numbers = [int(number) for number in re.findall(r"(?m)^(\d+)\. .*`test_\w+`$", LIST)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > 50
