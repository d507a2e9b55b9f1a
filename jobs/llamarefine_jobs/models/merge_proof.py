"""The proof that a written model is base + SFT adapter + DPO adapter, each once, rounded once.

Nothing of merge.py is used here. PEFT computes, in fp32, the logits of the base with both adapters beside it
(`exact`), and once more after it has merged them itself and rounded to the output type (`rounded`). The written
folder is loaded alone, as its users will load it. Two things must hold:

- its logits are from the exact ones no further away than rounding explains, which `rounded` shows;
- what separates them from the rounded ones holds no part of either adapter's effect. A least-squares fit tells how
  often each adapter was counted, even where the adapter's effect is smaller than the rounding.

Memory: one model in fp32 at a time, 4 bytes a parameter, and six sets of logits (64 · vocabulary numbers).
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
_ROUNDING = 2.0  # the written model may be so many times as far away as PEFT's own merge, rounded, is
_NOISE = 1e-5  # of the largest logit: what fp32 arithmetic in another order may change
_SHARE_TOLERANCE = 0.05

Tick = Callable[[], None]


@dataclass(frozen=True)
class Proof:
    """Distances are the largest differences between logits. A share is None where the adapter changes nothing."""

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
    """Of the fixed input, flat and in fp32, by models that PEFT makes."""

    base: Any
    sft: Any
    dpo: Any
    exact: Any
    rounded: Any


def prove(base: Path, sft: Path, dpo: Path, written: Path, dtype: str, tick: Tick) -> Proof:
    """Compare the model in `written` with base + both adapters; ProofError says how often it counts each."""
    expected = _ask_peft(base, sft, dpo, dtype, tick)
    proof = _compare(expected, _ask_written(written, tick))
    shares = {"SFT": proof.sft_share, "DPO": proof.dpo_share}
    counted = {name: share for name, share in shares.items() if share is not None}
    once = all(abs(share - 1) <= _SHARE_TOLERANCE for share in counted.values())
    if not (once and proof.difference <= proof.tolerance):  # so written that NaN fails too
        found = " and ".join(f"the {name} adapter {share:.2f} times" for name, share in counted.items())
        raise ProofError(
            f"the merged model is not base + adapters: its logits are {proof.difference:.2e} away, rounding to {dtype} "
            f"explains {proof.tolerance:.2e}" + (f"; it counts {found}" if found else "")
        )
    return proof


def _ask_peft(base: Path, sft: Path, dpo: Path, dtype: str, tick: Tick) -> _Logits:
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(_load(base), sft, adapter_name="sft")
    model.load_adapter(dpo, adapter_name="dpo")
    with model.disable_adapter():
        of_base = _logits(model, tick)
    found = {}
    for name, active in (("sft", ["sft"]), ("dpo", ["dpo"]), ("exact", ["sft", "dpo"])):
        model.base_model.set_adapter(active)
        found[name] = _logits(model, tick)
    merged = model.merge_and_unload(adapter_names=["sft", "dpo"])
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype)).float()
    of_rounded = _logits(merged, tick)
    del model, merged
    gc.collect()  # PEFT's wrappers refer to one another; the next model needs their memory
    return _Logits(base=of_base, rounded=of_rounded, **found)


def _ask_written(folder: Path, tick: Tick) -> Any:
    return _logits(_load(folder), tick)


def _compare(expected: _Logits, written: Any) -> Proof:
    noise = _NOISE * float(expected.exact.abs().max())
    rounding = _distance(expected.rounded, expected.exact)
    effects = {"sft": expected.exact - expected.dpo, "dpo": expected.exact - expected.sft}
    felt = {name: effect for name, effect in effects.items() if float(effect.abs().max()) > noise}
    shares = _shares(felt, written - expected.rounded)
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
    """How often each adapter was counted: 1 plus its coefficient in the difference, by least squares."""
    import torch

    if not effects:
        return {}
    columns = torch.stack(list(effects.values()), dim=1).double()
    found = torch.linalg.pinv(columns.T @ columns, hermitian=True) @ (columns.T @ difference.double())
    return {name: 1 + float(value) for name, value in zip(effects, found, strict=True)}


def _load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if lacking := sorted(found["missing_keys"]):
        raise ProofError(f"{folder.name}/ lacks the weights {', '.join(lacking[:3])}, so they would be random")
    return model.eval()


def _logits(model: Any, tick: Tick) -> Any:
    """The logits of the fixed input, one token after the other."""
    import torch

    rows, tokens = _SHAPE
    tokens = min(tokens, model.config.max_position_embeddings)
    draw = torch.Generator().manual_seed(_SEED)
    ids_BT = torch.randint(model.config.vocab_size, (rows, tokens), generator=draw)
    with torch.inference_mode():
        logits = model(input_ids=ids_BT, use_cache=False).logits
    tick()
    return logits.float().flatten()


def _distance(one: Any, other: Any) -> float:
    return float((one - other).abs().max())
