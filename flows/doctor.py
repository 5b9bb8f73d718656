"""`dsd doctor`: checks of the installation, the device, the checkpoints, the datasets and the stores.

The checks read little and change nothing. They run concurrently, with a time limit.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import NamedTuple
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from dsd.config import BackboneParams, DatasetParams, Params, RuntimeParams, load
from dsd.data.proxies import check_proxies, proxies
from dsd.errors import CheckpointError, DsdError, brief
from flows import DATA, stores
from flows.command import command

SECONDS = 15.0  # the time limit of all checks together
CONSTRAINTS = Path("constraints.txt")
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "prefect", "fastapi", "dvc", "mlflow")
EXTRAS = {"ray": "ray", "xformers": "gpu", "psycopg2-binary": "postgres"}  # package → the extra that installs it
INSTALL = "run `make reproduce`, which installs the versions of constraints.txt, or `pip install -c constraints.txt`"
PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080}  # of a proxy whose address has none
ACCESS = "correct its row, or get access (docs/benchmarks.md); set HF_HUB_OFFLINE=1 if the hub's cache is complete"


@dataclass(frozen=True)
class Check:
    """A check: `run` returns its result, and raises DsdError if there is a problem."""

    name: str
    run: Callable[[], str]
    remedy: str


class Finding(NamedTuple):
    """The result of a check; a problem has a remedy."""

    check: str
    found: str
    remedy: str | None = None


def examine(checks: Sequence[Check], seconds: float = SECONDS) -> list[Finding]:
    """The findings of all checks, in order; a check that exceeds the time limit is a problem."""
    findings: dict[str, Finding] = {}

    def run(check: Check) -> None:
        findings[check.name] = _finding(check)

    deadline = monotonic() + seconds
    threads = [Thread(target=run, args=(check,), daemon=True) for check in checks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - monotonic()))
    late = f"no answer within {seconds:g} s"
    return [findings.get(check.name, Finding(check.name, late, check.remedy)) for check in checks]


def _finding(check: Check) -> Finding:
    try:
        return Finding(check.name, check.run())
    except DsdError as error:
        return Finding(check.name, str(error), check.remedy)
    except ImportError as error:
        return Finding(check.name, f"cannot be checked: {error}", INSTALL)
    except Exception as error:
        reason = brief(f"{type(error).__name__}: {error}", 200)
        return Finding(check.name, f"the check itself failed: {reason}", "a defect of dsd: report it with this line")


def checks() -> list[Check]:
    """All checks; without a valid params.yaml, those that do not depend on it."""
    with suppress(ImportError):  # imported here, since the threads would import its modules at the same time
        import dsd.estimate  # noqa: F401
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every retry
    settings = Check("params.yaml", _settings, "run from the project's folder, and correct the key that it names")
    dependent: list[Check] = []
    with suppress(DsdError):
        params = load()
        dependent = [*_machine(params), *_outside(params.backbones, params.datasets)]
    proxy = Check("proxy", _proxies, "correct or unset the variable that it names, or start the proxy")
    return [*_installed(), settings, proxy, *dependent, *_stores(), *_project()]


def _settings() -> str:
    params = load()
    return f"methods: {len(params.methods)}, datasets: {len(params.datasets)}, backbone: {params.backbone}"


def _proxies() -> str:
    """Check the proxies of the environment, and that each accepts connections."""
    check_proxies()
    for variable, address in proxies().items():
        url = urlsplit(address if "://" in address else f"http://{address}")
        try:
            socket.create_connection((url.hostname, url.port or PORTS[url.scheme]), timeout=5).close()
        except OSError as error:
            raise DsdError(f"{variable}: {address}: no proxy answers ({error})") from None
    return ", ".join(f"{variable}: {address}" for variable, address in proxies().items()) or "none"


def _installed() -> Iterator[Check]:
    yield Check("Python", platform.python_version, INSTALL)
    for name in PACKAGES:
        yield Check(name, partial(package, name), INSTALL)
    for name, extra in EXTRAS.items():
        yield Check(name, partial(package, name, extra), INSTALL)


def package(name: str, extra: str | None = None) -> str:
    """The version of a package, and that of constraints.txt if it differs."""
    if (version := installed(name)) is None:
        if extra is None:
            raise DsdError("not installed")
        return f"not installed (extra `{extra}`)"
    requirement = required(name)
    if requirement is not None and not requirement.specifier.contains(version, prereleases=True):
        raise DsdError(f"{version}, but dsd needs {requirement.specifier}")
    tested = constrained(name)
    return version if tested in (None, version.partition("+")[0]) else f"{version} (tested with {tested})"


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def required(name: str) -> Requirement | None:
    """dsd's requirement of a package, extras included; None if it has none or is not installed itself."""
    try:
        requirements = [Requirement(line) for line in metadata.requires("dsd") or ()]
    except metadata.PackageNotFoundError:
        return None
    return next((r for r in requirements if r.name == name and r.specifier), None)


def constrained(name: str) -> str | None:
    lines = CONSTRAINTS.read_text().splitlines() if CONSTRAINTS.is_file() else []
    return next((line.partition("==")[2] for line in lines if line.startswith(f"{name}==")), None)


def _machine(params: Params) -> Iterator[Check]:
    tested, row, runtime = partial(_checkpoint, params), params.backbones[params.backbone], params.runtime
    yield Check("device", partial(_device, runtime), "set runtime.device in params.yaml to auto or cpu")
    attention = partial(_attention, row, runtime, tested)
    yield Check("attention", attention, "set runtime.attention in params.yaml to sdpa")
    for name in params.backbones:
        selected = params.model_copy(update={"backbone": name})
        yield Check(f"checkpoint {name}", partial(_checkpoint, selected), ACCESS)
    remedy = "free disk space, or use fewer examples (datasets in params.yaml)"
    yield Check("disk", partial(_disk, params, tested), remedy)


def _device(runtime: RuntimeParams) -> str:
    import torch

    from dsd.models import device_of

    device = device_of(runtime.device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{torch.cuda.get_device_name(device)}, {_gigabytes(free)} of {_gigabytes(total)} free"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"processor ({platform.machine()}), {os.cpu_count()} cores, {_gigabytes(memory)}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _attention(row: BackboneParams, runtime: RuntimeParams, checkpoint: Callable[[], str]) -> str:
    """Try the attention backend on the device, with the shapes of the U-Net; only its first layer is allocated."""
    import torch
    from diffusers import UNet2DConditionModel

    from dsd.models import device_of
    from dsd.models.attention import AttentionState, install
    from dsd.models.checkpoint import DTYPES, component_config

    backend = runtime.attention
    if not _passes(checkpoint):
        return f"{backend}, not checked: the checkpoint does not open"
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(component_config(row, "unet"))
    unet.conv_in.to(DTYPES[row.dtype]).to_empty(device=device_of(runtime.device))
    install(unet, AttentionState(), backend)
    return f"{backend} runs in {row.dtype}"


def _checkpoint(params: Params) -> str:
    """Check the configuration of `params.backbone`, and that a local checkpoint is complete; no weights are read."""
    from huggingface_hub import constants

    from dsd.estimate import PassCost
    from dsd.models import family
    from dsd.models.checkpoint import family_of, folder_of, one_file, remote, require
    from dsd.models.noise_process import prediction_of
    from dsd.models.stable_diffusion import StableDiffusion

    row = params.backbones[params.backbone]
    kind, result = family(row.family), row.source
    if Path(row.source).exists() or constants.HF_HUB_OFFLINE:
        folder = folder_of(row)
        parts = ("vae", "unet", *kind.encoders, "scheduler") if issubclass(kind, StableDiffusion) else ()
        require(folder, row.family, parts, weights=one_file(row) is None)
        if family_of(folder) is None:
            line = f"no checkpoint of family {row.family} (no unet/, no config.json of a CLIP)"
            raise CheckpointError(f"{folder}: {line}")
        if parts:
            result += f", predicts {prediction_of(folder, row)}"
    else:
        result += f", {_gigabytes(remote(row))} on the hub"
    if issubclass(kind, StableDiffusion):
        result += f", {PassCost.of(row).layers} layers of cross-attention"
    return result


def _passes(check: Callable[[], str]) -> bool:
    try:
        return bool(check())
    except DsdError:
        return False


def _disk(params: Params, checkpoint: Callable[[], str]) -> str:
    """Check the space for a run from scratch; results of earlier runs are not subtracted."""
    from dsd.estimate import needs

    free = shutil.disk_usage(".").free
    if not _passes(checkpoint):
        return f"{_gigabytes(free)} free; need not estimated: checkpoint {params.backbone} does not open"
    (disk,) = (need for need in needs(params, free) if need.what == "disk")
    if disk.problem:
        raise DsdError(f"a run needs up to {_gigabytes(disk.amount)}, which is {disk.problem}")
    return f"{_gigabytes(free)} free, a run needs up to {_gigabytes(disk.amount)}"


def _outside(backbones: Mapping[str, BackboneParams], datasets: Mapping[str, DatasetParams]) -> Iterator[Check]:
    """Checks of what has to be fetched: from the hub, from other addresses, and from the user's own folders."""
    rows: list[BackboneParams | DatasetParams] = [*backbones.values(), *datasets.values()]
    used = any(map(_on_hub, rows))
    yield Check("hub", partial(_hub, used), "log in with `hf auth login`, or set HF_TOKEN")
    for name, row in datasets.items():
        if not row.generated:
            yield Check(f"dataset {name}", partial(_dataset, name, row), ACCESS)


def _on_hub(row: BackboneParams | DatasetParams) -> bool:
    """Whether a row names a repository on the hub, not a local folder; other rows have no key `revision`."""
    values = row.model_dump()
    return "revision" in values and not Path(values["source"]).exists()


def _hub(used: bool) -> str:
    """The endpoint and whether there is a token; the checks of the rows try the access."""
    from huggingface_hub import constants, get_token

    if not used:
        return "not used by params.yaml"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: only the cache is used"
    return f"{constants.ENDPOINT}, {'with a token' if get_token() else 'without a token: only public repositories'}"


def _dataset(name: str, row: DatasetParams) -> str:
    from huggingface_hub import constants

    from dsd.datasets import benchmark

    if (DATA / "download" / name / "annotations.jsonl").exists():
        return "downloaded"
    if constants.HF_HUB_OFFLINE and _on_hub(row):
        return "HF_HUB_OFFLINE is set: not checked"
    size = benchmark(row.kind).remote(name, row)
    return f"{row.kind}, {_gigabytes(size)} to fetch" if size else f"{row.kind}, nothing to fetch"


def _stores() -> Iterator[Check]:
    docs = "see “Stores” in docs/operations.md"
    yield Check("MLflow", partial(_store, stores.MLFLOW, stores.uri()), docs)
    setting = stores.PREFECT if stores.PREFECT in os.environ else stores.DATABASE
    yield Check("Prefect", partial(_store, setting, os.environ.get(setting)), docs)


def _store(setting: str, address: str | None) -> str:
    if address is None:
        return "a server for each run, with a database in this workspace"
    stores.check(setting, address, seconds=int(SECONDS) - 5)
    return stores.redacted(address)


def _project() -> Iterator[Check]:
    yield Check("Git", _git, "clone the project, or `git init` and commit: DVC and presets need it")
    yield Check("DVC", _dvc, "run from the folder of dvc.yaml; see also `dvc doctor`")
    yield Check("DVC cache", _cache, "move it to another disk: `dvc cache dir PATH`")
    yield Check("DVC remote", _remote, "correct it with `dvc remote modify`; see “Stores” in docs/operations.md")


def _git() -> str:
    commit, branch = (command(Path(), "git", "rev-parse", form, "HEAD") for form in ("--short", "--abbrev-ref"))
    changed = len(command(Path(), "git", "status", "--porcelain").splitlines())
    return f"{commit} ({branch}), {f'uncommitted files: {changed}' if changed else 'all committed'}"


def _dvc() -> str:
    from flows.reproduce import stale_stages

    stages = stale_stages()
    return f"to run: {', '.join(stages)}" if stages else "everything is up to date"


def _cache() -> str:
    from flows.reproduce import cache_folder

    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise DsdError(f"{folder}: {existing} is not writable")
    return f"{folder}, {_gigabytes(shutil.disk_usage(existing).free)} free"


def _remote() -> str:
    from flows.reproduce import remote_address

    return remote_address() or "none (`dvc remote add -d NAME ADDRESS`)"
