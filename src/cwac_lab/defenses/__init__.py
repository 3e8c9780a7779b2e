"""Defences: the interface, the method of the paper (``cwac``), and those of the literature."""
