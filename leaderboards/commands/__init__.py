"""Commands of the leaderboards: one file a command."""
