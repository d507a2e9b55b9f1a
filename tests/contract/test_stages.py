"""The table of stages agrees with the modules, the recipe's sections, and what each stage reads and writes."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

from llamarefine_jobs import contract
from llamarefine_jobs.contract.recipe import Recipe, Section
from llamarefine_jobs.contract.stages import SEQUENCE, STAGES


def test_the_sequence_of_stages() -> None:
    assert SEQUENCE == ("prepare", "sft", "dpo", "merge", "evaluate")
    assert set(STAGES) - set(SEQUENCE) == {"infer"}


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_a_module_that_runs_it(name: str) -> None:
    spec = importlib.util.find_spec(STAGES[name].module)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    functions = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    assert 'if __name__ == "__main__":' in text
    assert "work" in functions or not STAGES[name].in_sequence


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_a_section_in_the_recipe(name: str) -> None:
    kind = Recipe.model_fields[name].annotation
    assert isinstance(kind, type)
    assert issubclass(kind, Section)
    assert kind.__name__ == name.capitalize()


def test_every_section_in_the_recipe_belongs_to_a_stage() -> None:
    sections = {
        name
        for name, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
    assert sections == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_reads_only_what_earlier_stages_write(name: str) -> None:
    names, stage = list(STAGES), STAGES[name]
    assert stage.writes
    for parent, parts in stage.reads.items():
        assert names.index(parent) < names.index(stage.name)
        assert STAGES[parent].in_sequence
        assert parts
        assert set(parts) <= set(STAGES[parent].writes)


def test_everything_that_a_stage_writes_is_read_or_is_a_final_result() -> None:
    read = {(parent, part) for stage in STAGES.values() for parent, parts in stage.reads.items() for part in parts}
    final = {(stage.name, part) for stage in STAGES.values() for part in stage.writes} - read
    assert {stage for stage, _ in final} == {"evaluate", "infer"}


def test_the_contract_imports_only_the_standard_library_and_pydantic() -> None:
    files = list(Path(contract.__path__[0]).glob("*.py"))
    assert len(files) > 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            for module in modules:
                is_contract = module == "llamarefine_jobs" or module.startswith("llamarefine_jobs.contract")
                assert is_contract or module.split(".")[0] in {*sys.stdlib_module_names, "pydantic"}, (
                    f"{file.name}: {module}"
                )
