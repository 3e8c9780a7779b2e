"""Tables over recorded runs; they read the store only."""
