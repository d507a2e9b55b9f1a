"""Publish and fetch artifacts: a folder or an S3-compatible bucket behind one interface.

A manifest is written last and a download is renamed last, so nothing half-written is ever read. Imports only the
contract and untrusted/: no stage, no training library, no source outside the store.
"""

from llamarefine_jobs.store.artifacts import Store

__all__ = ["Store"]
