"""What Prefect runs of the registry: the watch at its times, here or in a work pool, and the gate where one asks."""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Failed, State

from dsd.config import load
from dsd.errors import DsdError
from flows.watch.tick import tick

NAME = "watch"
# A tick that comes while another is at work would find nothing to do when that has ended.
ALONE = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)


@flow(name=NAME, persist_result=False)
def watch() -> State:
    """One tick; its state says what came of it, and fails where a checkpoint or a source did."""
    told = tick()
    print("\n".join(told.lines), flush=True)
    return (Failed if told.failed else Completed)(message="; ".join(told.lines))


@flow(name="promote", persist_result=False)
def promote() -> State:
    """`dsd promote` as a flow, for a pipeline that ends with it; its state has the verdict and the reason."""
    from flows.registry.promote import promote as enter  # it loads what draws, which few ticks need

    version, verdict, _ = enter(load())
    word = "promoted" if verdict.promoted else "not promoted"
    return Completed(message=f"version {version.number}: {word}: {verdict.reason}")


def serve(cron: str) -> None:
    """Ticks in processes that this one starts, until it is ended."""
    watch.serve(name=NAME, cron=cron, global_limit=ALONE, print_starting_message=False)


def deploy(cron: str, pool: str) -> str:
    """Enters the watch of this workspace into a work pool, whose workers tick here; returns the deployment's name.

    Raises:
        DsdError: there is no such pool.
    """
    here = watch.from_source(source=str(Path().resolve()), entrypoint="flows/watch/deployment.py:watch")
    try:
        here.deploy(
            name=NAME,
            work_pool_name=pool,
            cron=cron,
            concurrency_limit=ALONE,
            print_next_steps=False,
            ignore_warnings=True,  # that one might as well serve it
        )
    except (ObjectNotFound, ValueError) as error:
        raise DsdError(f"--pool {pool}: {' '.join(str(error).split())[:200]}") from None
    return f"{NAME}/{NAME}"
