"""Checks of data that others wrote: JSON, YAML, pickles, remote code, terminal control characters, secrets in logs.

Each module refuses or removes harmful content before anything else reads it. Imports only the contract.
"""
