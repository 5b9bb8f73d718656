"""A PostgreSQL server on a free port of this machine, for the time of the tests."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psycopg2
import pytest

from flows.process import die_with_parent

USER, PASSWORD = "dsd", "s3cret"  # whoever may log in, and make databases


class Postgres:
    """A running server; `postgres()` is the URL of a new, empty database on it."""

    def __init__(self, port: int) -> None:
        self.port, self._names = port, (f"dsd_{number}" for number in count())

    def __call__(self) -> str:
        name = next(self._names)
        connection = psycopg2.connect(self.url("postgres"))
        connection.autocommit = True  # no database is made within a transaction
        with connection.cursor() as cursor:
            cursor.execute(f"create database {name}")
        connection.close()
        return self.url(name)

    def url(self, name: str, *, password: str = PASSWORD) -> str:
        """The URL of a database that is there or not."""
        return f"postgresql://{USER}:{password}@127.0.0.1:{self.port}/{name}"


def programs() -> Path:
    """The folder of the newest PostgreSQL that is installed; where there is none the test is skipped."""
    versions = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    found = max(versions, key=lambda path: int(path.parent.parent.name), default=None) or shutil.which("initdb")
    if found is None:
        pytest.skip("no PostgreSQL is installed (Debian's package: postgresql)")
    return Path(found).resolve().parent


@contextmanager
def serving() -> Iterator[Postgres]:
    """It ends, and all that it holds is gone, with the block; or with this process, should that be killed."""
    bin = programs()
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # not below pytest's own, which no other user may enter
    user = {}
    if os.geteuid() == 0:  # as whom PostgreSQL refuses to run
        user = {"user": "postgres", "group": "postgres", "extra_groups": []}
        shutil.chown(folder, "postgres", "postgres")
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    data = folder / "data"
    login = ["--auth=scram-sha-256", f"--username={USER}", f"--pwfile={folder / 'password'}"]
    process = None
    try:
        subprocess.run(
            [bin / "initdb", "-D", data, "--encoding=UTF8", "--no-locale", "--no-sync", *login],
            cwd=folder, check=True, stdout=subprocess.DEVNULL, **user,
        )  # fmt: skip
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [bin / "postgres", "-D", data, "-p", str(port), *options],
                cwd=folder, stdout=log, stderr=log, preexec_fn=die_with_parent, **user,
            )  # fmt: skip
        wait(process, port, folder / "log")
        yield Postgres(port)
    finally:
        if process is not None:
            process.send_signal(signal.SIGINT)  # without waiting for whoever is still connected
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Returns when the server takes connections."""
    while process.poll() is None:
        try:
            return psycopg2.connect(Postgres(port).url("postgres")).close()
        except psycopg2.OperationalError:
            time.sleep(0.05)
    raise RuntimeError(log.read_text())
