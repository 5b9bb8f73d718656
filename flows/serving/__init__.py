"""The champion over HTTP.

`Service` is exported here because the code of every registered version imports it from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows.serving.server import Service

__all__ = ["Service"]


def __getattr__(name: str) -> Any:
    if name == "Service":
        from flows.serving.server import Service

        return Service
    raise AttributeError(f"module 'flows.serving' has no attribute {name!r}")
