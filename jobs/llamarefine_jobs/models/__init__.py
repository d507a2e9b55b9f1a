"""Check, load, score and merge base models, adapters and tokenizers.

The two backends (Unsloth, transformers + peft) are behind one interface. Training is in training/, the comparison of
models in report/.
"""
