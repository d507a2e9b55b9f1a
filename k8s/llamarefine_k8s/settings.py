"""The launcher's settings: flag > environment > file > default.

click has settled the first two when `load` is called; the file is ``llamarefine.yaml`` beside the work. The chart
renders the same keys, so what is written here for a laptop is valid there.
"""

import difflib
import os
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from llamarefine_jobs.contract.credentials import plain_secrets, refuse_credentials
from llamarefine_jobs.contract.errors import RecipeError
from llamarefine_jobs.contract.retry import GIVE_UP_AFTER_S, RetryPolicy
from llamarefine_jobs.contract.stages import STAGES
from llamarefine_jobs.contract.version import __version__
from llamarefine_jobs.untrusted import safe_yaml

FILE = Path("llamarefine.yaml")
FILE_VARIABLE = "LLAMAREFINE_SETTINGS"
DRIVER, ALL = "driver", "all"
_FIRST_S = 30.0

_BRIEF = reprlib.Repr()  # a value may be as long as the file

Seconds = Annotated[int, Field(ge=1)]
Quantity = Annotated[str, Field(pattern=r"^[0-9.]+(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _yaml_lists(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class Resources(_Section):
    """What one stage's container asks for."""

    requests: dict[str, Quantity] = {}
    limits: dict[str, Quantity] = {}
    gpus: int | None = Field(None, ge=0, description="null: 1 where the stage needs a GPU, else 0")

    @field_validator("requests", "limits", mode="before")
    @classmethod
    def _yaml_numbers(cls, values: Any) -> Any:
        """Let `cpu: 2` stand for "2", as Kubernetes does."""
        if not isinstance(values, dict):
            return values
        return {
            name: str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
            for name, value in values.items()
        }


# A stage asks for what TinyLlama needs; each number is a person's to change.
_RESOURCES: dict[str, dict[str, str]] = {
    "prepare": {"cpu": "1", "memory": "4Gi"},
    "sft": {"cpu": "4", "memory": "16Gi"},
    "dpo": {"cpu": "4", "memory": "16Gi"},
    "merge": {"cpu": "2", "memory": "8Gi"},
    "evaluate": {"cpu": "2", "memory": "16Gi"},
    "infer": {"cpu": "2", "memory": "16Gi"},
    DRIVER: {"cpu": "100m", "memory": "256Mi"},
}


class Settings(_Section):
    """Where things are and how stages run there, the same for every recipe."""

    store: str = "./llamarefine-store"
    context: str | None = Field(None, description="of the kubeconfig; null: its current one")
    namespace: str | None = Field(None, description="null: the context's, else `default`")
    image_registry: str = Field("", description="before every image's name, such as registry.example.com/team")
    image_tag: str = __version__
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    secret_name: str | None = Field(
        "llamarefine-bucket", description="holds AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; null: workload identity"
    )
    signing_secret_name: str | None = Field(
        None, description="holds signing-key.pem, by which the driver signs what it says of a model; null: unsigned"
    )
    s3_endpoint: str | None = Field(None, description="as pods reach it; null: Amazon's")
    s3_region: str = "us-east-1"
    service_account: str = Field("llamarefine-driver", description="of the driver, which may create Jobs")
    stage_service_account: str | None = Field(None, description="of stages; it needs no permission. null: `default`")
    gpu_resource: str | None = Field("nvidia.com/gpu", description="what a GPU is called; null: stages run on CPUs")
    resources: dict[str, Resources] = Field({}, description="by stage, or `driver`")
    shared_memory: Quantity | None = Field("2Gi", description="of /dev/shm in GPU stages, out of the memory limit")
    scratch: Quantity | None = Field(None, description="bound of a pod's working space; null: the node's disk")
    node_selector: dict[str, str] = Field({}, description="of stages")
    tolerations: tuple[dict[str, Any], ...] = Field((), description="of stages, as in a pod")
    priority_class: str | None = None
    queue: str | None = Field(None, description="a Kueue LocalQueue; stages wait suspended until it admits them")
    retries: int = Field(3, ge=0, description="of a stage whose bucket or network failed; preemptions are not counted")
    grace_s: Seconds = Field(120, description="from SIGTERM to SIGKILL: a checkpoint is saved in it")
    start_timeout_s: Seconds = Field(
        900, description="a stage that cannot start for so long fails; time in a queue or for a node to come is free"
    )
    give_up_after_s: Seconds = Field(
        int(GIVE_UP_AFTER_S), description="a bucket or an API server that is away for longer ends what waits for it"
    )
    deadline_s: Seconds | None = Field(86_400, description="the longest that one stage may take")
    ttl_s: int = Field(3600, ge=0, description="finished Jobs and their pods are removed so much later")
    patches: dict[str, dict[str, Any]] = Field(
        {}, description="merged into the Job of a stage, of `driver`, or of `all` stages: see manifests.py"
    )

    @field_validator("store", "s3_endpoint")
    @classmethod
    def _no_credentials(cls, value: str | None) -> str | None:
        return refuse_credentials(value) if value else value

    @model_validator(mode="after")
    def _no_plain_secrets(self) -> Self:
        for name in plain_secrets(self.patches):
            raise ValueError(
                f"`patches` gives {name} as plain text, which anyone who reads Jobs would see; put it into a Secret "
                "and take it from there by valueFrom.secretKeyRef"
            )
        return self

    @model_validator(mode="after")
    def _names_of_stages(self) -> Self:
        for setting, extra in (("resources", (DRIVER,)), ("patches", (DRIVER, ALL))):
            known = [*STAGES, *extra]
            for name in getattr(self, setting):
                if name not in known:
                    raise ValueError(f"`{setting}.{name}` is of no stage; there are {', '.join(known)}")
        return self

    def resources_of(self, name: str) -> Resources:
        """What a stage, or the driver, asks for."""
        given = self.resources.get(name, Resources())
        # A limit without a request is the request too, in Kubernetes: our own number may be above it.
        ours = {what: much for what, much in _RESOURCES[name].items() if what not in given.limits}
        return given.model_copy(update={"requests": ours | given.requests})

    def gpus_of(self, stage: str) -> int:
        """How many GPUs a stage is given."""
        gpus = self.resources.get(stage, Resources()).gpus
        wanted = int(STAGES[stage].needs_gpu) if gpus is None else gpus
        return wanted if self.gpu_resource else 0

    def retry_policy(self, say: Callable[[str], None]) -> RetryPolicy:
        """That of whoever drives or follows a run. An address that never answered is told soon: it may be wrong."""
        return RetryPolicy(self.give_up_after_s, say, first_s=_FIRST_S)

    def image(self, name: str) -> str:
        """The image of a stage, or of the launcher."""
        registry = f"{self.image_registry.rstrip('/')}/" if self.image_registry else ""
        return f"{registry}llamarefine-{name}:{self.image_tag}"


def load(file: Path | None = None, **given: Any) -> Settings:
    """The settings, `given` on top of the file; a value of None was not given. RecipeError for a wrong file."""
    file = file or default_file()
    return parse(read_file(file), str(file), **given)


def default_file() -> Path:
    """The file that the environment names, else the one beside the work."""
    return Path(os.environ.get(FILE_VARIABLE) or FILE)


def parse(values: dict[str, Any], where: str, **given: Any) -> Settings:
    """Plain values as settings, `given` on top; `where` names them in errors."""
    values = values | {name: value for name, value in given.items() if value is not None}
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        mistake = error.errors()[0]
        name = ".".join(str(part) for part in mistake["loc"])
        if mistake["type"] == "extra_forbidden":
            raise RecipeError(f"{where}: `{name}` is no setting; {_nearest(mistake['loc'])}") from None
        if mistake["type"] == "value_error":
            said = mistake["msg"].removeprefix("Value error, ")
            raise RecipeError(f"{where}: `{name}`: {said}" if name else f"{where}: {said}") from None
        raise RecipeError(f"{where}: `{name}`: {mistake['msg']}, found {_BRIEF.repr(mistake['input'])}") from None


def read_file(file: Path) -> dict[str, Any]:
    """What a settings file says, unchecked; nothing where there is none."""
    try:
        with file.open("rb") as source:
            text = source.read(safe_yaml.LIMIT_BYTES + 1).decode("utf-8-sig")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RecipeError(f"{file}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    return read_text(text, str(file))


def read_text(text: str, where: str) -> dict[str, Any]:
    """The plain values of a settings file; RecipeError where it holds something else."""
    try:
        values = safe_yaml.load(text)
    except ValueError as error:
        raise RecipeError(f"{where}: cannot be read as YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise RecipeError(f"{where}: expected settings such as `store: s3://bucket/prefix`")
    return values


def _nearest(location: tuple[int | str, ...]) -> str:
    names = list(Resources.model_fields if location[0] == "resources" else Settings.model_fields)
    close = difflib.get_close_matches(str(location[-1]), names, n=1)
    return f"did you mean `{close[0]}`?" if close else f"there are {', '.join(names)}"
