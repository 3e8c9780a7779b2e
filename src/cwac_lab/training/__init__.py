"""One training loop for all defences: Lightning module, optimizer settings, exact checkpoints."""
