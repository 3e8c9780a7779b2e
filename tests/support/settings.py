"""Settings with another value, for tests of what depends on them."""


def another(value):
    """Another value of the kind of a setting."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (*value, 0.5)
    if value is None:
        return 3
    return f"{value}x" if isinstance(value, str) else value + 1 if isinstance(value, int) else (value + 1) / 3
