"""Named settings of a shadow, from exact to light: points of the front that docs/benchmarks.md shows."""

from typing import Any

SHADOW_PRESETS: dict[str, dict[str, Any]] = {
    "exact": {"bits": 8, "top_k": None, "skip_layers": 0},
    "balanced": {"bits": 4, "top_k": None, "skip_layers": 0},
    "light": {"bits": 4, "top_k": 2, "skip_layers": 0},
}
"""Fields of the predictor's configuration that each one fills, where they are not given."""
