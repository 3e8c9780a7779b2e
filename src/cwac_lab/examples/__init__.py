"""Complete scripts to start from."""
