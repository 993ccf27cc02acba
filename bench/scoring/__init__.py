"""Scorers: opening them by name, and the client and server of a scorer in another process."""
