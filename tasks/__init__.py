"""Tasks, one file each: prompts, the reward to train on, the held-out scorers and the protocol."""
