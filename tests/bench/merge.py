"""Measure the time and the peak memory of the merge's streamed sum, and of its proof, at a model's real shape.

    python tests/bench/merge.py [--layers 22] [--proof]

The default shape is TinyLlama's: 1.1 B parameters in bfloat16 and two adapters of rank 16 on all linear layers, all
random numbers. Needs 5 GB of disk space, and with --proof also 5 GB of memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDDEN, INTERMEDIATE, KEYS, VOCABULARY, RANK = 2048, 5632, 256, 32000, 16
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def write_inputs(folder: Path, layers: int) -> None:
    """Write base/, sft/ and dpo/ into `folder`."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    shapes = {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in LINEAR.items()}
    base = {f"{name}.weight": (torch.randn(shape) * 0.02).bfloat16() for name, shape in shapes.items()}
    for name in ("model.embed_tokens", "lm_head"):
        base[f"{name}.weight"] = (torch.randn(VOCABULARY, HIDDEN) * 0.02).bfloat16()
    norms = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in ("input_", "post_attention_")]
    base |= {f"{name}layernorm.weight": torch.ones(HIDDEN).bfloat16() for name in norms}
    base["model.norm.weight"] = torch.ones(HIDDEN).bfloat16()
    (folder / "base").mkdir()
    save_file(base, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_attention_heads": 32}
    config |= {"num_key_value_heads": 4, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
    config |= {"num_hidden_layers": layers, "vocab_size": VOCABULARY, "dtype": "bfloat16"}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    for stage, size in (("sft", 1e-3), ("dpo", 5e-5)):
        tensors = {}
        for name, (rows, columns) in shapes.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, columns) * 0.02
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, RANK) * size / 0.16
        (folder / stage).mkdir()
        save_file(tensors, folder / stage / "adapter_model.safetensors", metadata={"format": "pt"})
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
        settings["target_modules"] = [name.split(".")[1] for name in LINEAR]
        (folder / stage / "adapter_config.json").write_text(json.dumps(settings))


def measure_sum(folder: Path, dtype: str) -> None:
    """Measure the streamed sum alone, computed as merge.work does."""
    import torch

    from llamarefine_jobs.merge import Sum, one_thread
    from llamarefine_jobs.models.lora import read_adapter
    from llamarefine_jobs.models.weights import Weights, write_weights

    torch.zeros(1)  # initialises torch before the clock starts
    began = time.monotonic(), time.process_time()
    updates = [read_adapter(folder / stage, stage) for stage in ("sft", "dpo")]
    base = Weights(folder / "base")
    (folder / "merged").mkdir()
    with one_thread():
        write_weights(folder / "merged", base.shapes, dtype, 4 * 10**9, Sum(base, updates, dtype).blocks)
    report("sum", began)


def measure_proof(folder: Path, dtype: str) -> None:
    """Measure the proof, which follows the sum."""
    from transformers.utils import logging

    from llamarefine_jobs.models import merge_proof

    logging.disable_progress_bar()
    (folder / "merged" / "config.json").write_bytes((folder / "base" / "config.json").read_bytes())
    began = time.monotonic(), time.process_time()
    proof = merge_proof.prove(folder / "base", folder / "sft", folder / "dpo", folder / "merged", dtype, lambda: None)
    report("proof", began)
    print(proof)


def report(what: str, began: tuple[float, float]) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 10**6
    wall_s, cpu_s = time.monotonic() - began[0], time.process_time() - began[1]
    print(f"{what}: {wall_s:.1f} s, {cpu_s:.1f} s of CPU time; peak {peak:.2f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--proof", action="store_true")
    parser.add_argument("--step", choices=["inputs", "sum", "proof"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        steps = {"inputs": lambda: write_inputs(options.folder, options.layers)}
        steps |= {"sum": lambda: measure_sum(options.folder, options.dtype)}
        steps |= {"proof": lambda: measure_proof(options.folder, options.dtype)}
        steps[options.step]()
        return
    with tempfile.TemporaryDirectory(prefix="llamarefine-bench-") as folder:
        for step in (
            "inputs",
            "sum",
            *(["proof"] if options.proof else []),
        ):  # each in its own process, with its own peak memory
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--step", step, "--folder", folder], check=True)


if __name__ == "__main__":
    main()
