"""Run git and dvc."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dsd.errors import DsdError


def command(folder: Path, *words: str) -> str:
    """The output of a command run in a folder; a program of this environment comes first.

    Raises:
        DsdError: it is not installed, or it fails; with its last line of output.
    """
    own = Path(sys.executable).parent / words[0]
    try:
        done = subprocess.run(
            [str(own) if own.exists() else words[0], *words[1:]], cwd=folder, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise DsdError(f"{words[0]} is not installed") from None
    if done.returncode:
        raise DsdError(f"{folder.resolve()}: {' '.join(words[:2])}: {last_line(done.stderr)}")
    return done.stdout.strip()


def last_line(text: str) -> str:
    """The last line that is not blank, cut to 500 characters; "" if there is none."""
    return next((line.strip()[:500] for line in reversed(text.splitlines()) if line.strip()), "")


def commit(root: Path) -> str:
    """The Git commit of a workspace, with a plus if its code has uncommitted changes; "" outside of Git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "dsd", "flows", "dvc.yaml")
    return git("rev-parse", "HEAD") + ("+" if changed else "")
