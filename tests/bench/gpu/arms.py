"""What the benchmark measures, the most valuable first. Imports no library: the driver and each process read it."""

from dataclasses import dataclass

STAGES = ("sft", "dpo")


@dataclass(frozen=True)
class Measurement:
    """One training of one stage with `rows` rows (for DPO: pairs) in a step."""

    stage: str
    rows: int = 16
    cudnn: bool = True  # for the arm "plain" only: whether torch may choose cuDNN's attention, as it does by default

    @property
    def name(self) -> str:
        return f"{self.stage} {self.rows} rows" + ("" if self.cudnn else " without cuDNN's attention")


@dataclass(frozen=True)
class Process:
    """Measurements that share a process, its imports and its loaded base, or one whole training by the stage itself."""

    arm: str
    limit_s: int
    measurements: tuple[Measurement, ...] = ()
    whole_stage: str | None = None

    @property
    def names(self) -> list[str]:
        if self.whole_stage:
            return [f"{self.arm}: whole {self.whole_stage}"]
        return [f"{self.arm}: {measurement.name}" for measurement in self.measurements]


PROCESSES = (
    Process("ours", 150, whole_stage="sft"),
    Process("ours", 120, (Measurement("sft"), Measurement("sft", 64), Measurement("dpo"), Measurement("sft", 256))),
    Process("plain", 120, (Measurement("sft"), Measurement("sft", 64), Measurement("dpo"), Measurement("sft", 256))),
    Process("ours", 180, whole_stage="dpo"),
    Process("plain", 60, (Measurement("sft", cudnn=False), Measurement("sft", 64, cudnn=False))),
    Process("unsloth", 150, (Measurement("sft"), Measurement("sft", 64), Measurement("dpo"), Measurement("sft", 256))),
    Process("earlier", 60, (Measurement("sft", 8), Measurement("dpo", 8))),
)
ARMS = tuple(dict.fromkeys(process.arm for process in PROCESSES))
