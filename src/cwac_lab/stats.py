"""Interval estimates for proportions."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from scipy import stats


@dataclass(frozen=True)
class Rate:
    """A proportion in percent with its 95 % Wilson interval; all three are None where ``n`` is 0."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the fields as a JSON-able dict."""
        return asdict(self)

    def __str__(self) -> str:
        """Render as ``12.0 [7.0, 19.8] (n=100)``."""
        if self.value is None:
            return f"n/a (n={self.n})"
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}] (n={self.n})"


def wilson(hits: float, n: int, confidence: float = 0.95) -> Rate:
    """Return the proportion ``hits / n`` in percent with its Wilson score interval (Wilson 1927).

    Args:
        hits: Successes among n; a fraction where it is a mean over runs on the same n items.
        n: Items.
        confidence: Coverage of the interval.

    Raises:
        ValueError: If ``hits`` is not within ``0..n``.
    """
    if not 0 <= hits <= n:
        raise ValueError(f"hits={hits} must lie in 0..n={n}")
    if n == 0:
        return Rate(None, None, None, 0)
    share, z = hits / n, float(stats.norm.ppf((1 + confidence) / 2))
    centre = share + z**2 / (2 * n)
    half = z * (share * (1 - share) / n + (z / (2 * n)) ** 2) ** 0.5
    low, high = ((centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n))
    return Rate(100 * share, 100 * max(0.0, low), 100 * min(1.0, high), n)
