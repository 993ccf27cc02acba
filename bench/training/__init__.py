"""Training: rig, loop, checkpoints and sets of preference pairs."""
