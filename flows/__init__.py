"""The orchestration: one flow a DVC stage, and what runs over all of them.

Importing it puts the settings of prefect, dvc, mlflow and ray into the environment, where each looks while it is
imported itself; what a user has set stays as it is.
"""

from __future__ import annotations

import os
from pathlib import Path

DATA = Path("data")
SETTINGS = {
    "PREFECT_HOME": str(Path(".prefect").resolve()),
    "PREFECT_LOGGING_LEVEL": "WARNING",
    # A server that a stage starts for itself takes 12 s on an idle machine; the default limit is 20 s.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "600",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # of a few kilobytes
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}

for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)
