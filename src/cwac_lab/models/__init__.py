"""Models: weights from a package, the hub or a folder; chat format; where the linear layers sit; capture hooks."""
