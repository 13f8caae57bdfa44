"""How a number moves during a fit: from `start` to `end` as `progress` goes from 0 to 1."""

from __future__ import annotations


def linear(progress: float, start: float, end: float) -> float:
    """Return start + (end - start) * progress, with the progress held within 0 and 1."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def geometric(progress: float, start: float, end: float) -> float:
    """Return start^(1 - progress) * end^progress: equal factors in equal times. Both ends have to be positive."""
    inside = min(max(progress, 0.0), 1.0)
    return float(start ** (1 - inside) * end**inside)
