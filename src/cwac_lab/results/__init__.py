"""Run records on disk, what a run prints, and all records as one table."""

from cwac_lab.results.frame import load, select

__all__ = ["load", "select"]
