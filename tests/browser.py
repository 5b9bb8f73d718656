"""Headless Chromium."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

QUIET = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "hide-scrollbars", "disable-sync"),
    *("disable-background-networking", "disable-component-update"),
)


def page_of(address: str, profile: Path, *flags: str) -> str:
    """The page at an address as the browser has built it; skips where there is no Chromium."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    options = [f"--{flag}" for flag in (*QUIET, *flags, f"user-data-dir={profile}", "dump-dom")]
    return subprocess.run([chromium, *options, address], capture_output=True, text=True, check=True, timeout=300).stdout
