"""Drift, measured: what moved inside a model between its start and now, on prompts that no constraint held."""
