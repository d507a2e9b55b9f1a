"""The proof that a merged model is base + SFT adapter + DPO adapter, each added once, and rounded once.

The proof uses no code of merge.py. PEFT computes, in fp32, the logits of the base with both adapters attached
(`exact`), and again after PEFT's own merge is rounded to the output type (`rounded`). The merged folder is loaded
alone, with plain `AutoModelForCausalLM.from_pretrained`. Two conditions must hold:

- its logits differ from the exact ones by no more than rounding explains; `rounded` shows how much that is;
- the difference between its logits and the rounded ones contains no part of either adapter's effect. A least-squares
  fit estimates how often each adapter was added, even if the adapter's effect is smaller than the rounding.

Memory: one fp32 model at a time (4 bytes a parameter), and six sets of logits (64 · vocabulary numbers each).
"""

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.errors import ProofError

STEPS = 6  # forward passes
_SHAPE = (2, 32)  # rows and tokens of the fixed input
_SEED = 20
_ROUNDING = 2.0  # the merged model's distance may be this multiple of the distance of PEFT's own rounded merge
_NOISE = 1e-5  # fraction of the largest logit that fp32 arithmetic in another order may change
_SHARE_TOLERANCE = 0.05  # how far from 1 the number of times that an adapter was added may be

OnPass = Callable[[], None]


@dataclass(frozen=True)
class Proof:
    """The figures of a proof.

    Each distance is the largest difference between two models' logits. Each share is the number of times that an
    adapter was added; it is None for an adapter that changes nothing.
    """

    difference: float
    tolerance: float
    rounding: float
    distance_from_base: float
    distance_from_sft: float
    sft_share: float | None
    dpo_share: float | None

    def figures(self) -> dict[str, float | None]:
        return asdict(self)


@dataclass(frozen=True)
class _Logits:
    """The logits of the fixed input, flat and in fp32, of five models that PEFT builds."""

    base: Any
    sft: Any
    dpo: Any
    exact: Any
    rounded: Any


def prove(base: Path, sft: Path, dpo: Path, written: Path, dtype: str, on_pass: OnPass) -> Proof:
    """Compare the model in `written` with base + both adapters. `on_pass` is called after each of STEPS forward passes.

    Raises ProofError, with the number of times that each adapter was added, if a condition does not hold.
    """
    expected = _logits_by_peft(base, sft, dpo, dtype, on_pass)
    proof = _compare(expected, _logits(_load(written), on_pass))
    shares = {"SFT": proof.sft_share, "DPO": proof.dpo_share}
    counted = {name: share for name, share in shares.items() if share is not None}
    once = all(abs(share - 1) <= _SHARE_TOLERANCE for share in counted.values())
    if not (once and proof.difference <= proof.tolerance):  # true for NaN, too
        found = " and ".join(f"the {name} adapter {share:.2f} times" for name, share in counted.items())
        raise ProofError(
            f"the merged model is not base + adapters: its logits differ by {proof.difference:.2e}, "
            f"rounding to {dtype} explains up to {proof.tolerance:.2e}" + (f"; it contains {found}" if found else "")
        )
    return proof


def _logits_by_peft(base: Path, sft: Path, dpo: Path, dtype: str, on_pass: OnPass) -> _Logits:
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(_load(base), sft, adapter_name="sft")
    model.load_adapter(dpo, adapter_name="dpo")
    with model.disable_adapter():
        base_logits = _logits(model, on_pass)
    found = {}
    for name, active in (("sft", ["sft"]), ("dpo", ["dpo"]), ("exact", ["sft", "dpo"])):
        model.base_model.set_adapter(active)
        found[name] = _logits(model, on_pass)
    merged = model.merge_and_unload(adapter_names=["sft", "dpo"])
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype)).float()
    rounded_logits = _logits(merged, on_pass)
    del model, merged
    gc.collect()  # PEFT's wrappers refer to each other, and the next model needs their memory
    return _Logits(base=base_logits, rounded=rounded_logits, **found)


def _compare(expected: _Logits, written: Any) -> Proof:
    noise = _NOISE * float(expected.exact.abs().max())
    rounding = _distance(expected.rounded, expected.exact)
    effects = {"sft": expected.exact - expected.dpo, "dpo": expected.exact - expected.sft}
    measurable = {name: effect for name, effect in effects.items() if float(effect.abs().max()) > noise}
    shares = _shares(measurable, written - expected.rounded)
    return Proof(
        difference=_distance(written, expected.exact),
        tolerance=_ROUNDING * rounding + noise,
        rounding=rounding,
        distance_from_base=_distance(written, expected.base),
        distance_from_sft=_distance(written, expected.sft),
        sft_share=shares.get("sft"),
        dpo_share=shares.get("dpo"),
    )


def _shares(effects: dict[str, Any], difference: Any) -> dict[str, float]:
    """Return how often each adapter was added: 1 plus its least-squares coefficient in the difference."""
    import torch

    if not effects:
        return {}
    columns = torch.stack(list(effects.values()), dim=1).double()
    found = torch.linalg.pinv(columns.T @ columns, hermitian=True) @ (columns.T @ difference.double())
    return {name: 1 + float(value) for name, value in zip(effects, found, strict=True)}


def _load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if missing := sorted(report["missing_keys"]):
        raise ProofError(f"{folder.name}/ lacks the weights {', '.join(missing[:3])}, so they would be random")
    return model.eval()


def _logits(model: Any, on_pass: OnPass) -> Any:
    """Return the model's logits for the fixed input, flattened, in fp32."""
    import torch

    rows, tokens = _SHAPE
    tokens = min(tokens, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(_SEED)
    ids_BT = torch.randint(model.config.vocab_size, (rows, tokens), generator=generator)
    with torch.inference_mode():
        logits = model(input_ids=ids_BT, use_cache=False).logits
    on_pass()
    return logits.float().flatten()


def _distance(one: Any, other: Any) -> float:
    return float((one - other).abs().max())
