"""Proxies of the environment: this machine is reached without one, and one that cannot be used is one line."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
from huggingface_hub import HfApi

from dsd.config import Params
from dsd.data import proxies
from dsd.data.downloads import fetch
from dsd.data.hub import hub_errors
from dsd.data.proxies import check_proxies, exclude_loopback
from dsd.errors import DataError, DsdError
from flows import doctor, stores
from flows.stages.common import each, main, stage
from tests.serving import serve
from tests.test_doctor import look

DEAD = "http://user:secret@127.0.0.1:9"
LOWER = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without proxies."""
    for name in (*LOWER, *map(str.upper, LOWER)):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def dead(environment: pytest.MonkeyPatch) -> None:
    for name in LOWER[:3]:
        environment.setenv(name, DEAD)
        environment.setenv(name.upper(), DEAD)
    exclude_loopback()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "localhost,127.0.0.1,::1"),
        ({"NO_PROXY": "example.com, ::1"}, "example.com,::1,localhost,127.0.0.1"),
        ({"NO_PROXY": "a", "no_proxy": "b"}, "b,localhost,127.0.0.1,::1"),  # the lower case one has precedence
        ({"no_proxy": "*"}, "*,localhost,127.0.0.1,::1"),
    ],
)
def test_this_machine_is_added_to_what_has_no_proxy(
    before: dict[str, str], after: str, environment: pytest.MonkeyPatch
) -> None:
    for name, value in before.items():
        environment.setenv(name, value)
    for _ in range(2):
        exclude_loopback()
        assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == after


def test_every_client_reaches_this_machine_without_a_proxy(dead: None, tmp_path: Path) -> None:
    (tmp_path / "health").write_text("well")
    with serve(tmp_path) as server:
        for host in ("127.0.0.1", "localhost"):
            url = server.url.replace("127.0.0.1", host) + "/health"
            assert requests.get(url, timeout=60).text == "well"
            assert httpx.get(url, timeout=60).text == "well"
            assert urllib.request.urlopen(url, timeout=60).read() == b"well"
            fetch(url, tmp_path / host, key="datasets.x.source")
            stores.check(stores.PREFECT, server.url)
        with (
            pytest.raises(DataError, match="x: the hub answers 404"),
            hub_errors("x", None, error=DataError),
        ):
            HfApi(endpoint=server.url).dataset_info("x")  # the server answers 404


@stage
def prepare(params: Params) -> dict[str, dict[str, Any]]:
    return each(lambda name: {}, ["one"])


def test_a_stage_runs_with_a_dead_proxy(dead: None, workspace: Path, prefect_server: None) -> None:
    main(prepare)
    assert Path("data/timings/prepare.json").exists()


UNUSABLE = {
    "ftp://127.0.0.1:9": "ftp is not the scheme of a proxy (http, https, socks5, socks5h); correct or unset it",
    "http://127.0.0.1:port": "not the address of a proxy, e.g. http://host:port; correct or unset it",
    "http://": "not the address of a proxy, e.g. http://host:port; correct or unset it",
    "socks5://user:secret@127.0.0.1:9": "socks5://***@127.0.0.1:9: socksio and PySocks not installed; "
    "install it, or unset ALL_PROXY",
}


@pytest.fixture(params=UNUSABLE)
def unusable(request: pytest.FixtureRequest, environment: pytest.MonkeyPatch) -> Iterator[str]:
    """The line about a proxy that no client can use."""
    environment.setenv("ALL_PROXY", request.param)
    environment.setattr(proxies, "find_spec", lambda name: None)
    yield f"ALL_PROXY: {UNUSABLE[request.param]}"


def test_an_unusable_proxy_is_one_line_at_every_door(unusable: str, tmp_path: Path, workspace: Path) -> None:
    doors = [
        lambda: fetch("http://example.com/a", tmp_path / "a", key="datasets.x.source"),
        lambda: hub_errors("owner/name", None, error=DataError).__enter__(),
        lambda: stores.check(stores.MLFLOW, "http://example.com"),
        lambda: stores.check(stores.PREFECT, "http://127.0.0.1:1/api"),
    ]
    for door in doors:
        with pytest.raises(DsdError) as error:
            door()
        assert str(error.value) == unusable
    with pytest.raises(SystemExit) as exit:
        main(prepare)
    assert exit.value.code == f"prepare: {unusable}"
    found = look([check for check in doctor.checks() if check.name == "proxy"], "proxy")
    assert found.found == unusable and found.remedy


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "127.0.0.1:9", "socks5h://h:1", "https://a:b@proxy.example"])
def test_a_proxy_that_clients_can_use(address: str, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("https_proxy", address)
    environment.setattr(proxies, "find_spec", lambda name: find_spec("httpx"))
    check_proxies()


def test_the_doctor_tries_each_proxy(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor._proxies() == "none"
    with serve(tmp_path) as server:
        environment.setenv("HTTP_PROXY", server.url)
        assert doctor._proxies() == f"HTTP_PROXY: {server.url}"
        environment.setenv("https_proxy", DEAD)
        with pytest.raises(DsdError, match=r"^https_proxy: http://\*\*\*@127.0.0.1:9: no proxy answers \(.*refused"):
            doctor._proxies()
