"""Actors compute the same bytes as the local executor, whichever of them dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsd.config import Params
from dsd.engine import cache as encoding
from dsd.engine import score as scoring
from dsd.engine.session import Folders, Session
from dsd.errors import CheckpointError, DsdError
from dsd.evaluation.evaluate import Results, ScoredSplit, evaluate
from dsd.models import load
from dsd.scorers.evidence import INDEX
from dsd.store import Store
from dsd.training.loop import train, trainings
from flows.executors import Actor, Node, compute, probe, share
from flows.failures import error_line
from tests.conftest import ROOT, shard_keys
from tests.workers import Deadly, Defective, Dies, Stubborn

NAME = "scenes-com"


@pytest.fixture(scope="module")
def lean(params: Params) -> Params:
    """Without the tuned CLIPs, which no test here needs."""
    methods = {name: row for name, row in params.methods.items() if name not in ("clip-finetune", "clip-prompt")}
    training = {"dsd": params.training["dsd"]}
    return params.model_copy(update={"methods": methods, "training": training})


@pytest.fixture(scope="module")
def folders(lean: Params, prepared: Path, cached: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A small scenes-com, prepared, encoded and trained on."""
    stages = Folders(prepared, cached, tmp_path_factory.mktemp("trained"))
    for training in trainings(lean):
        list(train(Session(NAME, lean, stages), training))
    return stages


@pytest.fixture(scope="module")
def local(lean: Params, folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its evidence, as the local executor leaves it."""
    target = tmp_path_factory.mktemp("local")
    scored(lean, folders, target)
    return target


def scored(lean: Params, folders: Folders, target: Path) -> dict[str, Any]:
    return scoring.score(Session(NAME, lean, folders), target, split="test")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lacking(lean: Params, folders: Folders, target: Path) -> dict[str, int]:
    return scoring.missing(Session(NAME, lean, folders), target, split="test")


def worker(lean: Params, folders: Folders, target: Path, cores: int = 2) -> scoring.Worker:
    return scoring.Worker(Session(NAME, lean, folders, cores=cores), target, split="test")


def test_nothing_is_missing_of_what_was_computed(lean: Params, folders: Folders, local: Path, tmp_path: Path) -> None:
    missing = lacking(lean, folders, tmp_path)
    counts = scored(lean, folders, local)
    assert sum(missing.values()) == counts["rows"] > 0 == counts["computed"]
    assert lacking(lean, folders, local) == {}
    assert encoding.missing(Session(NAME, lean, folders)) == {}


def test_a_truncated_shard_is_missing(lean: Params, folders: Folders, tmp_path: Path) -> None:
    key, *_ = lacking(lean, folders, tmp_path)
    worker(lean, folders, tmp_path)(key)
    assert key not in lacking(lean, folders, tmp_path)
    file = tmp_path / f"{key}.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert key in lacking(lean, folders, tmp_path)


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_two_workers_leave_what_the_local_path_leaves(
    data: st.DataObject, lean: Params, folders: Folders, local: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In any order, each shard by either of them or by both."""
    target = tmp_path_factory.mktemp("filled")
    both = [worker(lean, folders, target) for _ in range(2)]
    for key in data.draw(st.permutations(list(lacking(lean, folders, target)))):
        for number in data.draw(st.sampled_from([(0,), (1,), (0, 1)])):
            both[number](key)
    counts = scored(lean, folders, target)
    assert counts["computed"] == 0
    assert content(target) == content(local)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_evidence_is_the_same_to_the_bit_on_any_share_of_the_cores(
    threads: int, lean: Params, folders: Folders, tmp_path: Path
) -> None:
    """Batches are cut as in the process whose cores are shared."""
    before, kept = torch.get_num_threads(), {}
    runtime = lean.runtime.model_copy(update={"batch_size": 6})  # 16 rows on two cores: 4 + 4 + 4 + 4, not 5 + 5 + 6
    odd = lean.model_copy(update={"runtime": runtime})
    try:
        for count in (2, threads):
            torch.set_num_threads(count)
            target = tmp_path / str(count)
            some = worker(odd, folders, target)
            for key in [key for key, rows in lacking(odd, folders, target).items() if rows == 16][-3:]:
                some(key)
            kept[count] = content(target)
    finally:
        torch.set_num_threads(before)
    assert kept[2] == kept[threads]


def test_the_cache_is_filled_shard_by_shard(lean: Params, prepared: Path, cached: Path, tmp_path: Path) -> None:
    def opened() -> Session:
        return Session(NAME, lean, Folders(prepared, tmp_path, tmp_path))

    missing, some = encoding.missing(opened()), encoding.Worker(opened())
    for key in reversed(missing):
        some(key)
    assert encoding.encode(opened())["images"] * 2 <= sum(missing.values())
    assert {key for key in shard_keys(Store(cached)) if not key.startswith("evidence")} == set(missing)
    assert all((tmp_path / f"{key}.json").read_bytes() == (cached / f"{key}.json").read_bytes() for key in missing)


def test_a_full_cache_opens_no_model(
    lean: Params, prepared: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsd.models import clip, stable_diffusion

    for module in (clip, stable_diffusion):
        for name in ("component", "tokenizer"):
            monkeypatch.setattr(module, name, pytest.fail)
    session = Session(NAME, lean, Folders(prepared, cached, prepared))
    assert encoding.missing(session) == {}
    assert all(key in encoding.Worker(session).shards for key in shard_keys(Store(cached)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["embedded", "embedded-clip"])
def test_the_digest_of_a_backbone_is_known_before_it_is_open(name: str, dtype: str, lean: Params) -> None:
    row = lean.backbones[name].model_copy(update={"dtype": dtype})
    assert load(row, torch.device("cpu"), lazy=True).digest == load(row, torch.device("cpu")).digest


def test_a_prompt_that_was_not_trained_is_one_line(lean: Params, folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file; train an attention prompt") as error:
        lacking(lean, folders._replace(trained=tmp_path), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("nodes", "actors", "gpu", "cores"),
    [
        ([Node(2, 0)], 2, False, 1),
        ([Node(2, 0), Node(2, 0), Node(2, 0)], 3, False, 2),
        ([Node(3, 0)] * 4, 6, False, 1),  # two cores each would leave two actors without a place
        ([Node(0, 0), Node(16, 4)], 4, True, 4),
        ([Node(16, 0), Node(8, 2)], 2, True, 4),
    ],
)
def test_actors_share_the_cores(nodes: list[Node], actors: int, gpu: bool, cores: int) -> None:
    assert share(nodes, actors, gpu) == cores


@pytest.mark.parametrize(
    ("gpu", "room"), [(False, "2, not for 3: a core for each"), (True, "1, not for 3: a GPU and a core for each")]
)
def test_a_cluster_without_room_is_one_line(gpu: bool, room: str) -> None:
    with pytest.raises(DsdError, match=rf"^runtime\.actors: the Ray cluster has room for {room}$"):
        share([Node(2, 1)], 3, gpu)


def test_a_missing_package_is_one_line(lean: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DsdError, match=r"^runtime\.executor: .* pip install 'dsd\[ray\]', or use local$"):
        compute({"key": 1}, pytest.fail, lean.runtime, "score")
    assert compute({}, pytest.fail, lean.runtime, "score") == 0  # nothing to do needs none


def test_an_actor_returns_user_errors_and_works_in_the_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path.parent)
    threads = torch.get_num_threads()
    actor = Actor(Stubborn, str(tmp_path), threads)
    assert actor({"key": ["known"]}) == {"key": ["known"], "error": ["model.safetensors: cut short"]}
    assert Path.cwd() == tmp_path
    (other,) = actor({"key": ["unknown"]})["error"]
    assert other.endswith("all machines need the same data, checkpoints and code")
    (absent,) = Actor(Stubborn, str(tmp_path / "absent"), threads)({"key": ["known"]})["error"]
    assert absent.endswith("absent: no such folder; all machines need the workspace under one path")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A Ray cluster of a head node without cores and two nodes with a core each."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        started.add_node(num_cpus=1)
    started.wait_for_nodes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", started.address)
        yield started
        sys.modules["ray"].shutdown()
    started.shutdown()


@pytest.mark.ray
@pytest.mark.parametrize("when", ["within", "after"])
def test_a_killed_actor_costs_nothing_but_its_work(
    when: str, nodes: Any, lean: Params, folders: Folders, local: Path, tmp_path: Path
) -> None:
    target, marker = tmp_path / "scored", tmp_path / "marker"
    missing = lacking(lean, folders, target)

    def opened() -> Dies:
        return Dies(Session(NAME, lean, folders, cores=2), target, split="test", marker=marker, when=when)

    assert compute(missing, opened, lean.runtime, "score") == sum(missing.values())
    assert marker.exists()
    assert lacking(lean, folders, target) == {}
    counts = scored(lean, folders, target)
    assert (counts["computed"], counts["corrupt"]) == (0, 0)
    shards = [key for keys in json.loads((target / INDEX).read_text())["shards"].values() for key in keys]
    assert len(shards) == len(set(shards))
    assert content(target) == content(local)
    assert results(lean, folders, local, tmp_path) == results(lean, folders, target, tmp_path)


def results(lean: Params, folders: Folders, target: Path, folder: Path) -> Results:
    split = ScoredSplit.of(NAME, lean, folders.prepared, target)
    return evaluate(NAME, split, lean.evaluate, lean.seed, folder).results


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "ray://127.0.0.1:1"])
def test_a_cluster_that_does_not_answer_is_one_line(address: str) -> None:
    with pytest.raises(DsdError, match=rf"^RAY_ADDRESS: no Ray cluster answers at {address}; give HOST:PORT of its"):
        probe(address)


LOCAL = """
import psutil
from flows.executors import cluster
ray = cluster()
assert ray.get(ray.remote(num_cpus=0)(lambda: 1).remote()) == 1
own = psutil.Process()
listening = [
    connection.laddr.ip
    for process in (own, *own.children(recursive=True))
    for connection in process.net_connections("inet")
    if connection.status == psutil.CONN_LISTEN
]
print(*{address.removeprefix("::ffff:") for address in listening})
"""


@pytest.mark.ray
def test_a_local_cluster_listens_on_loopback_alone(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}  # ray writes a token there
    command = [sys.executable, "-c", LOCAL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout.split() == ["127.0.0.1"]


@pytest.mark.ray
def test_a_user_error_in_an_actor_is_raised_by_the_stage(nodes: Any, lean: Params) -> None:
    with pytest.raises(DsdError, match=r"^model\.safetensors: cut short$"):
        compute({"known": 1}, Stubborn, lean.runtime, "score")


@pytest.mark.ray
def test_a_shard_that_kills_its_actors_is_given_up(nodes: Any, lean: Params) -> None:
    with pytest.raises(DsdError, match=r"^score: actors keep dying, 4 times") as error:
        compute({"known": 1}, Deadly, lean.runtime, "score")
    assert "\n" not in str(error.value)


@pytest.mark.ray
def test_a_defect_is_no_user_error(nodes: Any, lean: Params) -> None:
    with pytest.raises(Exception, match="ZeroDivisionError") as error:
        compute({"known": 1}, Defective, lean.runtime, "score")
    assert error_line(error.value) is None
