"""Checkpoints and prompts are registered once, and the gate moves the alias of the champion."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from PIL import Image
from typer.testing import CliRunner

from dsd.config import BackboneParams, Params, load
from dsd.data.examples import MatchingExample, write_examples
from dsd.errors import CheckpointError, DataError, DsdError
from dsd.scorers.evidence import write_index
from dsd.versions import VERSIONS
from flows import tracking
from flows.cli import app
from flows.registry.registry import BACKBONE, CHALLENGER, CHAMPION, Registry, evaluation_key

COM = "scenes-com"
PROMPTS = f"dsd-prompt-{COM}"
EXAMPLES = [MatchingExample(f"e{n}", ("a", "b"), (f"t{n}",), ((0, 0),), ["subject", "object", "predicate"][n % 3])
            for n in range(300)]  # fmt: skip


@pytest.fixture
def measured(workspace: Path, database: Path, models: Path) -> Params:
    """The params of a workspace in Git, in which a checkpoint was measured on one dataset."""
    shutil.copy(database, workspace)
    shutil.copytree(models, workspace / "models")
    (workspace / "dvc.lock").write_text("schema: '2.0'\n")
    write_examples(workspace / "data" / "prepare" / COM / "examples.parquet", (("test", e) for e in EXAMPLES))
    write_index(workspace / "data" / "score" / COM, {}, [], 1, {})
    measure(150)
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(["git", "add", "params.yaml", "dvc.yaml"], check=True)
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *who, "commit", "-qm", "settings"], check=True)
    return load()


def measure(right: int) -> None:
    """Write the results of so many right answers, and a prompt that differs for each number."""
    from dsd.models.prompts import AttentionPrompt

    rows = [{"method": "dsd", "rank": 1 if n < right else 2} for n in range(len(EXAMPLES))]
    scores = Path("data/evaluate/scores")
    scores.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), scores / f"{COM}.parquet")
    share = right / len(EXAMPLES)
    interval = {"value": share, "low": share - 0.05, "high": share + 0.05, "n": len(EXAMPLES)}
    (scores.parent / "metrics.json").write_text(json.dumps({COM: {"dsd": {"macro": interval}}}))
    trained = Path("data/train", COM, "dsd")
    trained.mkdir(parents=True, exist_ok=True)
    prompt = AttentionPrompt(32, [16], 4, rank=2, conditional=False, seed=right)
    prompt.save(trained / "prompt.safetensors", "the backbone it belongs to")


def aliases(model: str = BACKBONE) -> dict[str, int]:
    client = MlflowClient(tracking_uri=tracking.uri())
    return {alias: int(number) for alias, number in client.get_registered_model(model).aliases.items()}


def test_what_was_measured_is_registered_once(measured: Params) -> None:
    version = Registry().register(measured, Path())
    assert Registry().register(measured, Path()) == version
    assert [v.number for v in Registry().versions()] == [1]
    assert version.source == str(Path("models/embedded").resolve()) and len(version.digest) == 32
    assert version.metrics[COM]["dsd"]["macro"]["value"] == 0.5
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert (version.commit, version.verdict) == (head, "")
    assert aliases() == aliases(PROMPTS) == {CHALLENGER: 1}


def test_a_version_is_a_reference_and_a_prompt_a_few_kilobytes(measured: Params) -> None:
    version = Registry().register(measured, Path())
    files = [path for path in Path("mlartifacts").rglob("*") if path.is_file() and version.run in str(path)]
    assert sum(path.stat().st_size for path in files) < 100_000
    assert not [path for path in files if path.suffix == ".safetensors" and path.name != "prompt.safetensors"]
    client = MlflowClient(tracking_uri=tracking.uri())
    prompt = client.get_model_version(PROMPTS, "1")
    assert prompt.tags["dsd.digest"] == version.digest and prompt.tags["dsd.dataset"] == COM
    assert json.loads(prompt.tags["dsd.params"])["seed"] == 0 and len(prompt.tags["dsd.lock"]) == 64


def test_code_that_is_not_committed_shows(measured: Params) -> None:
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("seed: 0", "seed: 1", 1))
    assert not Registry().register(load(), Path()).commit.endswith("+")  # params are tags of their own
    Path("dvc.yaml").write_text("stages: {}\n")
    assert Registry().register(measured, Path()).commit.endswith("+")


def test_the_champion_on_other_examples_replaces_its_old_version(measured: Params) -> None:
    registry = Registry()
    registry.challenge(measured, registry.register(measured, Path()))
    others = measured.model_copy(update={"seed": 1})
    write_examples(Path("data/prepare", COM, "examples.parquet"), (("test", e) for e in EXAMPLES[::-1]))
    other = measured.backbones["embedded"].model_copy(update={"prediction": "v_prediction"})
    rows = {**measured.backbones, "embedded": other}
    another = registry.register(others.model_copy(update={"backbones": rows}), Path())
    with pytest.raises(DataError, match="the champion was measured on other examples"):
        registry.challenge(others, another)
    told = registry.versions()[0]
    assert (told.verdict, told.against) == ("not compared", 1) and "was measured on other examples" in told.reason
    verdict = registry.challenge(others, registry.register(others, Path()))
    assert (verdict.promoted, verdict.reason) == (True, "the champion itself, measured on other examples than before")
    assert aliases()[CHAMPION] == 3
    assert not registry.challenge(others, another).promoted  # a tie now


def test_a_version_has_the_row_that_opens_its_checkpoint(measured: Params) -> None:
    from dsd.models.checkpoint import locate

    version = Registry().register(measured, Path())
    assert version.row.digest == version.digest == locate(version.row)[1]
    assert version.row.source == version.source and version.name == "embedded"


def test_other_results_are_another_version(measured: Params) -> None:
    first = Registry().register(measured, Path())
    measure(200)
    second = Registry().register(measured, Path())
    assert (first.number, second.number) == (1, 2) and first.key == second.key
    assert Registry().versions() == [second, first]
    assert aliases() == aliases(PROMPTS) == {CHALLENGER: 2}


def test_the_better_challenger_is_promoted_with_its_prompts(measured: Params) -> None:
    registry = Registry()
    assert registry.challenge(measured, registry.register(measured, Path())).reason == "there was no champion"
    assert aliases() == aliases(PROMPTS) == {CHAMPION: 1}
    measure(200)
    verdict = registry.challenge(measured, registry.register(measured, Path()))
    assert verdict.promoted and aliases() == aliases(PROMPTS) == {CHAMPION: 2}
    shown = registry.alias(CHAMPION)
    assert shown is not None and (shown.verdict, shown.reason) == ("promoted", verdict.reason)


def test_the_champion_before_comes_back_with_its_prompts(measured: Params) -> None:
    registry = Registry()
    with pytest.raises(DsdError, match="there is no champion; `dsd promote` registers one"):
        registry.rollback()
    registry.challenge(measured, registry.register(measured, Path()))
    with pytest.raises(DsdError, match="version 1 is the first champion: there is none before it"):
        registry.rollback()
    measure(200)
    assert registry.challenge(measured, registry.register(measured, Path())).promoted
    taken_back, champion = registry.rollback()
    assert (taken_back.number, champion.number) == (2, 1)
    assert aliases() == aliases(PROMPTS) == {CHAMPION: 1}
    newest = registry.versions()[0]
    assert (newest.verdict, newest.reason) == ("rolled back", "version 1 is the champion again")
    assert CliRunner().invoke(app, ["rollback"]).output.startswith("dsd: dsd-backbone version 1 is the first champion")


def test_a_prompt_that_was_trained_again_is_promoted_with_its_own_measurement(measured: Params) -> None:
    registry = Registry()
    registry.register(measured, Path())
    file = Path("data/train", COM, "dsd", "prompt.safetensors")
    learned = file.read_bytes()
    measure(200)
    registry.challenge(measured, registry.register(measured, Path()))
    assert aliases() == aliases(PROMPTS) == {CHAMPION: 2}
    measure(280)
    file.write_bytes(learned)  # as the first had it
    assert registry.challenge(measured, registry.register(measured, Path())).promoted
    assert aliases() == aliases(PROMPTS) == {CHAMPION: 3}


@pytest.mark.parametrize("before", ["_promote", "update_model_version"])
def test_a_killed_promotion_is_completed_by_the_next(
    measured: Params, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    registry = Registry()
    registry.challenge(measured, registry.register(measured, Path()))
    measure(200)
    challenger = registry.register(measured, Path())

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registry if hasattr(registry, before) else registry.client, before, killed)
        with pytest.raises(KeyboardInterrupt):
            registry.challenge(measured, challenger)
    assert registry.versions()[0].verdict == ""
    verdict = registry.challenge(measured, registry.register(measured, Path()))
    assert verdict.promoted and verdict.reason.startswith("better on scenes-com")
    assert aliases() == aliases(PROMPTS) == {CHAMPION: 2}
    shown = registry.alias(CHAMPION)
    assert shown is not None and (shown.verdict, shown.reason, shown.against) == ("promoted", verdict.reason, 1)


def test_a_tie_keeps_the_champion_and_the_reason_is_registered(measured: Params) -> None:
    registry = Registry()
    registry.challenge(measured, registry.register(measured, Path()))
    measure(151)
    kept = registry.register(measured, Path())
    assert not registry.challenge(measured, kept).promoted
    assert aliases() == {CHAMPION: 1, CHALLENGER: 2}
    [shown, _] = registry.versions()
    assert shown.verdict == "kept out" and "a tie keeps the champion: scenes-com" in shown.reason


def test_measurements_by_other_code_are_not_compared(measured: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry()
    registry.challenge(measured, registry.register(measured, Path()))
    before = registry.alias(CHAMPION)
    monkeypatch.setitem(VERSIONS, "evidence", 2)
    with pytest.raises(DataError, match=r"json: measured by other code \(evidence 1 → 2\); run `dsd reproduce` first"):
        registry.register(measured, Path())
    record = Path("data/evaluate/code.json")
    record.write_text(json.dumps({"versions": VERSIONS, "libraries": {"torch": "2.13"}}))
    again = registry.register(measured, Path())
    assert before is not None and again.key != before.key and again.versions["evidence"] == 2
    verdict = registry.challenge(measured, again)  # the champion itself: nothing is comparable with its old results
    assert (verdict.promoted, verdict.reason) == (True, "the champion itself, measured by other code than before")

    record.write_text(json.dumps({"versions": {**VERSIONS, "evidence": 3}}))
    monkeypatch.setitem(VERSIONS, "evidence", 3)
    other = replace(registry.register(measured, Path()), digest="another checkpoint")
    with pytest.raises(DataError, match=r"measured by other code than the champion \(evidence 2 → 3\)"):
        registry.challenge(measured, other)
    [reason] = {v.reason for v in registry.versions() if v.verdict == "not compared"}
    assert reason.startswith("measured by other code")


def test_the_champion_does_not_challenge_itself(measured: Params) -> None:
    registry = Registry()
    registry.challenge(measured, registry.register(measured, Path()))
    again = registry.challenge(measured, registry.register(measured, Path()))
    assert (again.promoted, again.reason) == (False, "it is the champion already")
    assert aliases() == {CHAMPION: 1}
    assert [version.reason for version in registry.versions()] == ["there was no champion"]


def test_a_killed_registration_is_finished_by_the_next(measured: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in ("log_dict", "set_terminated", "create_model_version", "set_registered_model_alias"):
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, step, lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
            with pytest.raises(OSError):
                Registry().register(measured, Path())
    assert Registry().register(measured, Path()).number == 1
    assert aliases() == aliases(PROMPTS) == {CHALLENGER: 1}
    client = MlflowClient(tracking_uri=tracking.uri())
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    assert len(client.search_runs([experiment.experiment_id], "tags.`dsd.kind` = 'evaluation'")) == 1


def test_the_key_depends_on_what_results_depend_on(measured: Params) -> None:
    def key(**changes: object) -> str:
        return evaluation_key(measured.model_copy(update=changes), "digest")

    moved = measured.backbones["embedded"].model_copy(update={"source": "elsewhere"})
    same = [
        {"backbones": {**measured.backbones, "embedded": moved}},
        {"runtime": measured.runtime.model_copy(update={"batch_size": 1})},
        {"gate": measured.gate.model_copy(update={"method": "denoising"})},
        {"studies": {}},
    ]
    assert {key(**changes) for changes in same} == {key()}
    clip = measured.backbones["embedded-clip"].model_copy(update={"source": "elsewhere"})
    others = [
        {"seed": 1},
        {"backbones": {**measured.backbones, "embedded-clip": clip}},
        {"noise": measured.noise.model_copy(update={"draws_per_level": 2})},
    ]
    assert len({key(), evaluation_key(measured, "another"), *(key(**changes) for changes in others)}) == 5


def test_a_registered_prompt_on_another_backbone_is_refused_with_both_digests(
    measured: Params, models: Path, tmp_path: Path
) -> None:
    from dsd.matcher import Matcher

    registry = Registry()
    registry.challenge(measured, registry.register(measured, Path()))
    file = registry.prompt(f"models:/{PROMPTS}@{CHAMPION}", tmp_path)
    assert file.read_bytes() == Path("data/train", COM, "dsd", "prompt.safetensors").read_bytes()
    digest = registry.versions()[0].digest
    with pytest.raises(CheckpointError, match=f"belongs to backbone the backbone it belongs to, not to {digest}"):
        Matcher.from_pretrained(models / "embedded", prompt=file)


@pytest.mark.parametrize(
    "reference", ["models:/nothing@champion", f"models:/{PROMPTS}@nobody", f"models:/{PROMPTS}/9", "models:/"]
)
def test_a_missing_prompt_is_one_line(measured: Params, reference: str, tmp_path: Path) -> None:
    Registry().register(measured, Path())
    with pytest.raises(DsdError) as caught:
        Registry().prompt(reference, tmp_path)
    assert f"--prompt {reference}: no such registered prompt" in str(caught.value) and PROMPTS in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_has_changed_is_refused(models: Path) -> None:
    from dsd.models.checkpoint import locate

    row = BackboneParams(
        family="stable-diffusion", source=str(models / "embedded"), revision=None, lora=None, dtype="float32"
    )
    digest = locate(row)[1]
    assert locate(row.model_copy(update={"digest": digest}))[1] == digest
    with pytest.raises(CheckpointError, match=f"is not the checkpoint of digest another, but {digest}"):
        locate(row.model_copy(update={"digest": "another"}))


def test_promote_prints_the_verdict(measured: Params) -> None:
    run = CliRunner().invoke(app, ["promote"])
    page = Path("data/leaderboard/index.html")
    assert run.exit_code == 0
    assert run.stdout == f"{BACKBONE} version 1: promoted\nthere was no champion\nleaderboard: {page}\n"
    assert "there was no champion" in page.read_text()
    assert Registry().client.get_model_version(BACKBONE, "1").description == "promoted: there was no champion"
    measure(150 + 50)
    shown = json.loads(CliRunner().invoke(app, ["promote", "--json"]).stdout)
    assert (shown["version"], shown["promoted"]) == (2, True)
    assert shown["compared"][COM]["difference"]["n"] == 300 and np.isclose(
        shown["compared"][COM]["difference"]["value"], 1 / 6
    )


def test_promoting_is_a_flow_too(measured: Params, prefect_server: None) -> None:
    from flows.watch.deployment import promote  # it loads prefect

    assert promote(return_state=True).message == "version 1: promoted: there was no champion"
    measure(100)
    state = promote(return_state=True)
    assert state.is_completed() and str(state.message).startswith("version 2: not promoted: may have lost")
    Path("data/evaluate/metrics.json").unlink()
    assert promote(return_state=True).is_failed()


def test_match_takes_a_registered_prompt(measured: Params) -> None:
    Registry().register(measured, Path())
    Image.new("RGB", (32, 32)).save("image.png")
    arguments = ["match", "image.png", "--text", "a red circle", "--prompt", f"models:/{PROMPTS}@{CHALLENGER}"]
    arguments += ["--checkpoint", "models/embedded"]
    run = CliRunner().invoke(app, arguments)
    digest = Registry().versions()[0].digest  # read, and refused: it belongs to none of these
    assert run.exit_code == 1 and f"belongs to backbone the backbone it belongs to, not to {digest}" in str(
        run.exception
    )


def test_promoting_nothing_is_one_line(workspace: Path) -> None:
    with pytest.raises(DataError, match=r"metrics.json: no results in this workspace; run `dsd reproduce` first"):
        Registry().register(load(), Path())
