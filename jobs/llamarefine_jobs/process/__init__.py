"""How a stage runs as operating system processes: SIGTERM, training in several processes, running out of memory.

Uses the store and the contract, but no model and no data.
"""
