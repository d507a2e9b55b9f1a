"""Limits on bytes that others wrote: JSON, YAML, pickles, remote code, terminal control characters, secrets in logs.

Each module refuses or removes what could do harm before anything else reads it. Imports only the contract.
"""
