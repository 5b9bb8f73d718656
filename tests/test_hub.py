"""Dataset repositories: fetched from a local mock of the Hub, and read file by file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets as hf
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from dsd.data import hub
from dsd.data.hub import Location, Repository, fetch_repository
from dsd.datasets import parquet, webdataset
from dsd.errors import DataError, DsdError, ImageError, ParamsError
from tests.conftest import ROOT
from tests.hubdata import cifar10, downloaded, fgvc_aircraft, image_bytes, image_cell, row, samples, tar, written
from tests.hubdata import parquet as as_parquet
from tests.hubserver import COMMIT, TOKEN, Hub, connected

OWNER = "uoft-cs/cifar10"
GONE = "gone/away is neither a folder here nor at {url}/datasets/gone/away: it was removed or renamed"
FEATURES = {"img": hf.Image(), "label": hf.ClassLabel(names=["a", "b"])}


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return cifar10()


@pytest.fixture
def served(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with connected(Hub({OWNER: dict(files)}), tmp_path, monkeypatch) as server:
        yield server


def pinned(**changes: Any) -> Any:
    return row("cifar10", **{"source": OWNER, "revision": COMMIT, **changes})


def test_files_are_fetched_once_and_no_others(served: Hub, tmp_path: Path) -> None:
    found = fetch_repository("cifar10", pinned(), workers=2)
    assert found.train == ("plain_text/train-00000-of-00001.parquet",)
    assert found.test == ("plain_text/test-00000-of-00001.parquet",)
    assert sorted(served.fetched()) == sorted(found.files)
    assert (found.root / found.test[0]).read_bytes() == served.repositories[OWNER][found.test[0]]
    before = len(served.requests)
    assert fetch_repository("cifar10", pinned(), workers=2) == found
    assert len(served.requests) == before  # no request at all


def test_the_hub_and_a_folder_give_the_same_examples(served: Hub, tmp_path: Path) -> None:
    local = row("cifar10", written(served.repositories[OWNER], tmp_path / "files"))
    assert downloaded(pinned(), tmp_path / "a") == downloaded(local, tmp_path / "b")


def test_extra_files_are_fetched(served: Hub) -> None:
    served.repositories["clip-benchmark/wds_fgvc_aircraft"] = fgvc_aircraft()
    planes = row("fgvc-aircraft", "clip-benchmark/wds_fgvc_aircraft", revision=COMMIT)
    found = fetch_repository("planes", planes, workers=1, extra=("classnames.txt",))
    assert sorted(served.fetched()) == ["classnames.txt", "test/0.tar", "train/0.tar", "train/1.tar"]
    with pytest.raises(DataError, match=r"datasets.planes.source: .* has no file names.txt, which fgvc-aircraft needs"):
        fetch_repository("planes", planes, workers=1, extra=("names.txt",))
    assert found.train == ("train/0.tar", "train/1.tar")


def test_an_interrupted_transfer_is_resumed(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    file = "plain_text/train-00000-of-00001.parquet"
    served.broken[file] = 1000
    found = fetch_repository("cifar10", pinned(), workers=1)
    assert f"{file} bytes=1000-" in served.fetched()
    assert (found.root / file).read_bytes() == served.repositories[OWNER][file]


def test_an_incomplete_file_is_fetched_again(served: Hub, tmp_path: Path) -> None:
    file = "plain_text/test-00000-of-00001.parquet"
    found = fetch_repository("cifar10", pinned(), workers=1)
    blob = (found.root / file).resolve()
    (found.root / file).unlink()
    blob.rename(blob.with_name(f"{blob.name}.0123abcd.incomplete"))
    assert fetch_repository("cifar10", pinned(), workers=1) == found
    assert (found.root / file).read_bytes() == served.repositories[OWNER][file]


def test_a_corrupt_file_is_removed(served: Hub) -> None:
    file = "plain_text/test-00000-of-00001.parquet"
    data = served.repositories[OWNER][file]
    served.damaged[file] = data[:100] + bytes(100) + data[200:]
    with pytest.raises(DataError, match=f"test-00000-of-00001.parquet: its SHA-256 differs from that in {OWNER}"):
        fetch_repository("cifar10", pinned(), workers=1)
    served.damaged.clear()
    found = fetch_repository("cifar10", pinned(), workers=1)
    assert (found.root / file).read_bytes() == data


def test_a_gated_repository_needs_a_token_and_accepted_terms(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    served.gated.add(OWNER)
    line = (
        f"datasets.mine.source: {OWNER} is gated: accept its terms at {served.url}/datasets/{OWNER}, "
        "then log in with `hf auth login` or set HF_TOKEN"
    )
    for token in (None, TOKEN):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        for ask in (partial(fetch_repository, workers=1), hub.repository_size):
            with pytest.raises(DataError) as error:
                ask("mine", pinned())
            assert str(error.value) == line
    served.accepted = True
    assert fetch_repository("mine", pinned(), workers=1).train
    assert hub.repository_size("mine", pinned()) > 0


@pytest.mark.parametrize(
    ("changes", "token", "line"),
    [
        ({"source": "gone/away"}, None, f"datasets.mine.source: {GONE}"),
        ({"source": "gone/away"}, TOKEN, f"datasets.mine.source: {GONE}"),
        (
            {},
            "hf_wrong",
            f"datasets.mine.source: {OWNER}: the hub refuses the token (401): log in with `hf auth login`",
        ),
        ({"revision": "f" * 40}, None, f"datasets.mine.revision: {OWNER} has no commit {'f' * 40}; see {{url}}/"),
        ({"source": "not an id"}, None, "datasets.mine.source: not an id is neither a folder here nor the id of a"),
        (
            {"files": {"train": None, "test": "data/*.parquet"}},
            None,
            f"datasets.mine.files.test: no file of {OWNER} matches 'data/*.parquet' (available: README.md, "
            "plain_text/test-00000-of-00001.parquet, plain_text/train-00000-of-00001.parquet)",
        ),
        (
            {"files": {"train": "training/*", "test": "plain_text/test-*"}},
            None,
            f"datasets.mine.files.train: no file of {OWNER} matches 'training/*'",
        ),
    ],
)
def test_hub_errors_are_one_line(
    changes: dict[str, Any], token: str | None, line: str, served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(DataError) as error:
        fetch_repository("mine", pinned(**changes), workers=1)
    assert str(error.value).startswith(line.format(url=served.url)) and "\n" not in str(error.value)


@pytest.mark.parametrize("status", [403, 503])
def test_the_message_of_the_hub_is_shown(status: int, served: Hub) -> None:
    served.down = status, "for a reason"
    line = f"datasets.mine.source: {OWNER} is neither a folder here nor whole in the cache, and the hub answers"
    with pytest.raises(DataError) as error:
        fetch_repository("mine", pinned(), workers=1)
    assert str(error.value) == f"{line} {status}: for a reason"


def test_an_expired_token_is_not_a_missing_repository(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    served.down = 401, "User Access Token is expired"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(DataError, match=r"the hub refuses the token \(401\): log in with .* again, or use no token$"):
        fetch_repository("mine", pinned(), workers=1)


def test_an_unwritable_cache(served: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=rf"^datasets.mine.source: {OWNER}: \[Errno \d+\] .*{tmp_path}/file"):
        fetch_repository("mine", pinned(), workers=1)


def test_offline_with_a_complete_cache(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = {"train": None, "test": "plain_text/test-*"}
    found = fetch_repository("mine", pinned(files=tests), workers=1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_repository("mine", pinned(files=tests), workers=1) == found
    with pytest.raises(DataError, match=r"mine.source: .* nor whole in the cache, and HF_HUB_OFFLINE is set: unset"):
        fetch_repository("mine", pinned(), workers=1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", f"{constants.HF_HUB_CACHE}-other")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="nor whole in the cache, and the hub does not answer: ConnectError"):
        fetch_repository("mine", pinned(), workers=1)


@pytest.mark.parametrize(
    ("source", "revision", "line"),
    [
        (OWNER, None, f"datasets.mine.revision: null, and {OWNER} is not a local folder; pin it to a commit of the"),
        (
            OWNER,
            "main",
            "datasets.mine.revision: 'main' is not a commit (40 hexadecimal digits); branches can move",
        ),
        (".", COMMIT, "datasets.mine.revision: . is a local folder, which has no revision; must be null"),
    ],
)
def test_a_revision_is_a_commit_of_the_hub(source: str, revision: str | None, line: str) -> None:
    with pytest.raises(ParamsError) as error:
        fetch_repository("mine", row("cifar10", source, revision=revision), workers=1)
    assert str(error.value).startswith(line)


def test_the_settings_of_the_hub_client_apply(served: Hub, tmp_path: Path) -> None:
    served.gated, served.accepted = {OWNER}, True
    code = (
        "import sys; from tests.test_hub import pinned; from dsd.data.hub import fetch_repository;"
        "print(fetch_repository('mine', pinned(), workers=1).root)"
    )
    settings = {
        "HF_ENDPOINT": served.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "home")


# Reading


@dataclass(frozen=True)
class Columns:
    label: int


def repository(folder: Path, **files: bytes) -> Repository:
    written({f"{name}.parquet": data for name, data in files.items()}, folder)
    return Repository("mine", folder, None, tuple(f"{name}.parquet" for name in files))


def test_rows_and_images_of_several_row_groups(tmp_path: Path) -> None:
    data = as_parquet(
        {"img": [image_cell(n) for n in range(11)], "label": [n % 2 for n in range(11)]}, FEATURES, batch=4
    )
    found = repository(tmp_path, a=data)
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 3
    assert [columns.label for columns in parquet.read_rows(found, "a.parquet", Columns)] == [n % 2 for n in range(11)]
    wanted = {Location("a.parquet", n, "img"): f"image {n}" for n in (10, 3, 4)}
    assert dict(parquet.read_images(found, wanted)) == {f"image {n}": image_bytes(n) for n in (3, 4, 10)}


def test_missing_images(tmp_path: Path) -> None:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = [{"bytes": None, "path": "/home/me/1.png"}, None, {"bytes": b"", "path": None}]
    pq.write_table(pa.table({"img": pa.array(cells, kind), "label": [0, 1, 2]}), tmp_path / "a.parquet")
    wanted = {Location("a.parquet", n, "img"): str(n) for n in range(3)}
    found = dict(parquet.read_images(Repository("mine", tmp_path, None, ("a.parquet",)), wanted))
    assert all(isinstance(content, ImageError) for content in found.values())
    assert str(found["0"]) == (f"{tmp_path}/a.parquet, row 0: a path ('/home/me/1.png') without the bytes of the image")
    assert str(found["1"]) == f"{tmp_path}/a.parquet, row 1: no image"


def plain(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


READ: dict[str, Callable[[Repository], object]] = {
    "rows": lambda found: parquet.read_rows(found, "a.parquet", Columns),
    "features": lambda found: parquet.read_features(found, "a.parquet"),
    "integers": lambda found: parquet.read_integers(found, "a.parquet", "label"),
    "images": lambda found: list(parquet.read_images(found, {Location("a.parquet", 0, "img"): "a"})),
}


@pytest.mark.parametrize(
    ("how", "data", "line"),
    [
        ("rows", b"not Parquet", "not readable as Parquet: Parquet magic bytes not found"),
        ("rows", as_parquet({"img": [image_cell(1)], "label": [0]}, FEATURES)[:-100], "not readable as Parquet:"),
        ("rows", plain(img=[1], lable=[0]), "no column 'label' (columns: img, lable)"),
        ("images", plain(image=[1], label=[0]), "no column 'img' (columns: image, label)"),
        ("rows", plain(label=[0, 1, None]), "row 2: label: Input should be a valid integer, found None"),
        ("rows", plain(label=["one"]), "row 0: label: Input should be a valid integer, unable to parse string as an"),
        ("integers", plain(label=["one"]), "column 'label' is string, must be integers without nulls"),
        ("integers", plain(label=[0, None]), "column 'label' is int64, must be integers without nulls"),
        ("images", plain(img=["1.png"]), "column 'img' is string, not images"),
        ("features", plain(img=[1]), "does not declare which columns are images and classes (columns: img)"),
    ],
)
def test_invalid_parquet_is_one_line(how: str, data: bytes, line: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        READ[how](repository(tmp_path, a=data))
    message = str(error.value).replace("a.parquet, row", "a.parquet: row")
    assert message.startswith(f"{tmp_path}/a.parquet: {line}") and "\n" not in message


def tars(folder: Path, data: bytes) -> Repository:
    return Repository("mine", written({"0.tar": data}, folder), None, ("0.tar",))


def test_samples_of_a_tar(tmp_path: Path) -> None:
    found = tars(tmp_path, samples(range(5)))
    assert webdataset.read_labels(found, "0.tar") == {f"s{n:07d}": n for n in range(5)}
    wanted = {Location("0.tar", f"s{n:07d}"): f"image {n}" for n in (3, 1)}
    assert dict(webdataset.read_images(found, wanted)) == {f"image {n}": image_bytes(n, "WEBP") for n in (1, 3)}
    assert {file.name for file in tmp_path.iterdir()} == {"0.tar"}  # nothing is unpacked


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"no tar", "not readable as a tar"),
        (samples(range(5))[:3000], "not readable as a tar: unexpected end of data"),
        (tar([("a.cls", b"one"), ("a.png", b"")]), "a.cls: must be one number per sample, found b'one'"),
        (tar([("a.cls", b"1"), ("a.cls", b"2")]), "a.cls: must be one number per sample, found b'2'"),
        (tar([("a.cls", b"1")]), "sample 'a' has no image"),
        (tar([("b/a.webp", b"1")]), "sample 'b/a' has no .cls"),
        (tar([("a.webp", b"12345")]), "a.webp: 5 bytes, more than 4"),
    ],
)
def test_invalid_tars(data: bytes, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "more than" in line:
        monkeypatch.setattr(webdataset, "LARGEST", 4)
    with pytest.raises(DataError) as error:
        webdataset.read_labels(tars(tmp_path, data), "0.tar")
    assert str(error.value).startswith(f"{tmp_path}/0.tar: {line}")


def test_names_in_a_tar_cannot_leave_the_folder(tmp_path: Path) -> None:
    """A member name with a path is only an unusual sample key."""
    found = tars(tmp_path / "in", tar([("../../a.cls", b"1"), ("../../a.png", image_bytes(1)), ("/etc/b.cls", b"0")]))
    with pytest.raises(DsdError, match="sample '/etc/b' has no image"):
        webdataset.read_labels(found, "0.tar")
    content = dict(webdataset.read_images(found, {Location("0.tar", "../../a"): "a"}))
    assert content == {"a": image_bytes(1)} and {file.name for file in tmp_path.iterdir()} == {"in"}


def test_location_paths() -> None:
    assert Location("data/test-00000-of-00002.parquet", 17, "image_0").path == "data/test-00000-of-00002/17/image_0"
    assert Location("test/0.tar", "s1").path == "test/0/s1"
    assert hub.Location("a", 1).path == "1"
