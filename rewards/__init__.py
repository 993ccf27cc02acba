"""Scorers, one file a family: each maps images and prompts to one score an image."""
