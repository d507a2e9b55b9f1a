"""From a source's rows to checked, deduplicated, split sets that fit the model.

Reads tables, parses dialogues, drops and counts rows, and describes the result in the data card. Only prepare and
infer read tables; the later stages read what prepare published (models/encoding.py).
"""
