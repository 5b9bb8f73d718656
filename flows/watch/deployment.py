"""The Prefect flows of the watch and of the gate, and the deployment of the watch."""

from __future__ import annotations

import os
from pathlib import Path

from prefect import flow
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Failed, State

from dsd.config import load
from dsd.errors import DsdError, brief
from flows.stores import PREFECT, check
from flows.watch.tick import Work, tick

NAME = "watch"
# A run that is due while another one runs is cancelled: nothing new is left for it.
ALONE = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)


@flow(name=NAME, persist_result=False)
def watch() -> State:
    """Run one tick, with a subflow for each checkpoint that it evaluates.

    The state has the report, and is failed if a checkpoint or a source failed.
    """
    report = tick(subflow)
    print("\n".join(report.lines), flush=True)
    return (Failed if report.failed else Completed)(message="; ".join(report.lines))


def subflow(name: str, work: Work) -> None:
    """Run the evaluation of a checkpoint as a flow run of its name; the state has the reason if it has failed."""
    reasons: list[str] = []

    @flow(name="evaluate", flow_run_name=name, persist_result=False)
    def evaluate() -> State:
        reasons.append(work())
        return Failed(message=reasons[0]) if reasons[0] else Completed()

    state = evaluate(return_state=True)
    if not reasons:
        state.result()  # raises what the work has raised


@flow(name="promote", persist_result=False)
def promote() -> State:
    """Run `dsd promote` as the last step of a pipeline; the state has the verdict and the reason."""
    from flows.registry.promote import register_and_judge  # it imports altair, which few ticks need

    version, verdict = register_and_judge(load())
    word = "promoted" if verdict.promoted else "not promoted"
    return Completed(message=f"version {version.number}: {word}: {verdict.reason}")


def serve(cron: str) -> None:
    """Run ticks in subprocesses until this process is stopped."""
    watch.serve(name=NAME, cron=cron, global_limit=ALONE, print_starting_message=False)


def deploy(cron: str, pool: str) -> str:
    """Deploy the watch of this workspace to a work pool; return the name of the deployment.

    Raises:
        DsdError: the server at PREFECT_API_URL does not answer, or has no such pool.
    """
    check(PREFECT, os.environ[PREFECT])
    here = watch.from_source(source=str(Path().resolve()), entrypoint="flows/watch/deployment.py:watch")
    try:
        here.deploy(
            name=NAME,
            work_pool_name=pool,
            cron=cron,
            concurrency_limit=ALONE,
            print_next_steps=False,
            ignore_warnings=True,  # it recommends `serve` for local code
        )
    except (ObjectNotFound, ValueError) as error:
        raise DsdError(f"--pool {pool}: {brief(error, 200)}") from None
    return f"{NAME}/{NAME}"
