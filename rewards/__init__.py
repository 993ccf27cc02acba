"""Scorers, one file a family: images and prompts in, one score an image out."""
