"""Provides the files that runs read: weights, downloads, prompts, glyphs, words."""
