"""Grids of runs: what an experiment compares, and running what of it is missing."""
