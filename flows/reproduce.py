"""The whole reproduction: `dvc repro` under one Prefect server, then MLflow, then where the report is."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from dvc.exceptions import DvcException, ReproductionError
from dvc.repo import Repo
from dvc.stage.exceptions import StageCmdFailedError

from dsd.errors import DsdError
from dsd.params import load

DATA = Path("data")
REPORT = DATA / "report" / "index.html"
STARTUP_SECONDS = 120
