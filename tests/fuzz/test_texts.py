"""Fuzz recipes, settings, progress and log lines, dialogues and statements: valid results or one-line errors."""

import json
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from llamarefine_jobs.contract import progress
from llamarefine_jobs.contract.artifact import artifact_key
from llamarefine_jobs.contract.progress import Progress
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.data.rows import is_dialogue, parse_dialogue
from llamarefine_jobs.recipe_file import parse_recipe, to_yaml
from llamarefine_jobs.untrusted.control_characters import strip_control_characters
from llamarefine_k8s import settings
from llamarefine_k8s.cluster.manifests import driver_job, run_config_map, stage_job
from llamarefine_k8s.cluster.pod_log import PodLog
from llamarefine_k8s.runs import signing
from llamarefine_k8s.runs.pipeline import Task

from .target import allow_refusal, fuzzed, mutated

RECIPE = b"""\
name: small
seed: 3
prepare:
  base: {source: tiny-llama, tiny: {layers: 2}}
  questions: {source: rows.csv, format: csv, question_column: ask}
  preferences: {source: "s3://bucket/pairs.jsonl"}
sft: {epochs: 2, learning_rate: 2e-4, lora: {rank: 4, target_layers: [q_proj, v_proj]}}
dpo: &dpo {beta: 0.1}
evaluate: {gates: [{metric: loss, at_most: 3}]}
"""
SETTINGS = b"""\
store: s3://bucket/prefix
image_registry: registry.example.com/team
resources: {sft: {requests: {cpu: 2, memory: 8Gi}, gpus: 1}}
node_selector: {gpu: "yes"}
tolerations: [{key: nvidia.com/gpu, operator: Exists}]
patches: {prepare: {spec: {template: {spec: {containers: [{name: stage, env: [{name: A, value: b}]}]}}}}}
"""
PIECES = [
    b"&a [*a]", b"*dpo", b"<<: *dpo", b"!!python/object/apply:os.system [id]", b"!!binary aGk=",
    b"!!set {a, b}", b"? [a]", b"{", b"[", b": ", b"\n  ", b"- ", b"---\n", b"~", b"null", b"true", b".nan",
    b"1:59:59", b"0x1F", b"1" * 5000, b"2026-02-31", b"\xff", b"\x00", b"\xe2\x80\xae", b"'", b'"',
    b"https://user:pass@example.com/x", b"../../etc/passwd", b"$(id)", b"`id`", b"%TAG",
    b"!!timestamp 2026-11-24", b"\x1b[2J", b"{a: " * 60, b"9" * 400, b"!!omap [a: 1]", b"!!float 1_0:0", b"=",
    b"\xf0\x9f\xa6\x99",
]  # fmt: skip
SMALL = parse_recipe("name: small\nprepare: {questions: {source: a.csv}, preferences: {source: b.jsonl}}", "small")


@st.composite
def mutations(draw: Any, text: bytes) -> bytes:
    """Draw a mutation of `text`, or now and then arbitrary bytes or text."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=300) | st.text(max_size=200).map(lambda some: some.encode(errors="replace")))
    return mutated(draw, text, PIECES)


@fuzzed(0.12)
@given(mutations(RECIPE))
@example(b"a: &a {" + b", ".join(b"k%d: 1" % i for i in range(9)) + b"}\n" + b"".join(
    b"%c: &%c {<<: [%s]}\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(8)
))  # fmt: skip
@example(b"name: 1" + b":59" * 100_000)
def test_a_recipe(text: bytes) -> None:
    with allow_refusal("recipe YAML"):
        recipe = parse_recipe(text.decode(errors="replace"), "fuzzed")
        assert parse_recipe(to_yaml(recipe), "again") == recipe
        artifact_key("prepare", recipe, {})


@fuzzed(0.03)
@given(st.lists(mutations(b"sft.epochs=2") | mutations(b"prepare.base.source=a"), max_size=3))
def test_overrides(overrides: list[bytes]) -> None:
    with allow_refusal("--set"):
        parse_recipe(RECIPE.decode(), "fuzzed", [each.decode(errors="replace") for each in overrides])


@fuzzed(0.08)
@given(mutations(SETTINGS))
@example(b"patches:\n  all:\n    a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"    %c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(9)
))  # fmt: skip
def test_settings(text: bytes) -> None:
    """Every Kubernetes object that is made from the parsed settings can be serialized as JSON."""
    with allow_refusal("settings YAML"):
        found = settings.parse(settings.read_text(text.decode(errors="replace"), "fuzzed"), "fuzzed")
        task = Task("small-00000000", "sft", "0" * 64, SMALL, "s3://bucket/prefix")
        json.dumps(
            [
                run_config_map("small-00000000", SMALL, found),
                driver_job("small-00000000", found),
                stage_job(task, found),
            ]
        )


@fuzzed(0.25)
@given(mutations(b"progress stage=sft step=40 steps=100 phase=step loss=4.2137 tokens_per_s=5120 eta_s=12"))
def test_a_progress_line(line: bytes) -> None:
    with allow_refusal("progress lines"):
        found = progress.parse(line.decode(errors="replace"))
        assert found is None or isinstance(found, Progress)
        if found:
            found.line()


class OneLog:
    """A cluster with one pod, which has ended with the given log."""

    def __init__(self, lines: list[bytes]) -> None:
        self.lines = lines

    def log(self, *_: Any, **__: Any) -> list[bytes]:
        return self.lines

    def get(self, kind: str, name: str) -> None:
        return None


@fuzzed(0.1)
@given(
    st.lists(mutations(b"2026-11-24T02:00:00.123456789Z progress stage=sft step=1 steps=2"), max_size=6),
    st.none() | mutations(b"2026-11-24T02:00:00.123456789Z").map(lambda mark: mark.decode(errors="replace")),
)
@example([b"2026-11-24T02:00:89Z an invalid time\n"], None)
@example([b"0001-01-01T00:00:00Z the first second\n"], "2026-11-24T24:00:00Z")
def test_pod_log_lines(lines: list[bytes], after: str | None) -> None:
    """`after` is read from the bucket, so it may be hostile, too."""
    with allow_refusal("pod log lines"):
        for text in PodLog(OneLog(lines), "pod", "stage", after).lines(follow=False):
            assert "\n" not in strip_control_characters(text).replace("\n", "")


@fuzzed(0.25)
@given(
    mutations(b"\n\nHuman: How?\n\nAssistant: So.\n\nHuman: And then?\n\nAssistant: Like this, Human: see.\n\nHuman: ")
)
def test_a_dialogue(text: bytes) -> None:
    """Every turn's text is a part of the dialogue's text."""
    with allow_refusal("HH dialogues"):
        whole = text.decode(errors="replace")
        turns = parse_dialogue(whole)
        assert all(turn["content"] in whole for turn in turns)
        assert all(turn["role"] in ("user", "assistant") for turn in turns)
        is_dialogue(whole)


STATEMENT = json.dumps(
    {
        "payload": "eyJfdHlwZSI6ICJ4In0=",
        "payloadType": signing.PAYLOAD_TYPE,
        "signatures": [{"keyid": "a", "sig": "AA=="}],
    }
).encode()


@fuzzed(0.1)
@given(mutations(STATEMENT))
def test_a_statement(line: bytes) -> None:
    with allow_refusal("statements"):
        assert signing.parse(line).payload


def test_the_unmutated_inputs_are_valid() -> None:
    """Otherwise the fuzzer would only test how invalid input is refused."""
    assert isinstance(parse_recipe(RECIPE.decode(), "seed"), Recipe)
    settings.parse(settings.read_text(SETTINGS.decode(), "seed"), "seed")
    assert signing.parse(STATEMENT).signatures
