"""Defences of the literature on the shared hooks; each file states its fidelity and every deviation."""
