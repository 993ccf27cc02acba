"""Tasks, one file each: prompts, the scorer to train on, the held-out scorers and the evaluation settings."""
