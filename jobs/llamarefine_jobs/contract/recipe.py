"""The recipe: one YAML file that determines everything a run does.

Every unknown key is an error. Names contain the unit. A field marked `_NOT_IN_KEY` is not part of the
artifact's key: it changes at most the rounding of a result (backend, micro-batches, processes), or what a training
logs and when it saves a checkpoint. tests/jobs/stages/test_keys.py checks this, or names the test that does.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from llamarefine_jobs.contract.credentials import refuse_credentials

_NOT_IN_KEY: dict[str, Any] = {"in_key": False}

Count = Annotated[int, Field(ge=1, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
LinearLayer = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Section(BaseModel):
    """A part of the recipe. Unknown keys and values of another type are errors; instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _yaml_numbers(cls, values: Any) -> Any:
        """Accept 1 for 1.0, and "2e-4", which YAML 1.1 reads as text, as a number."""
        if not isinstance(values, Mapping):
            return values
        numbers = {
            name for name, field in cls.model_fields.items() if float in (field.annotation, *get_args(field.annotation))
        }
        return {name: _number(value) if name in numbers else value for name, value in values.items()}

    @field_validator("*", mode="before")
    @classmethod
    def _yaml_lists(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class Source(Section):
    """Source of rows or a model: a path, ``s3://``, ``https://``, ``hf://datasets/owner/name``, or a built-in name."""

    source: str = Field(min_length=1)
    revision: str | None = Field(None, description="branch, tag or commit of a Hub repository; a commit pins it")
    fingerprint: str | None = Field(
        None,
        description="identifies the source's content when the run was planned; written by the launcher, not by you",
    )

    @field_validator("source")
    @classmethod
    def _no_credentials(cls, value: str) -> str:
        return refuse_credentials(value)


class TinyModel(Section):
    """Shape and pre-training of the tiny Llama that `prepare` makes (`base.source: tiny-llama`)."""

    hidden_size: Count = 96
    intermediate_size: Count = 256
    layers: Count = 3
    heads: Count = 4
    vocabulary: Count = Field(
        2048, description="tokens of the byte-level BPE, trained on the training splits of both sets"
    )
    steps: Count = 200
    batch_rows: Count = 8
    learning_rate: float = Field(5e-3, gt=0)


class Base(Source):
    """The base model: a Hub id, a folder, ``s3://…``, or ``tiny-llama`` to pre-train a tiny one."""

    source: str = Field("TinyLlama/TinyLlama-1.1B-Chat-v1.0", min_length=1)
    tiny: TinyModel = TinyModel()


class Rows(Source):
    """A table of rows and how to read it."""

    format: Literal["auto", "csv", "jsonl", "parquet", "hub"] = Field(
        "auto", description="auto: by the file's extension"
    )
    split: str = Field("train", description="split of a Hub data set")


class Questions(Rows):
    """Questions and answers, one pair per row. ``python-docstrings`` makes them from the standard library."""

    question_column: str = "question"
    answer_column: str = "answer"
    conflicting_answers: Literal["keep_first", "keep_all", "drop"] = Field(
        "keep_first", description="which answers to keep if a question has several; all conflicts are reported"
    )


class Preferences(Rows):
    """Preference pairs, as HH-style text or message lists. ``python-docstrings`` makes them by documented rules."""

    prompt_column: str = "prompt"
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"


class Prepare(Section):
    """How base model and data are read, checked, de-duplicated and split."""

    base: Base = Base()
    questions: Questions
    preferences: Preferences
    too_long: Literal["drop", "truncate"] = Field(
        "drop", description="rows over max_length_tokens: drop them, or truncate the answer at the end of a sentence"
    )
    max_rows: Count | None = Field(None, description="rows to use of each data set, spread evenly over it; null: all")
    max_cell_bytes: Count = Field(1_000_000, description="rows with a longer cell are dropped")
    near_duplicate_similarity: float = Field(
        0.9, gt=0, le=1, description="two questions with at least this Jaccard similarity of word 3-grams count as one"
    )
    validation_fraction: Fraction = 0.05
    test_fraction: Fraction = 0.10

    @model_validator(mode="after")
    def _rows_to_train_on(self) -> Self:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction + test_fraction leave no row to train on; expected a sum under 1")
        if not (self.validation_fraction and self.test_fraction):
            raise ValueError(
                "validation_fraction and test_fraction must both be over 0: without held-out rows nothing is measured"
            )
        return self


class Lora(Section):
    """Shape of the LoRA adapter (https://arxiv.org/abs/2106.09685)."""

    rank: Count = 16
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha/rank, with rslora by alpha/sqrt(rank)")
    dropout: Fraction = 0.0
    rslora: bool = False
    target_layers: tuple[LinearLayer, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )


class Training(Section):
    """Settings that SFT and DPO share."""

    backend: Literal["auto", "packed", "unsloth", "transformers"] = Field(
        "auto",
        description="how a step is computed. packed: rows in one sequence without padding, on CUDA compiled and "
        "captured in CUDA graphs. unsloth, transformers: padded rows, by that library's own code. auto: the one that "
        "suits the GPU and the quantization, packed where possible. The result is the same up to rounding",
        json_schema_extra=_NOT_IN_KEY,
    )
    lora: Lora = Lora()
    quantization: Literal["none", "nf4"] = Field("none", description="nf4: the base in 4 bits (QLoRA), on CUDA only")
    epochs: float = Field(1.0, gt=0)
    max_steps: Count | None = Field(None, description="stop after this many optimizer steps, regardless of `epochs`")
    learning_rate: float = Field(2e-4, gt=0, le=1)
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: Fraction = 0.1
    weight_decay: float = Field(0.0, ge=0)
    max_gradient_norm: float = Field(1.0, gt=0)
    batch_rows: Count = Field(
        16, description="rows in one optimizer step, over all processes; a multiple of gpus x nodes"
    )
    micro_batch_rows: Count | None = Field(
        None,
        description="rows in one forward pass at most (for DPO, a row is a pair); null: as many as fit into memory; "
        "batch_rows must be a multiple",
        json_schema_extra=_NOT_IN_KEY,
    )
    on_out_of_memory: Literal["fail", "halve_micro_batch"] = Field(
        "fail",
        description="halve_micro_batch: restart from the newest checkpoint with smaller micro-batches",
        json_schema_extra=_NOT_IN_KEY,
    )
    evaluate_every_steps: Count | None = Field(
        None, description="steps between validations; null: about four validations per training"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: slower, needs less memory"
    )
    checkpoint_every_s: Count | None = Field(
        600, description="seconds between checkpoints; null: none by time", json_schema_extra=_NOT_IN_KEY
    )
    checkpoint_every_steps: Count | None = Field(
        None, description="steps between further checkpoints; null: none by steps", json_schema_extra=_NOT_IN_KEY
    )
    log_every_steps: Count = Field(5, json_schema_extra=_NOT_IN_KEY)
    gpus: Count = Field(
        1, description="processes on each node, each with one GPU if there are any", json_schema_extra=_NOT_IN_KEY
    )
    nodes: Count = Field(1, description="machines; on a cluster, pods", json_schema_extra=_NOT_IN_KEY)

    @property
    def processes(self) -> int:
        """Number of processes that train together and split each batch among them."""
        return self.gpus * self.nodes

    @property
    def pass_rows(self) -> int:
        """Largest number of rows in one forward pass: `micro_batch_rows`, or without it a process's part of a batch."""
        return self.micro_batch_rows or self.batch_rows // self.processes

    @model_validator(mode="after")
    def _whole_batches(self) -> Self:
        if self.micro_batch_rows is None:
            if self.batch_rows % self.processes:
                raise ValueError(
                    f"batch_rows {self.batch_rows} is shared by {self.gpus} gpus x {self.nodes} nodes: it must be a "
                    f"multiple of {self.processes}"
                )
        elif self.batch_rows % self.micro_batch_rows:
            raise ValueError(
                f"batch_rows {self.batch_rows} must be a multiple of micro_batch_rows {self.micro_batch_rows}"
            )
        elif self.batch_rows % (self.micro_batch_rows * self.processes):
            raise ValueError(
                f"batch_rows {self.batch_rows} is shared by {self.gpus} gpus x {self.nodes} nodes: it must be a "
                f"multiple of {self.micro_batch_rows * self.processes}, the micro_batch_rows of all of them together; "
                "lower micro_batch_rows or raise batch_rows"
            )
        if self.nodes > 1 and self.on_out_of_memory != "fail":
            raise ValueError(
                f"on_out_of_memory: {self.on_out_of_memory} works on one node only, nodes is {self.nodes}: if one node "
                "restarted, the others would lose it; set it to fail"
            )
        return self


class Sft(Training):
    """Supervised fine-tuning with LoRA. Only the answer's tokens count in the loss."""


class Dpo(Training):
    """Direct preference optimisation (https://arxiv.org/abs/2305.18290) with the SFT model as the reference policy."""

    learning_rate: float = Field(5e-6, gt=0, le=1)
    beta: float = Field(0.1, gt=0, description="strength of the penalty for leaving the reference policy")


class Merge(Section):
    """How base, SFT adapter and DPO adapter are merged: added in fp32, rounded once."""

    dtype: Literal["float16", "bfloat16", "float32"] = Field(
        "float16", description="of the merged weights; float16 rounds eight times finer than bfloat16"
    )
    max_shard_mb: Count = Field(4000, description="largest size of a model file, in MB")


class Gate(Section):
    """A bound on a metric. If the metric is outside it, the run ends with an error; the report is kept."""

    metric: Literal["loss", "perplexity", "preference_accuracy", "preference_margin", "token_f1", "chrf", "stop_rate"]
    model: Literal["base", "sft", "merged"] = "merged"
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if self.at_least is None and self.at_most is None:
            raise ValueError("a gate needs at_least or at_most")
        return self


class Evaluate(Section):
    """How base, base + SFT adapter and merged model are compared on the test split."""

    max_rows: Count | None = Field(None, description="test questions and test pairs to use, of each; null: all")
    generated_rows: Count = Field(64, description="test questions that each model generates an answer to")
    max_new_tokens: Count = 256
    shown_examples: Count = Field(8, description="answers shown side by side in the report")
    batch_rows: Count = 8
    bootstrap_resamples: Count = Field(2000, description="for the confidence intervals")
    confidence: float = Field(0.95, gt=0.5, lt=1)
    gates: tuple[Gate, ...] = ()


class Infer(Section):
    """How a finished run's model answers prompts."""

    max_new_tokens: Count = 256
    temperature: float = Field(0.0, ge=0, description="0: always the most likely token")
    top_p: float = Field(1.0, gt=0, le=1)
    batch_rows: Count = 8


class Recipe(Section):
    """Everything that a run does, from the base model to the report."""

    name: str = Field(
        pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$", description="prefix of the run's name; lower case, digits, -"
    )
    seed: int = Field(42, ge=0, le=2**32 - 1)
    max_length_tokens: int = Field(
        1024, ge=16, lt=2**31, description="limit for prompt and answer together, including the template"
    )
    cpu_threads: Count | None = Field(
        None, description="CPU threads; null: all; with 1 the same recipe always gives the same bytes"
    )
    prepare: Prepare
    sft: Sft = Sft()
    dpo: Dpo = Dpo()
    merge: Merge = Merge()
    evaluate: Evaluate = Evaluate()
    infer: Infer = Infer()

    def section(self, stage: str) -> Section:
        """Return the section of the recipe that belongs to `stage`."""
        section: Section = getattr(self, stage)
        return section

    def key_payload(self, stage: str) -> dict[str, Any]:
        """Return every value of the recipe that can change what `stage` makes."""
        common = {"seed": self.seed, "max_length_tokens": self.max_length_tokens, "cpu_threads": self.cpu_threads}
        return {"common": common, stage: _in_key(self.section(stage))}

    def sources(self) -> dict[str, Source]:
        """Return the sources that prepare reads from outside the store, by name."""
        return {
            "base": self.prepare.base,
            "questions": self.prepare.questions,
            "preferences": self.prepare.preferences,
        }

    def with_sources(self, sources: Mapping[str, Source]) -> "Recipe":
        """Return this recipe with other sources, validated."""
        values = self.model_dump()
        values["prepare"] |= {name: source.model_dump() for name, source in sources.items()}
        return Recipe.model_validate(values)


def json_schema() -> dict[str, Any]:
    """Return the recipe's JSON schema, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _in_key(value: Any) -> Any:
    """Return `value` as plain data, without the fields that cannot change a result.

    A source with a fingerprint is identified by it, not by its location.
    """
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        named = {
            name: _in_key(getattr(value, name))
            for name, field in fields.items()
            if field.json_schema_extra != _NOT_IN_KEY
        }
        if named.get("fingerprint"):
            named.pop("source")
        return named
    if isinstance(value, tuple):
        return [_in_key(item) for item in value]
    return value


def _number(value: Any) -> Any:
    if isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return value
    return value
