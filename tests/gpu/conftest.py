"""Fixtures of the GPU tests. Without CUDA the tests skip, all for one reason, which pytest's summary prints once.

LLAMAREFINE_GPU_TESTS=cpu runs the same tests at the tiny shape on the CPU backend, which shows that the tests work and
nothing about CUDA. LLAMAREFINE_GPU_TESTS=interpreter runs them on Unsloth without a card: interpreter/sitecustomize.py.
LLAMAREFINE_GPU_BACKEND chooses the backend: packed (the default), transformers or unsloth.
"""

import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import shapes
from tests.gpu.shapes import HOW, INTERPRETED

if INTERPRETED:  # in this process, before anything imports torch, and by PYTHONPATH in the stages' processes
    interpreter = Path(__file__).parent / "interpreter"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(interpreter), os.environ.get("PYTHONPATH", "")])
    runpy.run_path(str(interpreter / "sitecustomize.py"))


@pytest.fixture(scope="session")
def cuda() -> bool:
    """Whether the tests run on CUDA. Without CUDA, skip unless LLAMAREFINE_GPU_TESTS=cpu."""
    import torch

    if torch.cuda.is_available():
        if shapes.BACKEND == "unsloth":
            from llamarefine_jobs.models.backends import choose_backend

            choose_backend("unsloth")  # imports Unsloth before transformers, which it patches, as a stage does
        elif shapes.BACKEND == "packed" and INTERPRETED:
            pytest.skip("packed attention needs a CUDA kernel that Triton's interpreter does not have")
        return True
    if os.environ.get(HOW) != "cpu":
        pytest.skip(f"needs a CUDA device ({HOW}=cpu runs the same tests at a tiny shape without one)")
    return False


@pytest.fixture(scope="session")
def backend(cuda: bool) -> Any:
    """Return the backend that all tests use, as a stage gets it."""
    from llamarefine_jobs.models.backends import choose_backend

    return choose_backend(shapes.BACKEND, key="sft.backend")


@pytest.fixture
def figure(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Return a function that prints a measured figure at once, although pytest captures the output of tests."""

    def show(text: str) -> None:
        with capsys.disabled():
            print(f"\nfigure: {text}", flush=True)

    return show


@pytest.fixture(scope="session", params=shapes.SHAPES)
def shape(request: pytest.FixtureRequest, cuda: bool) -> shapes.Shape:
    found = shapes.SHAPES[request.param]
    if found.needs_cuda and (INTERPRETED or not cuda):
        pytest.skip("a model of TinyLlama's shape needs a CUDA device")
    return found


@pytest.fixture(scope="session")
def prepared(shape: shapes.Shape, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a prepare artifact of this shape."""
    return shapes.prepared_folder(shape, tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="session", params=["none", "nf4"])
def quantization(request: pytest.FixtureRequest, cuda: bool) -> str:
    if request.param == "nf4" and not cuda:
        pytest.skip("nf4 needs a CUDA device")
    return str(request.param)


@pytest.fixture(scope="session")
def settings(shape: shapes.Shape, quantization: str) -> tuple[str, ...]:
    """Return the overrides of the tiny recipe, for both trainings."""
    names = {"quantization": quantization, "backend": shapes.BACKEND, "micro_batch_rows": "null"}
    return (*shape.settings, *(f"{stage}.{name}={value}" for stage in ("sft", "dpo") for name, value in names.items()))


@pytest.fixture(scope="session")
def trained(
    prepared: Path, settings: tuple[str, ...], quantization: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Train SFT; return the folder with adapter/."""
    from llamarefine_jobs import sft
    from llamarefine_jobs.models.backends import free_memory
    from tests.gpu.trainers import make_context
    from tests.jobs import tiny

    folder = tmp_path_factory.mktemp(f"sft-{quantization}")
    context = make_context("sft", tiny.recipe(*settings), prepared, folder)
    sft.work(context)
    free_memory()
    return context.output
