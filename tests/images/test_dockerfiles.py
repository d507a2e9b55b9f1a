"""What every image guarantees, checked in its Dockerfile."""

import json
import re
import tomllib

import pytest

from llamarefine_jobs.contract.stages import STAGES

from .dockerfiles import IMAGES, NAMES, ROOT, STAGE_NAMES, all_of, default_of, instructions, text_of

EXACT_TAG = re.compile(r"^docker\.io/[a-z/]+:[0-9]+\.[0-9]+(\.[0-9]+)?-[a-z0-9.-]+$")


def test_each_stage_the_launcher_and_minio_have_one_image() -> None:
    assert sorted(path.parent.name for path in IMAGES.glob("*/Dockerfile")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_base_image_is_an_argument_with_an_exact_version_as_its_default(name: str) -> None:
    built_here = {rest.split(" AS ")[1] for rest in all_of(name, "FROM") if " AS " in rest}
    sources = {rest.split(" AS ")[0] for rest in all_of(name, "FROM")} - built_here
    assert "${BASE}" in sources
    for source in sources:
        default = default_of(name, source.strip("${}"))
        assert default, f"{source} has no default"
        assert EXACT_TAG.match(default), f"{default} is not pinned"


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_a_stages_base_image_has_the_cuda_version_of_torch_and_no_cuda_libraries(name: str) -> None:
    locked = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
    torch_cuda = next(package["version"] for package in locked["package"] if package["name"] == "cuda-toolkit")
    base = re.fullmatch(r"docker\.io/nvidia/cuda:(\d+\.\d+)\.\d+-base-ubuntu24\.04", default_of(name, "BASE") or "")
    assert base, "expected a -base- image: it has no CUDA libraries of its own, because the wheels bring them"
    assert torch_cuda.startswith(f"{base[1]}.")


def test_the_stages_dockerfiles_differ_only_in_name_and_extra() -> None:
    common = {re.sub(rf"\b{name}\b", "STAGE", _without_extra(text_of(name))) for name in STAGE_NAMES}
    assert len(common) == 1, "layers are shared only where all instructions before them are the same"
    assert "llamarefine_jobs.STAGE" in common.pop()


def _without_extra(text: str) -> str:
    return re.sub(r"^ARG EXTRA=(train|gpu)$", "ARG EXTRA=", text, flags=re.MULTILINE)


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_a_stage_that_needs_a_gpu_installs_the_gpu_extra(name: str) -> None:
    assert default_of(name, "EXTRA") == ("gpu" if STAGES[name].needs_gpu else "train")


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_a_stages_entrypoint_is_its_module(name: str) -> None:
    assert json.loads(all_of(name, "ENTRYPOINT")[-1]) == ["python", "-m", STAGES[name].module]


def test_the_launchers_entrypoint_is_the_command_and_it_installs_no_extra() -> None:
    assert json.loads(all_of("launcher", "ENTRYPOINT")[-1]) == ["llamarefine"]
    assert "--extra" not in text_of("launcher")


@pytest.mark.parametrize("name", NAMES)
def test_every_image_runs_as_a_numeric_user_other_than_root(name: str) -> None:
    assert all_of(name, "USER") == ["1000:1000"], "Kubernetes verifies runAsNonRoot by the number"


@pytest.mark.parametrize("name", NAMES)
def test_every_image_has_labels_for_title_version_source_and_license(name: str) -> None:
    labels = " ".join(all_of(name, "LABEL"))
    for label in ("title", "version", "source", "licenses"):
        assert f"org.opencontainers.image.{label}=" in labels
    assert f"image.title=llamarefine-{name}" in labels


@pytest.mark.parametrize("name", [*STAGE_NAMES, "launcher"])
def test_a_new_commit_alone_rebuilds_no_layer(name: str) -> None:
    words = [(instruction.word, instruction.rest) for instruction in instructions(name)]
    last_run = max(index for index, (word, _) in enumerate(words) if word in ("RUN", "COPY"))
    assert words.index(("ARG", "GIT_COMMIT=")) > last_run
    assert ("ENV", "LLAMAREFINE_GIT_COMMIT=${GIT_COMMIT}") in words[last_run:]


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_libraries_write_their_files_to_scratch(name: str) -> None:
    settings = dict(pair.split("=", 1) for rest in all_of(name, "ENV") for pair in rest.split())
    caches = {"HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "UNSLOTH_COMPILE_LOCATION"}
    for variable in {"HOME", "TMPDIR", "LLAMAREFINE_WORK"} | caches:
        assert settings[variable].startswith("/scratch")
    assert len({settings[variable] for variable in caches}) == len(caches)


def test_the_build_context_holds_exactly_what_is_copied() -> None:
    first, *allowed = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert first == "*", "the first line must exclude everything that no later line names"
    named = {line.removeprefix("!") for line in allowed if line.startswith("!")}
    copied = {
        source
        for name in NAMES
        for rest in all_of(name, "COPY")
        if not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert copied
    for source in copied:
        assert any(path == source or path.startswith(f"{source}/") for path in named), f"{source} is not in the context"
    for path in named:
        assert any(path == source or path.startswith(f"{source}/") for source in copied), f"{path} is copied nowhere"
