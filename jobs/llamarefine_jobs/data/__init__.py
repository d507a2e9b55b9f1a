"""Data: reads tables, checks their rows, drops duplicates, splits the rest, and describes the result in the data card.

Only prepare and infer read tables, and preflight reads their first bytes. The other stages read the rows that prepare
published (models/encoding.py).
"""
