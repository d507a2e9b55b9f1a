"""The training loop of SFT and DPO: checkpoints, best adapter, row order, and DPO's proof before its first step.

A stage module builds its trainer; this package runs it. Only the stages that train import this package.
"""
