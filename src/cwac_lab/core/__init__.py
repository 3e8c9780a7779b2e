"""Leaves: what every part of the package may import, and what imports none of its parts."""
