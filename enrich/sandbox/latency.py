"""Parses the duration of a task: a distribution written as text, such as `lognormal(1.2,0.6)`."""

import math
import re
from collections.abc import Callable
from statistics import NormalDist

# Maps a random number (above 0, below 1) to seconds.
Latency = Callable[[float], float]

_FORM = re.compile(r"\s*(lognormal|uniform|fixed)\s*\(([^()]*)\)\s*")
_NORMAL = NormalDist()


def parse_latency(text: str) -> Latency:
    """Parse `lognormal(median,sigma)`, `uniform(low,high)` or `fixed(seconds)`. Raises ValueError."""
    match = _FORM.fullmatch(text)
    try:
        name, values = (match[1], [float(value) for value in match[2].split(",")]) if match else ("", [])
    except ValueError:
        name, values = "", []
    match name, values:
        case "lognormal", [median, sigma] if median > 0 and sigma >= 0:
            return lambda draw: median * math.exp(sigma * _NORMAL.inv_cdf(draw))
        case "uniform", [low, high] if 0 <= low <= high:
            return lambda draw: low + (high - low) * draw
        case "fixed", [seconds] if seconds >= 0:
            return lambda _: seconds
    raise ValueError(f"latency {text!r} is none of lognormal(median,sigma), uniform(low,high), fixed(seconds)")
