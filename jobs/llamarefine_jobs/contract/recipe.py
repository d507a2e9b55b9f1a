"""The recipe: one YAML file that says everything a run does.

Every unknown key is an error. Units stand in the names. A field marked `_FREE` cannot change what
a stage makes, so it stays out of the artifact's key.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from llamarefine_jobs.contract.credentials import refuse_credentials

_FREE: dict[str, Any] = {"in_key": False}

Count = Annotated[int, Field(ge=1, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
LinearLayer = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Section(BaseModel):
    """A part of the recipe: every key known, every value of its type, nothing changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _yaml_numbers(cls, values: Any) -> Any:
        """Let 1 stand for 1.0 and "2e-4", which YAML 1.1 reads as text, for a number."""
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
    """Where rows or a model come from: a path, ``s3://``, ``https://``, ``hf://datasets/owner/name``, a built-in."""

    source: str = Field(min_length=1)
    revision: str | None = Field(None, description="branch, tag or commit of a Hub repository; a commit pins it")
    fingerprint: str | None = Field(
        None, description="what the launcher saw behind the source when the run was planned; written by it, not by you"
    )

    @field_validator("source")
    @classmethod
    def _no_credentials(cls, value: str) -> str:
        return refuse_credentials(value)


class TinyModel(Section):
    """The shape and the pre-training of the tiny Llama made on the spot (`base.source: tiny-llama`)."""

    hidden_size: Count = 96
    intermediate_size: Count = 256
    layers: Count = 3
    heads: Count = 4
    vocabulary: Count = Field(2048, description="tokens of the byte-level BPE trained on the questions' training split")
    steps: Count = 200
    batch_rows: Count = 8
    learning_rate: float = Field(5e-3, gt=0)


class Base(Source):
    """The base model: a Hub id, a folder, ``s3://…``, or ``tiny-llama`` to train one on the spot."""

    source: str = Field("TinyLlama/TinyLlama-1.1B-Chat-v1.0", min_length=1)
    tiny: TinyModel = TinyModel()


class Rows(Source):
    """A table of rows and how to read it."""

    format: Literal["auto", "csv", "jsonl", "parquet", "hub"] = Field("auto", description="auto: by the name's ending")
    split: str = Field("train", description="split of a Hub data set")


class Questions(Rows):
    """Questions and answers, one pair a row. ``python-docstrings`` makes them from the standard library."""

    question_column: str = "question"
    answer_column: str = "answer"
    conflicting_answers: Literal["keep_first", "keep_all", "drop"] = Field(
        "keep_first", description="the same question with different answers: which stay; all are reported"
    )


class Preferences(Rows):
    """Preference pairs, HH-style text or message lists. ``python-docstrings`` makes them by stated rules."""

    prompt_column: str = "prompt"
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"


class Prepare(Section):
    """Base model and data: read, checked, de-duplicated, split, brought into the store."""

    base: Base = Base()
    questions: Questions
    preferences: Preferences
    too_long: Literal["drop", "truncate"] = Field(
        "drop", description="a row over max_length_tokens: left out, or its answer cut at a sentence's end"
    )
    max_rows: Count | None = Field(None, description="of each set, taken evenly; all when null")
    max_cell_bytes: Count = Field(1_000_000, description="a longer cell is not text someone asked: the row is dropped")
    near_duplicate_similarity: float = Field(
        0.9, gt=0, le=1, description="Jaccard similarity of word 3-grams from which two questions count as one"
    )
    validation_fraction: Fraction = 0.05
    test_fraction: Fraction = 0.10

    @model_validator(mode="after")
    def _rows_to_train_on(self) -> Self:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction + test_fraction leave no row to train on; their sum must be under 1")
        if not (self.validation_fraction and self.test_fraction):
            raise ValueError(
                "validation_fraction and test_fraction must both be over 0: a run without them proves nothing"
            )
        return self


class Lora(Section):
    """The adapter's shape (https://arxiv.org/abs/2106.09685)."""

    rank: Count = 16
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha/rank, with rslora by alpha/sqrt(rank)")
    dropout: Fraction = 0.0
    rslora: bool = False
    target_layers: tuple[LinearLayer, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )


class Training(Section):
    """What SFT and DPO share."""

    lora: Lora = Lora()
    quantization: Literal["none", "nf4"] = Field("none", description="nf4 holds the base in 4 bits (QLoRA); CUDA only")
    epochs: float = Field(1.0, gt=0)
    max_steps: Count | None = Field(None, description="stop after so many optimizer steps, whatever `epochs` says")
    learning_rate: float = Field(2e-4, gt=0, le=1)
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: Fraction = 0.1
    weight_decay: float = Field(0.0, ge=0)
    max_gradient_norm: float = Field(1.0, gt=0)
    batch_rows: Count = Field(16, description="rows in one optimizer step, over all processes")
    micro_batch_rows: Count = Field(
        8, description="rows in one forward pass; batch_rows is a multiple of it", json_schema_extra=_FREE
    )
    on_out_of_memory: Literal["fail", "halve_micro_batch"] = Field(
        "fail", description="halve_micro_batch: start anew from the newest checkpoint", json_schema_extra=_FREE
    )
    evaluate_every_steps: Count | None = Field(None, description="measure the validation split; null: four times a run")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: slower, less memory"
    )
    checkpoint_every_s: Count | None = Field(600, description="publish a checkpoint so often", json_schema_extra=_FREE)
    checkpoint_every_steps: Count | None = Field(None, description="and every so many steps", json_schema_extra=_FREE)
    log_every_steps: Count = Field(5, json_schema_extra=_FREE)
    gpus: Count = Field(
        1, description="processes on each node, a GPU for each; on CPUs just processes", json_schema_extra=_FREE
    )
    nodes: Count = Field(1, description="machines, on a cluster a pod each", json_schema_extra=_FREE)

    @property
    def processes(self) -> int:
        """How many train together; they split each batch among them."""
        return self.gpus * self.nodes

    @property
    def micro_batches(self) -> int:
        """How many forward passes a process makes for one optimizer step."""
        return self.batch_rows // (self.micro_batch_rows * self.processes)

    @model_validator(mode="after")
    def _whole_batches(self) -> Self:
        if self.batch_rows % self.micro_batch_rows:
            raise ValueError(
                f"batch_rows {self.batch_rows} must be a multiple of micro_batch_rows {self.micro_batch_rows}"
            )
        if self.batch_rows % (self.micro_batch_rows * self.processes):
            raise ValueError(
                f"batch_rows {self.batch_rows} is shared by {self.gpus} gpus x {self.nodes} nodes: it must be a "
                f"multiple of {self.micro_batch_rows * self.processes}, their micro_batch_rows; lower micro_batch_rows "
                "or raise batch_rows"
            )
        if self.nodes > 1 and self.on_out_of_memory != "fail":
            raise ValueError(
                f"on_out_of_memory: {self.on_out_of_memory} works on one node, nodes is {self.nodes}: one that starts "
                "anew would leave the others behind; set it to fail"
            )
        return self


class Sft(Training):
    """Supervised fine-tuning with LoRA: the loss counts the answer's tokens only."""

    packing: Literal["auto", "never"] = Field(
        "auto", description="auto: several rows in one sequence where attention keeps them apart"
    )


class Dpo(Training):
    """Direct preference optimisation (https://arxiv.org/abs/2305.18290) against the SFT policy."""

    learning_rate: float = Field(5e-6, gt=0, le=1)
    beta: float = Field(0.1, gt=0, description="how strongly the policy is held to the reference")


class Merge(Section):
    """Base + SFT adapter + DPO adapter in one fp32 pass, rounded once."""

    dtype: Literal["float16", "bfloat16", "float32"] = Field(
        "float16", description="float16 rounds a DPO update eight times finer than bfloat16"
    )
    max_shard_mb: Count = Field(4000, description="a model file is at most so many MB")


class Gate(Section):
    """A bound that the evaluation must hold, or the run ends with an error (the report is kept)."""

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
    """Base, base + SFT, merged, side by side on the test split."""

    max_rows: Count | None = Field(None, description="of the test questions and of the test pairs; all when null")
    generated_rows: Count = Field(64, description="test questions that each model answers")
    max_new_tokens: Count = 256
    shown_examples: Count = Field(8, description="answers shown side by side in the report")
    batch_rows: Count = 8
    bootstrap_resamples: Count = Field(2000, description="for the confidence intervals")
    confidence: float = Field(0.95, gt=0.5, lt=1)
    gates: tuple[Gate, ...] = ()


class Infer(Section):
    """Answers for prompts, from a finished run."""

    max_new_tokens: Count = 256
    temperature: float = Field(0.0, ge=0, description="0 takes the likeliest token each time")
    top_p: float = Field(1.0, gt=0, le=1)
    batch_rows: Count = 8


class Recipe(Section):
    """One run, from the base model to the report."""

    name: str = Field(
        pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$", description="names the run; lower case, digits, -"
    )
    seed: int = Field(42, ge=0, le=2**32 - 1)
    max_length_tokens: int = Field(
        1024, ge=16, lt=2**31, description="of prompt and answer together, template included"
    )
    cpu_threads: Count | None = Field(
        None, description="threads on a CPU; with 1 the same recipe gives the same bytes; null: all"
    )
    prepare: Prepare
    sft: Sft = Sft()
    dpo: Dpo = Dpo()
    merge: Merge = Merge()
    evaluate: Evaluate = Evaluate()
    infer: Infer = Infer()

    def section(self, stage: str) -> Section:
        """The part of the recipe that is `stage`'s own."""
        section: Section = getattr(self, stage)
        return section

    def key_payload(self, stage: str) -> dict[str, Any]:
        """All of the recipe that can change what `stage` makes."""
        common = {"seed": self.seed, "max_length_tokens": self.max_length_tokens, "cpu_threads": self.cpu_threads}
        return {"common": common, stage: _in_key(self.section(stage))}

    def sources(self) -> dict[str, Source]:
        """What prepare reads from outside the store, by name."""
        return {
            "base": self.prepare.base,
            "questions": self.prepare.questions,
            "preferences": self.prepare.preferences,
        }

    def with_sources(self, sources: Mapping[str, Source]) -> "Recipe":
        """This recipe with other sources, checked anew."""
        values = self.model_dump()
        values["prepare"] |= {name: source.model_dump() for name, source in sources.items()}
        return Recipe.model_validate(values)


def json_schema() -> dict[str, Any]:
    """The recipe's JSON schema, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _in_key(value: Any) -> Any:
    """`value` as plain data without the fields that cannot change a result.

    A source that has a fingerprint is known by it: where it lies is no part of what it is.
    """
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        named = {
            name: _in_key(getattr(value, name)) for name, field in fields.items() if field.json_schema_extra != _FREE
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
