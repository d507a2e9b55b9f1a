"""How a stage runs as operating system processes: SIGTERM, training in several processes, running out of memory.

Uses the contract, the store and recipe_file, but no model and no data.
"""
