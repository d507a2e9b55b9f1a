"""What SFT and DPO share while they train: the loop, checkpoints, the order of rows, the check before the first step.

A stage module builds its trainer; this package runs it. Imported only by the stages that train.
"""
