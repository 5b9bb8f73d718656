"""Shards survive kills, damage, full disks and each other."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import BaseModel

from dsd import store as store_module
from dsd.errors import DsdError
from dsd.store import DTYPES, Store, digest, file_digest, libraries, write_atomic
from tests.conftest import shard_keys

Arrays = dict[str, np.ndarray]

ARRAYS: Arrays = {"latents": np.arange(24, dtype=np.float32).reshape(6, 4), "ids": np.arange(6)}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "shards")


def same(a: Arrays | None, b: Arrays) -> bool:
    return a is not None and a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


class Model(BaseModel):
    rate: float
    levels: tuple[float, ...]


@dataclass(frozen=True)
class Record:
    rate: float
    inner: Model


def test_digest_is_of_the_content() -> None:
    assert digest({"a": 1, "b": [1.5, None]}) == digest({"b": (1.5, None), "a": 1})
    assert digest(0.1 + 0.2) != digest(0.3)
    assert digest(Model(rate=0.1, levels=(0.2,))) == digest({"rate": 0.1, "levels": [0.2]})
    inner = Model(rate=0.1, levels=())
    assert digest(Record(0.5, inner)) == digest({"rate": 0.5, "inner": inner})
    assert digest(np.float64(0.5), np.int32(3)) == digest(0.5, 3)
    assert len({digest(part) for part in (1, 1.0, True, "1", None, [1], {"1": 1}, float("inf"))}) == 8
    assert digest("a", "b") != digest("ab") != digest(["a", "b"])
    # Golden: a digest that moves makes every stored shard unreachable.
    assert (
        digest("latents", {"seed": 0, "level": 0.4})
        == hashlib.sha256(b'["latents",{"level":0.4,"seed":0}]').hexdigest()[:32]
    )


@pytest.mark.parametrize("part", [Path("a"), {"x": PurePosixPath("a")}, {1: 2}, {1, 2}, b"x", np.zeros(2), object()])
def test_digest_refuses_what_is_no_content(part: object) -> None:
    with pytest.raises(TypeError):
        digest(part)


def test_file_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_write_atomic_keeps_the_old_content_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sub" / "file"
    write_atomic(path, b"old")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_a_full_disk_is_one_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DsdError, match=r"shards: disk full, a\.safetensors needs \d+ bytes, \d+ are free") as caught:
        store.write("a", ARRAYS)
    assert "\n" not in str(caught.value)
    assert list(store.root.iterdir()) == [] and "a" not in store


def test_other_failures_to_write_are_not_dressed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="input/output"):
        write_atomic(tmp_path / "file", b"data")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.sampled_from(DTYPES).flatmap(
            lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
        ),
        max_size=3,
    )
)
def test_round_trip(tmp_path: Path, arrays: Arrays) -> None:
    arrays.pop("__metadata__", None)
    store = Store(tmp_path / "round")
    store.write("k", arrays)
    back = store.read("k")
    assert back is not None and back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()


def test_memory_layout_does_not_matter(store: Store) -> None:
    array = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    views = {
        "t": array.T,
        "step": array[:, ::2],
        "back": array[::-1],
        "big": array.astype(">i4"),
        "f": np.asfortranarray(array),
    }
    store.write("a", views)
    assert same(store.read("a"), views)
    store.write("b", {name: np.array(view, order="C") for name, view in reversed(views.items())})
    assert (store.root / "a.safetensors").read_bytes() == (store.root / "b.safetensors").read_bytes()
    assert (store.root / "a.json").read_bytes() == (store.root / "b.json").read_bytes()


def test_what_would_not_come_back_is_refused(store: Store) -> None:
    for array in (np.array(["text"]), np.array([None]), np.zeros(2, np.complex128)):
        with pytest.raises(ValueError, match="array 'x' is"):
            store.write("a", {"x": array})
    assert not store.root.exists()


def test_absent_then_present(store: Store) -> None:
    assert store.read("a") is None and "a" not in store and shard_keys(store) == [] and store.prune(set()) == 0
    store.write("a", ARRAYS)
    store.write("a.b-c_1", ARRAYS)
    assert "a" in store and shard_keys(store) == ["a", "a.b-c_1"]
    assert same(store.read("a"), ARRAYS) and same(Store(store.root).read("a.b-c_1"), ARRAYS)
    store.write("a", {"other": np.ones(1)})
    assert same(store.read("a"), {"other": np.ones(1)})
    assert store.corrupt == 0


@pytest.mark.parametrize("key", ["", "../a", "a/b", "a\\b", "a b", "a\n", "é", "a\0"])
def test_keys_cannot_leave_the_folder(store: Store, key: str) -> None:
    for use in (store.read, lambda key: store.write(key, ARRAYS)):
        with pytest.raises(ValueError, match="key"):
            use(key)
    assert key not in store


def test_a_kill_between_file_and_manifest_leaves_the_shard_absent(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def killed_at_manifest(source: Path, target: Path) -> None:
        if str(target).endswith(".json"):
            raise KeyboardInterrupt
        replace(source, target)

    store.write("a", {"x": np.zeros(3)})
    monkeypatch.setattr(os, "replace", killed_at_manifest)
    with pytest.raises(KeyboardInterrupt):
        store.write("a", ARRAYS)
    assert (store.root / "a.safetensors").exists()
    assert "a" not in store and store.read("a") is None and shard_keys(store) == [] and store.corrupt == 0
    monkeypatch.undo()
    store.write("a", ARRAYS)
    assert same(store.read("a"), ARRAYS)


def flip_a_byte(root: Path) -> None:
    data = bytearray((root / "a.safetensors").read_bytes())
    data[-1] ^= 1
    (root / "a.safetensors").write_bytes(data)


def truncate(root: Path) -> None:
    os.truncate(root / "a.safetensors", 40)


def lose_the_file(root: Path) -> None:
    (root / "a.safetensors").unlink()


def damage_the_manifest(root: Path) -> None:
    (root / "a.json").write_bytes(b'{"sha256": ')


def empty_the_manifest(root: Path) -> None:
    (root / "a.json").write_bytes(b"[]")


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, lose_the_file, damage_the_manifest, empty_the_manifest])
def test_a_damaged_shard_is_set_aside_and_computed_again(
    store: Store, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    store.write("a", ARRAYS)
    damage(store.root)
    assert ("a" in store) == (damage is flip_a_byte)  # the cheap check sees names and sizes
    with caplog.at_level(logging.WARNING):
        assert store.read("a") is None
    assert "does not match its manifest" in caplog.text and store.corrupt == 1
    assert "a" not in store
    assert (store.root / "a.corrupt").exists() == (damage is not lose_the_file)
    store.write("a", ARRAYS)
    assert same(store.read("a"), ARRAYS) and store.corrupt == 1


def write_often(root: Path, value: float) -> None:
    for _ in range(5):
        Store(root).write("a", {"x": np.full(1000, value)})


def test_a_reader_never_sees_half_of_what_threads_write(store: Store) -> None:
    threads = [threading.Thread(target=write_often, args=(store.root, 7.0)) for _ in range(4)]
    readings = []
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        readings.append(store.read("a"))
    for thread in threads:
        thread.join()
    assert all(arrays is None or np.all(arrays["x"] == 7) for arrays in [*readings, store.read("a")])
    assert sorted(path.name for path in store.root.iterdir()) == ["a.json", "a.safetensors"]
    assert store.corrupt == 0 and "a" in store


def test_threads_that_disagree_leave_a_valid_shard(store: Store) -> None:
    threads = [threading.Thread(target=write_often, args=(store.root, float(i))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    final = store.read("a")
    assert final is not None and len(set(final["x"])) == 1
    assert sorted(path.name for path in store.root.iterdir()) == ["a.json", "a.safetensors"]


def test_processes_that_disagree_leave_a_valid_shard(store: Store) -> None:
    script = (
        "import sys, numpy, pathlib, dsd.store\n"
        "for _ in range(5):\n"
        "    shard = {'x': numpy.full(1000, float(sys.argv[2]))}\n"
        "    dsd.store.Store(pathlib.Path(sys.argv[1])).write('a', shard)"
    )
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    writers = [subprocess.Popen([sys.executable, "-c", script, store.root, value], env=path) for value in "12"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    final = store.read("a")
    assert final is not None and len(set(final["x"])) == 1


def test_a_disk_that_lies_is_found_when_writing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def lying(source: Path, target: Path) -> None:
        replace(source, target)
        if str(target).endswith(".safetensors"):
            flip_a_byte(store.root)

    monkeypatch.setattr(os, "replace", lying)
    monkeypatch.setattr(store_module, "ATTEMPTS", 2)
    with pytest.raises(DsdError, match="does not read back as written"):
        store.write("a", ARRAYS)


def test_prune_removes_what_no_params_name(store: Store) -> None:
    for key in ("a", "b", "c", "damaged"):
        store.write(key, ARRAYS)
    (store.root / "half.safetensors").write_bytes(b"no manifest")
    (store.root / ".a.safetensors.0123.tmp").write_bytes(b"a killed writer's")
    (store.root / "README.json").write_text("{}")
    os.replace(store.root / "damaged.safetensors", store.root / "damaged.corrupt")
    (store.root / "damaged.json").unlink()
    assert store.prune({"a", "absent"}) == 2
    assert sorted(path.name for path in store.root.iterdir()) == ["README.json", "a.json", "a.safetensors"]
    assert same(store.read("a"), ARRAYS)


def test_results_of_another_minor_version_of_a_library_are_a_warning(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.write("a", ARRAYS)
    assert same(store.read("a"), ARRAYS) and not caplog.messages
    now = {**libraries(), "torch": "99.1"}
    monkeypatch.setattr("dsd.store.libraries", lambda: now)
    assert same(store.read("a"), ARRAYS) and same(store.read("a"), ARRAYS)
    [line] = caplog.messages  # once a place
    assert line.startswith(f"{store.root}: computed with torch {libraries()['torch']}, not 99.1; to recompute: dsd ")


def test_shards_from_before_versions_were_recorded_are_valid(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.write("a", ARRAYS)
    manifest = store.root / "a.json"
    content = json.loads(manifest.read_text())
    del content["libraries"]
    manifest.write_text(json.dumps(content))
    assert same(store.read("a"), ARRAYS) and not caplog.messages and store.corrupt == 0
