"""The stores that a user can configure for MLflow and Prefect: their addresses, and whether they can be reached."""

from __future__ import annotations

import asyncio
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPException
from pathlib import Path

from sqlalchemy import URL, Connection, NullPool, create_engine, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine

from dsd.data.proxies import check_proxies
from dsd.errors import DsdError

MLFLOW, PREFECT, DATABASE = "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_API_DATABASE_CONNECTION_URL"
PARENT = "DSD_PARENT_RUN"  # the MLflow run of the attempt that a reproduction belongs to, set by the watch
SECONDS = 20  # to connect, MLflow's limit for SQLite
LOCK = 6_580_297  # the number of our advisory lock, which no other program takes in MLflow's database


def uri() -> str:
    """MLFLOW_TRACKING_URI, or this workspace's database; for PostgreSQL with the driver of the extra `postgres`."""
    address = os.environ.get(MLFLOW) or "sqlite:///mlflow.db"
    address = re.sub("^sqlite:///(?=[^/:])", f"sqlite:///{Path().resolve()}/", address)
    return re.sub("^postgresql:", "postgresql+psycopg2:", address)


def artifacts() -> Path:
    """The folder of MLflow's artifacts unless a server keeps them: next to the SQLite file, else in this workspace."""
    name = re.match(r"sqlite:///(.+)", uri())
    return (Path(name[1]).parent if name else Path()).resolve() / "mlartifacts"


def exists() -> bool:
    """Whether there is a tracking store; opening one creates a SQLite file, so what only reads asks first."""
    address = uri()
    if is_server(address):
        return True
    with store_errors(MLFLOW, address):
        url = make_url(address)
        return url.get_backend_name() != "sqlite" or _sqlite_exists(url)


def require_version(name: str) -> None:
    """Raise DsdError if nothing can be registered, because there is no tracking store."""
    if not exists():
        raise DsdError(f"{name}: no such version: {redacted(uri())} does not exist; `dsd promote` registers versions")


def is_server(address: str) -> bool:
    """Whether an address is that of a server, not of a database."""
    return re.match(r"(postgresql|mysql|mssql|sqlite)\b", address) is None


def redacted(address: str) -> str:
    """An address without the user and password in it."""
    return re.sub(r"(password=)[^&]*", r"\1***", re.sub(r"//.*@", "//***@", address))


@contextmanager
def store_errors(setting: str, address: str) -> Iterator[None]:
    """Turn the errors of a store's driver into a DsdError, in one line."""
    try:
        yield
    except (ImportError, SQLAlchemyError, OSError, ValueError) as error:
        raise store_error(setting, address, error) from None


def store_error(setting: str, address: str, error: BaseException) -> DsdError:
    """One line for an error of a store's driver: the setting, the address and the reason."""
    if isinstance(error, ImportError):
        extra = "install the extra `postgres`" if error.name == "psycopg2" else "install it"
        reason = f"its driver {error.name} is not installed; {extra}, or name another (dialect+driver://…)"
    elif isinstance(error, ArgumentError) or type(error) is ValueError:
        reason = "not the address of a database (dialect+driver://user:password@host:port/name)"
    else:
        cause = getattr(error, "orig", None) or error
        # The last line has the reason; the lines before it list the attempts, and hints start with a tab.
        lines = [line.strip() for line in str(cause).splitlines() if line.strip() and not line.startswith("\t")]
        reason = (lines or [type(cause).__name__])[-1][:200]
        if reason == "database is locked":
            reason += ": another program writes to it; stop that program, and run again"
    return DsdError(f"{setting}{'' if os.environ.get(setting) else ' (not set)'}: {redacted(address)}: {reason}")


def check(setting: str, address: str, seconds: int = SECONDS) -> None:
    """Check that a store can be reached, opened and written to; raise DsdError, in one line, if not."""
    if is_server(address):
        return _check_server(setting, address, seconds)
    with store_errors(setting, address):
        url = make_url(address)
        if setting == DATABASE and not url.get_dialect().is_async:
            line = "Prefect needs postgresql+asyncpg:// (or sqlite+aiosqlite://)"
            raise DsdError(f"{setting}: {redacted(address)}: {line}")
        if url.get_backend_name() == "sqlite" and not _sqlite_exists(url):
            return
        if url.get_dialect().is_async:
            try:
                asyncio.run(_check_async(url, seconds))
            except Exception as error:  # async drivers raise errors of their own
                raise store_error(setting, address, error) from None
        else:
            with _connection(url, seconds) as connection:
                _check_writable(connection)


def _check_server(setting: str, address: str, seconds: int) -> None:
    """Check that a server answers; any status will do, since the first request reports a missing permission."""
    if address.startswith("databricks"):  # the address is in a profile
        return
    if not address.startswith(("http://", "https://")):
        line = "neither a server (http://…) nor a database (postgresql://…)"
        raise DsdError(f"{setting}: {redacted(address)}: {line}")
    check_proxies()
    try:
        urllib.request.urlopen(re.sub("//[^/]*@", "//", address).rstrip("/") + "/health", timeout=seconds).close()
    except urllib.error.HTTPError:
        pass
    except (OSError, ValueError, HTTPException) as error:
        reason = f"no server answers ({getattr(error, 'reason', error)}); start it, or correct the address"
        raise DsdError(f"{setting}: {redacted(address)}: {reason}") from None


def _sqlite_exists(url: URL) -> bool:
    """Whether a SQLite file exists; raise OSError if it cannot be created either."""
    if not url.database or url.database == ":memory:":
        return True
    folder = Path(url.database).parent
    if not os.access(folder, os.W_OK):
        raise OSError(f"{folder}: not a writable folder")
    return Path(url.database).exists()


@contextmanager
def _connection(url: URL, seconds: int) -> Iterator[Connection]:
    limit = {"sqlite": "timeout", "postgresql": "connect_timeout"}.get(url.get_backend_name())
    engine = create_engine(url, poolclass=NullPool, connect_args={limit: seconds} if limit else {})
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        yield connection


def _check_writable(connection: Connection) -> None:
    """Check that a SQLite file is a database that can be written to; other databases check this on connecting."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("begin immediate")
        connection.exec_driver_sql("rollback")


async def _check_async(url: URL, seconds: int) -> None:
    engine = create_async_engine(url, poolclass=NullPool, connect_args={"timeout": seconds})
    async with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        await connection.run_sync(_check_writable)


@contextmanager
def exclusive(setting: str, address: str) -> Iterator[None]:
    """Hold our advisory lock of a PostgreSQL database, on which processes of all machines wait; check other stores."""
    if is_server(address) or not address.startswith("postgresql"):
        check(setting, address)
        yield
        return
    with ExitStack() as stack:
        with store_errors(setting, address):
            connection = stack.enter_context(_connection(make_url(address), SECONDS))
            connection.exec_driver_sql(f"select pg_advisory_lock({LOCK})")
        yield
