"""Statistics: resampling, intervals, tests and distances."""
