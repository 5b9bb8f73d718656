"""Whatever happens to a reproduction: run again, it ends with the same bytes, or one line says what to mend first.

The models are tiny, all else is the real thing: `python -m flows.reproduce` over DVC, Prefect and MLflow.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.chaos import (
    PHASES,
    VICTIMS,
    Mounts,
    Reference,
    Reproduction,
    State,
    check_alone,
    check_cache,
    check_one_line,
    forget,
    held,
    mounts,
    outside,
    run,
    workspace,
)
from tests.test_pipeline import environment

pytestmark = pytest.mark.chaos
KILLS, SEED = 30, 6


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference.make(tmp_path_factory.mktemp("chaos"))


@pytest.fixture
def finished(reference: Reference) -> Path:
    """The workspace of an undisturbed reproduction, as that has left it."""
    return reference.restore()


def check_same(ended: Reproduction, reference: Reference, seen: Path | None = None) -> None:
    """The run has succeeded, with the bytes of the undisturbed one, each entry of MLflow once, and nothing left over.

    Args:
        seen: where the folder is found, if it is in a namespace.
    """
    assert ended.popen.returncode == 0, ended.output
    folder = seen or ended.folder
    found = State.of(folder)
    assert found.files == reference.state.files
    assert found.entries == reference.state.entries
    check_cache(folder)
    check_alone(ended.folder)


def test_kills(tmp_path: Path, reference: Reference, capsys: pytest.CaptureFixture[str]) -> None:
    """kill -9 at random moments of every phase; what was killed goes on with the next run, until it is through.

    A round takes a fresh workspace through kills in the order of the phases. Where a run has passed the phase that a
    kill was meant for, it falls into the one that the run is in.
    """
    rng = random.Random(SEED)
    kills: list[Kill] = []
    for number in count():
        folder = workspace(tmp_path / f"round-{number}")
        for phase in round_of(rng)[: KILLS - len(kills)]:
            started = Reproduction(folder)
            if started.reach(phase, rng.random(), reference.seconds):
                kills.append(kill(started, VICTIMS[(len(kills) + number) % len(VICTIMS)]))
                assert "Traceback" not in started.output, started.output
            else:
                assert started.wait() == 0, started.output
        ended = run(folder)
        check_same(ended, reference)
        shutil.rmtree(folder)
        if len(kills) == KILLS:
            break
    counts = Counter(kill.phase for kill in kills)
    said = ["", *map(str, kills), ", ".join(f"{phase} {hits}" for phase, hits in counts.items()), ""]
    with capsys.disabled():
        sys.stdout.write("\n".join(said))
    assert {kill.phase for kill in kills} == {*PHASES, "between"}


def round_of(rng: random.Random) -> list[str]:
    """Every phase, and DVC's own work after one of the stages."""
    place = rng.randrange(2, len(PHASES))
    return [*PHASES[:place], "between", *PHASES[place:]]


def kill(started: Reproduction, victim: str) -> Kill:
    phase, seconds = started.phase() or "ended", time.monotonic() - started.began
    hit = started.kill(victim)
    status = started.wait()
    last = started.output.strip().splitlines()[-1:] if status > 0 else []
    return Kill(started.folder.name, phase, seconds, hit, " ".join([str(status), *last]))


class Kill(NamedTuple):
    workspace: str
    phase: str
    seconds: float
    victim: str
    ended: str

    def __str__(self) -> str:
        return f"{self.workspace:8} {self.phase:9} {self.seconds:6.1f} s  {self.victim:7} {self.ended}"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0b1010
    path.write_bytes(data)


DAMAGES: dict[str, list[tuple[str, Callable[[Path], None]]]] = {
    "raw": [("download/*/annotations.jsonl", cut), ("prepare/*/examples.parquet", cut)],
    "pictures": [("download/*/images/*", empty), ("prepare/*/images.parquet", flip)],
    "shards": [("cache/*/latents-*.safetensors", flip), ("score/*/evidence-*.safetensors", flip)],
    "manifests": [("cache/*/texts-*.json", empty), ("score/*/index.json", cut)],
    "learned": [("train/*/dsd/prompt.safetensors", flip), ("train/*/clip-prompt/prompt.safetensors", cut)],
    "summaries": [("train/*/dsd/summary.json", cut), ("train/*/clip-finetune/curve.csv", cut)],
    "results": [("evaluate/metrics.json", empty), ("evaluate/scores/*.parquet", cut), ("report/index.html", cut)],
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_files(finished: Path, reference: Reference, kind: str) -> None:
    for pattern, damage in DAMAGES[kind]:
        damage(sorted((finished / "data").glob(pattern))[0])
    check_same(run(finished), reference)


@pytest.mark.parametrize("mode", [0o644, 0o444])
def test_a_damaged_file_in_the_cache_of_dvc(finished: Path, reference: Reference, mode: int) -> None:
    """It comes back with `dvc checkout`: DVC looks into files that can be written to, and trusts all others.

    What reads the evidence sees the damage all the same, and the next run computes it again.
    """
    shard = sorted((finished / "data").glob("score/*/evidence-*.safetensors"))[0]
    name = hashlib.md5(shard.read_bytes()).hexdigest()
    kept = finished / ".dvc" / "cache" / "files" / "md5" / name[:2] / name[2:]
    kept.chmod(0o644)
    flip(kept)
    kept.chmod(mode)
    shutil.rmtree(finished / "data" / "score")
    command = [Path(sys.executable).parent / "dvc", "checkout", "-q", "data/score"]
    subprocess.run(command, cwd=finished, env=environment() | outside(finished), check=mode == 0o444)
    forget(finished, "evaluate")
    ended = run(finished)
    if mode == 0o444:
        assert f"{shard.stem}: missing or damaged; run the stage `score` again" in check_one_line(ended)
        ended = run(finished)
        shutil.copy(shard, kept)  # DVC goes on trusting it
    check_same(ended, reference)


def test_a_damaged_lock(finished: Path, reference: Reference) -> None:
    lock = finished / "dvc.lock"
    whole = lock.read_text()
    lock.write_text(whole[: len(whole) // 2] + "\n][")
    assert "dvc.lock" in check_one_line(run(finished))
    lock.write_text(whole)
    check_same(run(finished), reference)


def test_a_list_of_paths_in_use_that_a_kill_has_cut_short(finished: Path, reference: Reference) -> None:
    (finished / ".dvc" / "tmp" / "rwlock").write_text('{"read": {"')
    check_same(run(finished), reference)


def test_a_training_whose_state_is_damaged(finished: Path, reference: Reference) -> None:
    forget(finished, "train")
    started = Reproduction(finished)
    while not (states := list((finished / "data" / "train").rglob("state.pt"))):
        assert started.phase(), started.output
        time.sleep(0.02)
    started.kill("group")
    started.wait()
    cut(states[0])
    check_same(run(finished), reference)


def test_a_damaged_checkpoint(finished: Path, reference: Reference) -> None:
    weights = finished / "models" / "embedded" / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    cut(weights)
    assert "models/embedded/unet: does not load as UNet2DConditionModel" in check_one_line(run(finished))
    weights.write_bytes(whole)
    check_same(run(finished), reference)


def test_a_prefect_server_that_goes_away(finished: Path, reference: Reference) -> None:
    forget(finished, "prepare")
    started = Reproduction(finished)
    while started.phase() != "cache":
        assert started.phase(), started.output
        time.sleep(0.02)
    started.kill("server")
    started.wait()
    assert "Prefect server" in check_one_line(started)
    check_same(run(finished), reference)


@pytest.mark.parametrize("stale", ["train", "report"])
def test_mlflows_database_is_locked(finished: Path, reference: Reference, stale: str) -> None:
    forget(finished, stale)
    with held(finished / "mlflow.db"):
        assert "mlflow.db" in check_one_line(run(finished))
    check_same(run(finished), reference)


def test_prefects_database_is_locked(finished: Path, reference: Reference) -> None:
    forget(finished, "evaluate")
    with held(finished / ".prefect" / "prefect.db"):
        assert "Prefect" in check_one_line(run(finished))
    check_same(run(finished), reference)


@pytest.mark.parametrize("place", [".", "data", ".dvc"])
def test_a_full_disk(finished: Path, reference: Reference, place: str) -> None:
    forget(finished, "prepare")
    with mounts() as there:
        small_disk(there, finished / place)
        assert "disk full" in check_one_line(there.run(finished))
        (there.root / finished.relative_to("/") / place / "filler").unlink()
        check_same(there.run(finished), reference, there.root / finished.relative_to("/"))


def small_disk(there: Mounts, folder: Path) -> None:
    """Puts a folder onto a file system of 64 MB, of which a file `filler` leaves but 100 KB."""
    aside = folder.with_name(f"{folder.name}.aside")
    there.inside("cp", "-a", str(folder), str(aside))
    there.inside("mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder))
    there.inside("cp", "-a", f"{aside}/.", str(folder))
    there.inside("rm", "-r", str(aside))
    script = 'left=$(df --output=avail -k "$0" | tail -1); head -c "$((left - 100))K" /dev/zero > "$0/filler"'
    there.inside("sh", "-c", script, str(folder))


@pytest.mark.parametrize("place", [".", "data", ".dvc"])
def test_a_read_only_folder(finished: Path, reference: Reference, place: str) -> None:
    forget(finished, "evaluate")
    with mounts() as there:
        folder = str(finished / place)
        there.inside("mount", "--bind", folder, folder)
        there.inside("mount", "-o", "remount,bind,ro", folder)
        assert "read-only" in check_one_line(there.run(finished)).lower()
    check_same(run(finished), reference)


def test_a_clock_that_jumps(finished: Path, reference: Reference) -> None:
    """A year ahead within a training, and back to before it within the next stage."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler: the clock is put before that of the C library")
    library, clock = finished.with_name("clock.so"), finished.with_name("clock")
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    clock.write_text("0")
    forget(finished, "prepare")
    started = Reproduction(finished, LD_PRELOAD=str(library), CLOCK_FILE=str(clock))
    for stage, days in (("train", 365), ("score", -30)):
        while started.phase() != stage:
            assert started.phase(), started.output
            time.sleep(0.02)
        time.sleep(2)
        clock.write_text(str(days * 86400))
    started.wait()
    check_same(started, reference)
    assert "up to date" in run(finished).output


def test_files_from_the_past_and_the_future(finished: Path, reference: Reference) -> None:
    for number, path in enumerate(sorted((finished / "data").rglob("*"))):
        os.utime(path, (0, 0) if number % 2 else (4e9, 4e9))
    ended = run(finished)
    assert "up to date" in ended.output
    check_same(ended, reference)
