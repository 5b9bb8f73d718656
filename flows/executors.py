"""The executor of the shards of a stage: its own process, or actors of a Ray cluster.

Actors compute the missing shards first. Then the stage runs as usual and reads them from its store. A shard is named by
its key and written atomically, so a shard that is computed twice, because an actor died, is stored once.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dsd.config import RuntimeParams
from dsd.errors import DsdError, brief
from dsd.progress import progress

CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # on every system; without clusters ray listens on loopback alone
RETRIES = 3  # of a shard whose actor has died
CODE = Path(__file__).resolve().parent.parent  # the import path of the actors


class Worker(Protocol):
    """Computes shards by their keys: `dsd.engine.cache.Worker`, `dsd.engine.score.Worker`."""

    @property
    def shards(self) -> Container[str]:
        """The keys of all shards of the stage."""
        ...

    def __call__(self, key: str) -> None: ...


class Actor:
    """A worker in a process of its own, in the stage's workspace and with a share of a machine's cores.

    User errors are returned as part of the result: Ray would wrap an exception.
    """

    def __init__(self, open_worker: Callable[[], Worker], workspace: str, threads: int) -> None:
        self._open_worker, self._workspace, self._threads = open_worker, workspace, threads
        self._worker: Worker | None = None

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
        key, problem = str(batch["key"][0]), ""
        try:
            self._compute(key)
        except DsdError as error:
            problem = str(error)
        return {"key": [key], "error": [problem]}

    def _compute(self, key: str) -> None:
        place = f"{socket.gethostname()}: {self._workspace}"
        if self._worker is None:
            import torch

            torch.set_num_threads(self._threads)
            if not Path(self._workspace).is_dir():
                raise DsdError(f"{place}: no such folder; all machines need the workspace under one path")
            os.chdir(self._workspace)  # paths in params are relative to it
            self._worker = self._open_worker()
        if key not in self._worker.shards:
            raise DsdError(f"{place}: has other shards; all machines need the same data, checkpoints and code")
        self._worker(key)


class Node(NamedTuple):
    cores: int
    gpus: int


def compute(missing: Mapping[str, int], open_worker: Callable[[], Worker], runtime: RuntimeParams, title: str) -> int:
    """Compute the missing shards, given with their numbers of rows, on a Ray cluster; return the total of rows.

    Raises:
        DsdError: a user error, here or in an actor; ray is not installed; no cluster, or one without enough room.
    """
    if not missing:
        return 0
    ray = cluster()
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [Node(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in resources]
    gpu = runtime.device != "cpu" and any(node.gpus for node in nodes)
    actors = min(runtime.actors, len(missing))
    threads = share(nodes, actors, gpu)
    shards = ray.data.from_items([{"key": key} for key in missing], override_num_blocks=len(missing))
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # about max_task_retries
        results = shards.map_batches(
            Actor,
            fn_constructor_args=(open_worker, str(Path.cwd()), threads),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
            num_cpus=threads,
            num_gpus=int(gpu),
            max_task_retries=RETRIES,
        )
    bar = progress(total=sum(missing.values()), desc=title, unit="row", unit_scale=True)
    try:
        for result in results.iter_rows():
            if result["error"]:
                raise DsdError(result["error"])
            bar.update(missing[result["key"]])
    except ray.exceptions.RayActorError as error:
        reason = brief(error, 300)
        line = f"{title}: actors keep dying, {RETRIES + 1} times at one shard or at startup: {reason}"
        raise DsdError(line) from None
    finally:
        bar.close()
    return sum(missing.values())


def share(nodes: Sequence[Node], actors: int, gpu: bool) -> int:
    """The most cores that every actor can have, on one node and, if `gpu`, with a GPU of its own."""
    for cores in range(max((node.cores for node in nodes), default=0), 0, -1):
        if room(nodes, cores, gpu) >= actors:
            return cores
    raise DsdError(
        f"runtime.actors: the Ray cluster has room for {room(nodes, 1, gpu)}, not for {actors}: "
        f"{'a GPU and a core' if gpu else 'a core'} for each"
    )


def room(nodes: Sequence[Node], cores: int, gpu: bool) -> int:
    """The number of actors with this many cores that fit on the nodes."""
    return sum(min(node.cores // cores, node.gpus) if gpu else node.cores // cores for node in nodes)


def cluster() -> Any:
    """The package ray, connected to the cluster at RAY_ADDRESS, else to a local one that stops with this process.

    A local one listens on 127.0.0.1 alone.

    Raises:
        DsdError: ray is not installed, or there is no such cluster.
    """
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":  # else it listens on all interfaces; ray reads this when it is imported
        os.environ.setdefault(CLUSTERS, "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise DsdError("runtime.executor: ray is not installed; pip install 'dsd[ray]', or use local") from None
    if ray.is_initialized():
        return ray
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if address not in ("local", "auto"):
        probe(address)
    paths = os.pathsep.join(filter(None, (str(CODE), os.environ.get("PYTHONPATH"))))
    ray.init(
        address=address,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
        include_dashboard=False if address == "local" else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    return ray


def probe(address: str) -> None:
    """Check that a cluster answers: Ray itself takes minutes to time out."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError):
        line = f"RAY_ADDRESS: no Ray cluster answers at {address}; give HOST:PORT of its first machine"
        raise DsdError(line) from None
