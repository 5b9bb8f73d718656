"""dsd: text-to-image diffusion models as image-text matchers and classifiers, measured honestly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsd.matcher import Matcher

__version__ = "0.1.0"
__all__ = ["EMBEDDED", "Matcher"]

_HERE = Path(__file__).parent
# The embedded checkpoint: in the installed package, or in the clone of the repository.
EMBEDDED = next((place for place in (_HERE / "embedded", _HERE.parent / "models/embedded") if place.is_dir()), _HERE)


def __getattr__(name: str) -> Any:
    """Load torch at the first use of `Matcher`."""
    if name == "Matcher":
        from dsd.matcher import Matcher

        return Matcher
    raise AttributeError(f"module 'dsd' has no attribute {name!r}")
