"""The table of stages. Module, image folder, recipe section, bucket prefix and label all derive from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """One stage: which parts of its parents it reads, what it writes, where it runs.

    `reads` maps a parent to the parts of its artifact that decide this stage's result: exactly their bytes enter this
    stage's key, and they are fetched. A part is a folder (``"base/"``) or a file.

    For a parent in `key_only`, the parts enter the key but are not fetched: the stage reads only the parent's manifest,
    and the key must change with what that manifest describes.
    """

    name: str
    reads: Mapping[str, tuple[str, ...]]
    writes: tuple[str, ...]
    needs_gpu: bool
    in_sequence: bool = True
    key_only: tuple[str, ...] = ()
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
        # The report shows the curves and the proof of DPO, and the merged model does not determine them: rounded to
        # 16 bits, two adapters may give the same model.
        key_only=("dpo",),
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
