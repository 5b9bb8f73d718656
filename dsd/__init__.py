"""dsd: text-to-image diffusion models as image-text matchers and classifiers, measured honestly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsd.matcher import Matcher

__version__ = "0.1.0"
__all__ = ["Matcher"]


def __getattr__(name: str) -> Any:
    """Load torch at the first use of `Matcher`."""
    if name == "Matcher":
        from dsd.matcher import Matcher

        return Matcher
    raise AttributeError(f"module 'dsd' has no attribute {name!r}")
