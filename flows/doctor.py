"""What is installed, what there is to compute with, and what can be reached: what stands in the way of a run here.

Every check asks for little and starts nothing. They run side by side, each for so long and no longer.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

from dsd.config import DrawnDataset, Params, load
from dsd.errors import CheckpointError, DsdError, unknown
from flows import DATA, stores

SECONDS = 15.0  # that all checks have, from the start on
CONSTRAINTS = Path("constraints.txt")
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "prefect", "fastapi", "dvc", "mlflow")
EXTRAS = {"ray": "ray", "xformers": "gpu", "psycopg2-binary": "postgres"}  # by the extra that installs them
INSTALL = "run `make reproduce`, which installs what constraints.txt has, or `pip install -c constraints.txt`"
ACCESS = "correct its row, or get access (docs/benchmarks.md); set HF_HUB_OFFLINE=1 where the hub's cache has all of it"


@dataclass(frozen=True)
class Check:
    """Something to look at: the function says what there is, and raises DsdError where it stands in the way."""

    name: str
    look: Callable[[], str]
    remedy: str


class Finding(NamedTuple):
    """What a check found; with a remedy where it stands in the way."""

    check: str
    found: str
    remedy: str | None = None


def examine(checks: Sequence[Check], seconds: float = SECONDS) -> list[Finding]:
    """The findings of all checks, in their order; none takes longer than so many seconds."""
    found: dict[str, Finding] = {}

    def look(check: Check) -> None:
        found[check.name] = _finding(check)

    deadline = monotonic() + seconds
    threads = [Thread(target=look, args=(check,), daemon=True) for check in checks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - monotonic()))
    late = f"no answer within {seconds:g} s"
    return [found.get(check.name, Finding(check.name, late, check.remedy)) for check in checks]


def _finding(check: Check) -> Finding:
    try:
        return Finding(check.name, check.look())
    except DsdError as error:
        return Finding(check.name, str(error), check.remedy)
    except ImportError as error:
        return Finding(check.name, f"cannot be told: {error}", INSTALL)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Finding(check.name, f"the check itself failed: {reason}", "a defect of dsd: report it with this line")


def checks() -> list[Check]:
    """Everything there is to look at here; what depends on params.yaml only where it can be read."""
    with suppress(ImportError):  # here and not in the threads: its modules are loaded by one at a time
        import dsd.estimate  # noqa: F401
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # how often it tries is no news
    settings = Check("params.yaml", _settings, "run from the project's folder, and mend the key that it names")
    with suppress(DsdError):
        return [*_installed(), settings, *_machine(load()), *_outside(load()), *_stores(), *_project()]
    return [*_installed(), settings, *_stores(), *_project()]


def _settings() -> str:
    params = load()
    return f"methods: {len(params.methods)}, datasets: {len(params.datasets)}, backbone: {params.backbone}"


def _installed() -> Iterator[Check]:
    yield Check("Python", _python, "make another environment: make reproduce PYTHON=python3.11")
    for name in PACKAGES:
        yield Check(name, partial(package, name), INSTALL)
    for name, extra in EXTRAS.items():
        yield Check(name, partial(package, name, extra), INSTALL)


def _python() -> str:
    version = platform.python_version()
    if not Version("3.11") <= Version(version) < Version("3.14"):
        raise DsdError(f"{version}, but 3.11 to 3.13 are what dsd is for")
    return version


def package(name: str, extra: str | None = None) -> str:
    """The version of a package, and that of constraints.txt where it is another.

    Raises:
        DsdError: it is missing and belongs to no extra, or dsd does not work with this version.
    """
    version = installed(name)
    if version is None and extra is not None:
        return f"not installed (extra `{extra}`)"
    if version is None:
        raise DsdError("not installed")
    if name == "fastapi" and Version(version) >= Version("0.151") and (installed("prefect") or "").startswith("3.8."):
        raise DsdError(f"{version}, with which every flow of prefect 3.8 dies; below 0.151 none does")
    wanted = required(name)
    if wanted is not None and not wanted.specifier.contains(version, prereleases=True):
        raise DsdError(f"{version}, but dsd needs {wanted.specifier}")
    tested = constrained(name)
    return version if tested in (None, version.partition("+")[0]) else f"{version} (tested with {tested})"


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def required(name: str) -> Requirement | None:
    """What dsd asks of a package, with or without an extra; None where it asks nothing, or is not installed itself."""
    try:
        declared = [Requirement(line) for line in metadata.requires("dsd") or ()]
    except metadata.PackageNotFoundError:
        return None
    return next((found for found in declared if found.name == name and found.specifier), None)


def constrained(name: str) -> str | None:
    lines = CONSTRAINTS.read_text().splitlines() if CONSTRAINTS.is_file() else []
    return next((line.partition("==")[2] for line in lines if line.startswith(f"{name}==")), None)


def _machine(params: Params) -> Iterator[Check]:
    yield Check("device", partial(_device, params), "set runtime.device in params.yaml to auto or cpu")
    yield Check("attention", partial(_attention, params), "set runtime.attention in params.yaml to sdpa")
    for name in params.backbones:
        yield Check(f"checkpoint {name}", partial(_checkpoint, params, name), ACCESS)
    yield Check("disk", partial(_disk, params), "make room, or have fewer examples (datasets in params.yaml)")


def _device(params: Params) -> str:
    import torch

    from dsd.models import device_of

    device = device_of(params.runtime.device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{torch.cuda.get_device_name(device)}, {_gigabytes(free)} of {_gigabytes(total)} free"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"processor ({platform.machine()}), {os.cpu_count()} cores, {_gigabytes(memory)}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _attention(params: Params) -> str:
    """Tried on the device with the shapes of the U-Net at hand, of which no more is made than its first layer."""
    import torch
    from diffusers import UNet2DConditionModel

    from dsd.models import device_of
    from dsd.models.attention import AttentionState, install
    from dsd.models.checkpoint import DTYPES, component_config

    row, backend = params.backbones[params.backbone], params.runtime.attention
    if not _opens(params):
        return f"{backend}, to be tried once checkpoint {params.backbone} opens"
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(component_config(row, "unet"))
    unet.conv_in.to(DTYPES[row.dtype]).to_empty(device=device_of(params.runtime.device))
    install(unet, AttentionState(), backend)
    return f"{backend} runs in {row.dtype}"


def _checkpoint(params: Params, name: str) -> str:
    """What its configuration tells; of a local one also whether every part is there, weights unread."""
    from huggingface_hub import constants

    from dsd.estimate import UNet
    from dsd.models import FAMILIES, StableDiffusion
    from dsd.models.checkpoint import family_of, folder_of, one_file, prediction_of, remote, require

    row = params.backbones[name]
    if row.family not in FAMILIES:
        raise CheckpointError(unknown("family", row.family, FAMILIES))
    kind, told = FAMILIES[row.family], row.source
    if Path(row.source).exists() or constants.HF_HUB_OFFLINE:
        folder = folder_of(row)
        parts = ("vae", "unet", *kind.encoders, "scheduler") if issubclass(kind, StableDiffusion) else ()
        require(folder, row.family, parts, weights=one_file(row) is None)
        if family_of(folder) is None:
            raise CheckpointError(
                f"{folder}: no checkpoint of family {row.family} (no unet/, no config.json of a CLIP)"
            )
        if parts:
            told += f", predicts {prediction_of(folder, row)}"
    else:
        told += f", {_gigabytes(remote(row))} on the hub"
    if issubclass(kind, StableDiffusion):
        unet = UNet.of(params.model_copy(update={"backbone": name}))
        told += f", {unet.layers} layers of cross-attention"
    return told


def _opens(params: Params) -> bool:
    """Whether the checkpoint under test does; why it does not, its own check says."""
    try:
        return bool(_checkpoint(params, params.backbone))
    except DsdError:
        return False


def _disk(params: Params) -> str:
    """For everything from the start: what an earlier run has left here counts again."""
    from dsd.estimate import needs

    free = shutil.disk_usage(".").free
    if not _opens(params):
        return f"{_gigabytes(free)} free; what a run needs is told once checkpoint {params.backbone} opens"
    (wanted,) = (need for need in needs(params, free) if need.what == "disk")
    if wanted.problem:
        raise DsdError(f"a run needs up to {_gigabytes(wanted.amount)}, which is {wanted.problem}")
    return f"{_gigabytes(free)} free, a run needs up to {_gigabytes(wanted.amount)}"


def _outside(params: Params) -> Iterator[Check]:
    """What has to come from elsewhere: the rows of the hub, of addresses and of the user's own folders."""
    yield Check("hub", partial(_hub, params), "log in with `hf auth login`, or set HF_TOKEN")
    for name, row in params.datasets.items():
        if not isinstance(row, DrawnDataset):
            yield Check(f"dataset {name}", partial(_dataset, params, name), ACCESS)


def _hub(params: Params) -> str:
    """Who asks; whether that suffices, the rows tell."""
    from huggingface_hub import constants, get_token

    from dsd.datasets import benchmark

    datasets = [benchmark(row.kind).repository(row) for row in params.datasets.values()]
    sources = [row.source for row in (*params.backbones.values(), *datasets) if row is not None]
    if all(Path(source).exists() for source in sources):
        return "nothing in params.yaml is on it"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: what is in the cache will have to do"
    return f"{constants.ENDPOINT}, {'with a token' if get_token() else 'without a token: what is open to all'}"


def _dataset(params: Params, name: str) -> str:
    from huggingface_hub import constants

    from dsd.datasets import benchmark

    row = params.datasets[name]
    if (DATA / "download" / name / "annotations.jsonl").exists():
        return "downloaded"
    if constants.HF_HUB_OFFLINE and benchmark(row.kind).repository(row):
        return "HF_HUB_OFFLINE is set: not asked"
    size = benchmark(row.kind).remote(name, row)
    return f"{row.kind}, {_gigabytes(size)} to fetch" if size else f"{row.kind}, nothing to fetch"


def _stores() -> Iterator[Check]:
    docs = "see “Stores” in docs/operations.md"
    yield Check("MLflow", partial(_store, stores.MLFLOW, stores.uri()), docs)
    setting = stores.PREFECT if stores.PREFECT in os.environ else stores.DATABASE
    yield Check("Prefect", partial(_store, setting, os.environ.get(setting)), docs)


def _store(setting: str, address: str | None) -> str:
    if address is None:
        return "a server and database of this workspace, with each run"
    stores.reach(setting, address, seconds=int(SECONDS) - 5)
    return stores.shown(address)


def _project() -> Iterator[Check]:
    yield Check("Git", _git, "clone the project, or `git init` and commit: DVC and presets need it")
    yield Check("DVC", _dvc, "run from the folder that has dvc.yaml; `dvc doctor` says more")
    yield Check("DVC cache", _cache, "make room for it elsewhere: `dvc cache dir PATH`")
    yield Check("DVC remote", _remote, "correct it with `dvc remote modify`; “Stores” in docs/operations.md")


def _git() -> str:
    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            raise DsdError((done.stderr.strip() or "git failed").splitlines()[-1])
        return done.stdout.strip()

    try:
        commit, branch = git("rev-parse", "--short", "HEAD"), git("rev-parse", "--abbrev-ref", "HEAD")
    except FileNotFoundError:
        raise DsdError("git is not installed") from None
    changed = len(git("status", "--porcelain").splitlines())
    return f"{commit} ({branch}), {f'not committed: {changed}' if changed else 'all committed'}"


def _dvc() -> str:
    from flows.reproduce import waiting

    stages = waiting()
    return f"to run: {', '.join(stages)}" if stages else "everything is up to date"


def _cache() -> str:
    from flows.reproduce import cache

    folder = cache()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise DsdError(f"{folder}: nothing may be written to {there}")
    return f"{folder}, {_gigabytes(shutil.disk_usage(there).free)} free"


def _remote() -> str:
    from flows.reproduce import remote

    return remote() or "none (`dvc remote add -d NAME ADDRESS`)"
