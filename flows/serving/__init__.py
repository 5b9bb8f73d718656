"""The champion over HTTP.

`Service` is exported here because the stored code of every registered version imports it from here.
"""

from flows.serving.service import Service

__all__ = ["Service"]
