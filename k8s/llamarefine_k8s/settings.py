"""The launcher's settings: where the store is, and how stages run on a cluster.

A value comes from a flag, or else the environment, the file ``llamarefine.yaml`` in the working directory, or the
default. click resolves flags and environment before `load` is called. The chart renders the same keys, so a file
written for this machine is also valid there.
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
_FIRST_S = 30.0  # an address that never answered is given up after this: it may be wrong

_SHORT_REPR = reprlib.Repr()  # a value may be as long as the file

Seconds = Annotated[int, Field(ge=1)]
Quantity = Annotated[str, Field(pattern=r"^[0-9.]+(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _yaml_lists(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class Resources(_Section):
    """Resource requests, limits and GPUs of one container, a stage's or the driver's, and the nodes for its pod."""

    requests: dict[str, Quantity] = {}
    limits: dict[str, Quantity] = {}
    gpus: int | None = Field(None, ge=0, description="null: 1 if the stage needs a GPU, else 0")
    node_selector: dict[str, str] | None = Field(None, description="null: `node_selector` of all stages")
    tolerations: tuple[dict[str, Any], ...] | None = Field(None, description="null: `tolerations` of all stages")

    @field_validator("requests", "limits", mode="before")
    @classmethod
    def _yaml_numbers(cls, values: Any) -> Any:
        """Accept the number in `cpu: 2` as "2", as Kubernetes does."""
        if not isinstance(values, dict):
            return values
        return {
            name: str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
            for name, value in values.items()
        }


# Default requests of each stage, enough for TinyLlama. The setting `resources` overrides them.
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
    """Settings of an installation, the same for every recipe."""

    store: str = "./llamarefine-store"
    context: str | None = Field(None, description="context of the kubeconfig; null: the current one")
    namespace: str | None = Field(None, description="Kubernetes namespace; null: the context's, else `default`")
    image_registry: str = Field("", description="prefix of every image's name, such as registry.example.com/team")
    image_tag: str = __version__
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    secret_name: str | None = Field(
        "llamarefine-bucket",
        description="Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; null: workload identity",
    )
    signing_secret_name: str | None = Field(
        None, description="Secret with signing-key.pem, which signs each model's statement; null: unsigned"
    )
    s3_endpoint: str | None = Field(None, description="URL by which pods reach the bucket; null: Amazon's")
    s3_region: str = "us-east-1"
    service_account: str = Field("llamarefine-driver", description="of the driver; it needs permission to create Jobs")
    stage_service_account: str | None = Field(None, description="of stages; it needs no permissions. null: `default`")
    gpu_resource: str | None = Field("nvidia.com/gpu", description="resource name of a GPU; null: stages run on CPUs")
    resources: dict[str, Resources] = Field(
        {}, description="requests, limits, GPUs, node_selector and tolerations, by stage or `driver`"
    )
    shared_memory: Quantity | None = Field(
        "2Gi", description="size of /dev/shm in GPU stages; counts towards the memory limit"
    )
    scratch: Quantity | None = Field(None, description="limit of a pod's working space; null: the node's disk")
    node_selector: dict[str, str] = Field({}, description="of stages; `resources` names another for one of them")
    tolerations: tuple[dict[str, Any], ...] = Field((), description="of stages, as in a pod's spec; as node_selector")
    priority_class: str | None = None
    queue: str | None = Field(None, description="a Kueue LocalQueue; stages wait suspended until it admits them")
    retries: int = Field(
        3, ge=0, description="of a stage after a bucket or network failure; preemptions are not counted"
    )
    grace_s: Seconds = Field(120, description="seconds from SIGTERM to SIGKILL, in which a checkpoint is saved")
    start_timeout_s: Seconds = Field(
        900,
        description="a stage that cannot start for so long fails; waiting in a queue or for a new node does not count",
    )
    give_up_after_s: Seconds = Field(
        int(GIVE_UP_AFTER_S),
        description="a stage or driver fails if the bucket or the API server is unreachable for longer; the "
        "processes of one training wait 300 s longer for each other",
    )
    deadline_s: Seconds | None = Field(86_400, description="the longest that a stage may run; null: no limit")
    ttl_s: int = Field(3600, ge=0, description="finished Jobs and their pods are deleted after so many seconds")
    patches: dict[str, dict[str, Any]] = Field(
        {}, description="merged into the Job of a stage, of `driver`, or of `all` stages; see manifests.py"
    )

    @field_validator("store", "s3_endpoint")
    @classmethod
    def _no_credentials(cls, value: str | None) -> str | None:
        return refuse_credentials(value) if value else value

    @model_validator(mode="after")
    def _no_plain_secrets(self) -> Self:
        for name in plain_secrets(self.patches):
            raise ValueError(
                f"`patches` gives {name} as plain text, which anyone who can read Jobs would see; put it into a "
                "Secret and refer to it by valueFrom.secretKeyRef"
            )
        return self

    @model_validator(mode="after")
    def _names_of_stages(self) -> Self:
        for setting, extra in (("resources", (DRIVER,)), ("patches", (DRIVER, ALL))):
            known = [*STAGES, *extra]
            for name in getattr(self, setting):
                if name not in known:
                    raise ValueError(f"`{setting}.{name}` is not a stage; expected one of {', '.join(known)}")
        return self

    def resources_of(self, name: str) -> Resources:
        """Return the resources of a stage or of the driver: those in the settings over the defaults."""
        given = self.resources.get(name, Resources())
        # Kubernetes uses a limit as the request if there is none; our default request could exceed that limit.
        defaults = {
            resource: quantity for resource, quantity in _RESOURCES[name].items() if resource not in given.limits
        }
        return given.model_copy(update={"requests": defaults | given.requests})

    def placement_of(self, name: str) -> dict[str, Any]:
        """Return the part of a pod's spec that says on which nodes a stage or the driver may run.

        The driver needs no GPU, so it has only what `resources.driver` says.
        """
        given = self.resources.get(name, Resources())
        selector, tolerations = given.node_selector, given.tolerations
        if name != DRIVER:
            selector = self.node_selector if selector is None else selector
            tolerations = self.tolerations if tolerations is None else tolerations
        placement: dict[str, Any] = {"nodeSelector": dict(selector)} if selector else {}
        return placement | ({"tolerations": [dict(each) for each in tolerations]} if tolerations else {})

    def gpus_of(self, stage: str) -> int:
        """Return how many GPUs a stage gets; 0 if `gpu_resource` is null."""
        gpus = self.resources.get(stage, Resources()).gpus
        wanted = int(STAGES[stage].needs_gpu) if gpus is None else gpus
        return wanted if self.gpu_resource else 0

    def retry_policy(self, announce: Callable[[str], None]) -> RetryPolicy:
        """Return the retry policy of a process that drives or follows a run; it passes its messages to `announce`."""
        return RetryPolicy(self.give_up_after_s, announce, first_limit_s=_FIRST_S)

    def image(self, name: str) -> str:
        """Return the image of a stage, or of the launcher, with registry and tag."""
        registry = f"{self.image_registry.rstrip('/')}/" if self.image_registry else ""
        return f"{registry}llamarefine-{name}:{self.image_tag}"


def load(file: Path | None = None, **given: Any) -> Settings:
    """Return the settings of a file, overridden by `given` (None: not given). Raises RecipeError for a wrong value."""
    file = file or default_file()
    return parse(read_file(file), str(file), **given)


def default_file() -> Path:
    """Return the file that LLAMAREFINE_SETTINGS names, else llamarefine.yaml in the working directory."""
    return Path(os.environ.get(FILE_VARIABLE) or FILE)


def parse(values: dict[str, Any], where: str, **given: Any) -> Settings:
    """Validate parsed values, overridden by `given`. `where` names their source in errors, which are RecipeErrors."""
    values = values | {name: value for name, value in given.items() if value is not None}
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        mistake = error.errors()[0]
        name = ".".join(str(part) for part in mistake["loc"])
        if mistake["type"] == "extra_forbidden":
            raise RecipeError(f"{where}: `{name}` is not a setting; {_nearest(mistake['loc'])}") from None
        if mistake["type"] == "value_error":
            message = mistake["msg"].removeprefix("Value error, ")
            raise RecipeError(f"{where}: `{name}`: {message}" if name else f"{where}: {message}") from None
        raise RecipeError(f"{where}: `{name}`: {mistake['msg']}, found {_SHORT_REPR.repr(mistake['input'])}") from None


def read_file(file: Path) -> dict[str, Any]:
    """Return the values of a settings file, not yet validated; empty if the file does not exist."""
    try:
        with file.open("rb") as source:
            text = source.read(safe_yaml.LIMIT_BYTES + 1).decode("utf-8-sig")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RecipeError(f"{file}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    return read_text(text, str(file))


def read_text(text: str, where: str) -> dict[str, Any]:
    """Return the values in the text of a settings file; RecipeError if it is not a YAML mapping."""
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
    """Return the hint for an unknown key: the closest setting, or all of them."""
    names = list(Resources.model_fields if location[0] == "resources" else Settings.model_fields)
    close = difflib.get_close_matches(str(location[-1]), names, n=1)
    return f"did you mean `{close[0]}`?" if close else f"the settings are {', '.join(names)}"
