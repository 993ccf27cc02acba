"""What a machine has: weights fetched and checked by hash, and the examination before a run."""
