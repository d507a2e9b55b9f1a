"""The operating system's side of a stage: SIGTERM, several processes, memory that runs out.

Knows the store and the contract; knows no model and no data.
"""
