"""The stores that a user may name: where MLflow's and Prefect's are, and whether they can be reached."""

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

from dsd.errors import DsdError

MLFLOW, PREFECT, DATABASE = "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_API_DATABASE_CONNECTION_URL"
SECONDS = 20  # that a connection may take, as MLflow has it for SQLite
LOCK = 6_580_297  # PostgreSQL numbers its advisory locks; this one is of nobody else's in MLflow's database


def uri() -> str:
    """MLFLOW_TRACKING_URI, or the database of this workspace; of PostgreSQL by the driver that the extra installs."""
    named = os.environ.get(MLFLOW) or f"sqlite:///{Path('mlflow.db').resolve()}"
    return re.sub("^postgresql:", "postgresql+psycopg2:", named)


def artifacts() -> Path:
    """Where MLflow's artifacts go unless a server keeps them: beside the SQLite file, else in this workspace."""
    name = re.match(r"sqlite:///(.+)", uri())
    return (Path(name[1]).parent if name else Path()).resolve() / "mlartifacts"


def served(address: str) -> bool:
    """Whether it is a server's address, and no database's."""
    return re.match(r"(postgresql|mysql|mssql|sqlite)\b", address) is None


def shown(address: str) -> str:
    """An address without the name and password in it."""
    return re.sub(r"(password=)[^&]*", r"\1***", re.sub(r"//.*@", "//***@", address))


@contextmanager
def told(setting: str, address: str) -> Iterator[None]:
    """What keeps a store from us, as one line.

    Raises:
        DsdError: it cannot be reached, opened or written to.
    """
    try:
        yield
    except (ImportError, SQLAlchemyError, OSError, ValueError) as error:
        raise refusal(setting, address, error) from None


def refusal(setting: str, address: str, error: BaseException) -> DsdError:
    """The line for what a store's driver raised: the setting, what it says, and why that will not do."""
    if isinstance(error, ImportError):
        extra = "install the extra `postgres`" if error.name == "psycopg2" else "install it"
        reason = f"its driver {error.name} is not installed; {extra}, or name another (dialect+driver://…)"
    elif isinstance(error, ArgumentError) or type(error) is ValueError:
        reason = "no address of a database (dialect+driver://user:password@host:port/name)"
    else:
        cause = getattr(error, "orig", None) or error
        # The last word of a driver: what comes before it is where it tried, and a hint begins with a tab.
        lines = [line.strip() for line in str(cause).splitlines() if line.strip() and not line.startswith("\t")]
        reason = (lines or [type(cause).__name__])[-1][:200]
        reason += ": another program writes to it; end that, and run again" if reason == "database is locked" else ""
    return DsdError(f"{setting}{'' if os.environ.get(setting) else ' (not set)'}: {shown(address)}: {reason}")


def reach(setting: str, address: str, seconds: int = SECONDS) -> None:
    """Asks a store for a word, which changes nothing in it.

    Raises:
        DsdError: see `told`.
    """
    if served(address):
        return _answers(setting, address, seconds)
    with told(setting, address):
        url = make_url(address)
        if setting == DATABASE and not url.get_dialect().is_async:
            raise DsdError(f"{setting}: {shown(address)}: Prefect needs postgresql+asyncpg:// (or sqlite+aiosqlite://)")
        if url.get_backend_name() == "sqlite" and not _is_there(url):
            return
        if url.get_dialect().is_async:
            try:
                asyncio.run(_asked(url, seconds))
            except Exception as error:  # what an async driver raises comes as it is
                raise refusal(setting, address, error) from None
        else:
            with _connected(url, seconds) as connection:
                _written(connection)


def _answers(setting: str, address: str, seconds: int) -> None:
    """Any answer will do: whether we may come in, the first request tells."""
    if address.startswith("databricks"):  # whose address is in a profile of its own
        return
    if not address.startswith(("http://", "https://")):
        raise DsdError(f"{setting}: {shown(address)}: neither a server (http://…) nor a database (postgresql://…)")
    try:
        urllib.request.urlopen(re.sub("//[^/]*@", "//", address).rstrip("/") + "/health", timeout=seconds).close()
    except urllib.error.HTTPError:
        pass
    except (OSError, ValueError, HTTPException) as error:
        reason = f"no server answers there ({getattr(error, 'reason', error)}); start it, or correct the address"
        raise DsdError(f"{setting}: {shown(address)}: {reason}") from None


def _is_there(url: URL) -> bool:
    """Whether a SQLite file is there; one that is not will be made where there is a folder for it.

    Raises:
        OSError: there is none, or nothing may be written there.
    """
    if not url.database or url.database == ":memory:":
        return True
    folder = Path(url.database).parent
    if not os.access(folder, os.W_OK):
        raise OSError(f"{folder}: no folder that one may write to")
    return Path(url.database).exists()


@contextmanager
def _connected(url: URL, seconds: int) -> Iterator[Connection]:
    limit = {"sqlite": "timeout", "postgresql": "connect_timeout"}.get(url.get_backend_name())
    engine = create_engine(url, poolclass=NullPool, connect_args={limit: seconds} if limit else {})
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        yield connection


def _written(connection: Connection) -> None:
    """Of SQLite, which lets anyone in, whether it is a database, and whether one may write to it."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("begin immediate")
        connection.exec_driver_sql("rollback")


async def _asked(url: URL, seconds: int) -> None:
    engine = create_async_engine(url, poolclass=NullPool, connect_args={"timeout": seconds})
    async with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        await connection.run_sync(_written)


@contextmanager
def alone(setting: str, address: str) -> Iterator[None]:
    """Within the block no other process that asks for this, on any machine, is at this PostgreSQL database.

    Of what is not PostgreSQL only whether it can be reached is found out.

    Raises:
        DsdError: see `told`.
    """
    if served(address) or not address.startswith("postgresql"):
        reach(setting, address)
        yield
        return
    with ExitStack() as stack:
        with told(setting, address):
            connection = stack.enter_context(_connected(make_url(address), SECONDS))
            connection.exec_driver_sql(f"select pg_advisory_lock({LOCK})")
        yield
