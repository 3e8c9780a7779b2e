"""Evaluation in three stages, each saved: generations, verdicts, aggregates."""
