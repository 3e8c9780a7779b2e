"""Data: tasks, prompt pools, mixing, batches."""
