"""Orchestration: one Prefect flow per DVC stage, and the tools that operate them.

Importing this package sets the environment variables that configure prefect, dvc, mlflow and ray, which they read when
they are imported. Variables that the user has set are kept, and this machine is added to NO_PROXY.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from dsd.data.proxies import exclude_loopback

if TYPE_CHECKING:
    from dsd.config import BackboneParams

DATA = Path("data")
SETTINGS = {
    "PREFECT_HOME": str(Path(".prefect").resolve()),
    "PREFECT_LOGGING_LEVEL": "WARNING",
    # An ephemeral server starts in 12 s on an idle machine; the default limit is 20 s.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "600",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLIENT_MAX_RETRIES": "1",  # after 2 s; by default a dead server costs a minute per request
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",  # it logs each event that a dead server does not receive
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # for a few kilobytes
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}

for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)
exclude_loopback()


def absolute(row: BackboneParams) -> BackboneParams:
    """A row of `backbones` with absolute paths; hub ids and absent files are unchanged."""
    values = {key: getattr(row, key) for key in ("source", "config", "lora")}
    return row.model_copy(update={k: str(Path(v).resolve()) for k, v in values.items() if v and Path(v).exists()})
