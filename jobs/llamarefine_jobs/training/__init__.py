"""The training loop of SFT and DPO: steps, checkpoints, best adapter, row order, and DPO's proof before its first step.

A stage module gives it the model, the rows and the loss. Only the stages that train import this package.
"""
