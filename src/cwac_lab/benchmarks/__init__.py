"""Side-by-side measurements of time and memory; nothing of it is a test."""
