"""The table of stages. Module, image folder, recipe section, bucket prefix and label all derive from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """One stage: which parts of its parents it reads, what it writes, whether it needs a GPU.

    `reads` maps a parent to the parts of its artifact that determine this stage's result: exactly
    these parts are fetched, and exactly their content enters this stage's key. A part is a folder
    (``"base/"``) or a file.
    """

    name: str
    reads: Mapping[str, tuple[str, ...]]
    writes: tuple[str, ...]
    needs_gpu: bool
    in_sequence: bool = True
    has_checkpoints: bool = field(default=False)

    @property
    def module(self) -> str:
        """The Python module that runs the stage."""
        return f"llamarefine_jobs.{self.name}"


_TABLE = (
    Stage(
        name="prepare",
        reads={},
        writes=("base/", "questions/", "preferences/", "data_card.json"),
        needs_gpu=False,
    ),
    Stage(
        name="sft",
        reads={"prepare": ("base/", "questions/")},
        writes=("adapter/",),
        needs_gpu=True,
        has_checkpoints=True,
    ),
    Stage(
        name="dpo",
        reads={"prepare": ("base/", "preferences/"), "sft": ("adapter/",)},
        writes=("adapter/",),
        needs_gpu=True,
        has_checkpoints=True,
    ),
    Stage(
        name="merge",
        reads={"prepare": ("base/",), "sft": ("adapter/",), "dpo": ("adapter/",)},
        writes=("model/",),
        needs_gpu=False,
    ),
    Stage(
        name="evaluate",
        reads={
            "prepare": ("base/", "questions/", "preferences/", "data_card.json"),
            "sft": ("adapter/",),
            "dpo": ("adapter/",),
            "merge": ("model/",),
        },
        writes=("report.html", "report.md", "report.json"),
        needs_gpu=True,
    ),
    Stage(
        name="infer",
        reads={"prepare": ("base/",), "sft": ("adapter/",), "merge": ("model/",)},
        writes=("answers.jsonl",),
        needs_gpu=True,
        in_sequence=False,
    ),
)

STAGES: Mapping[str, Stage] = {stage.name: stage for stage in _TABLE}
SEQUENCE: tuple[str, ...] = tuple(stage.name for stage in _TABLE if stage.in_sequence)
