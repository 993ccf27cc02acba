"""Commands: one file for each command of `gpobench`, and what they share."""
