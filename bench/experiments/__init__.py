"""Experiments: settings, single runs, grids of runs, tuning and export."""
