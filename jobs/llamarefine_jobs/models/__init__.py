"""Check, load, score and merge base models, adapters and tokenizers.

The backends (transformers + peft, Unsloth) are behind one interface. Training is in training/, the comparison of models
in report/.
"""
