"""Base models, adapters and tokenizers: loading, checking, scoring, and the proof of a merge.

The two training backends live here, behind one interface. Does not train (training/) and does not judge (report/).
"""
