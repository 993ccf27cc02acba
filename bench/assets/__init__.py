"""Files a run stands on: weights, downloads, prompts, glyphs."""
