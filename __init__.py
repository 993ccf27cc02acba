"""gpobench, the referee of text-to-image post-training: any method, one budget, an interval on every number."""

__version__ = "0.1.0"
