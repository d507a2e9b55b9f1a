"""Models: base models, adapters and tokenizers are checked, loaded, scored and merged here.

The two backends (Unsloth, transformers + peft) are behind one interface. Training is in training/, comparisons in
report/.
"""
