"""Task data that the package ships: small generators with their word lists."""
