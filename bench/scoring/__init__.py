"""Opens scorers by name, and contains the client and server of a scorer in another process."""
