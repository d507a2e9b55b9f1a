"""The Dockerfiles, parsed into lists of instructions."""

import re
from dataclasses import dataclass
from pathlib import Path

from llamarefine_jobs.contract.stages import STAGES

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "images"
STAGE_NAMES = sorted(STAGES)
NAMES = [*STAGE_NAMES, "launcher", "minio"]


@dataclass(frozen=True)
class Instruction:
    word: str
    rest: str


def text_of(name: str) -> str:
    return (IMAGES / name / "Dockerfile").read_text(encoding="utf-8")


def instructions(name: str) -> list[Instruction]:
    """Return the instructions of images/<name>/Dockerfile, without comments and with continued lines joined."""
    lines = [line for line in text_of(name).splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines()]


def all_of(name: str, word: str) -> list[str]:
    """Return the arguments of each `word` instruction of one Dockerfile, in order."""
    return [instruction.rest for instruction in instructions(name) if instruction.word == word]


def default_of(name: str, argument: str) -> str | None:
    """Return the default of a build argument, or None if it has none or does not exist."""
    for rest in all_of(name, "ARG"):
        given, _, default = rest.partition("=")
        if given == argument and default:
            return default
    return None
