"""Defines the laws that every method must keep, and the check that applies them."""
