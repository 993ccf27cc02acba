"""Files that runs read: weights, downloads, prompts, glyphs, words."""
