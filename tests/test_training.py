"""Few-shot training: losses by hand, gradients, learning, and resuming to the bit."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from dsd.config import Params
from dsd.data.draws import Draw
from dsd.data.examples import MatchingExample, read_examples
from dsd.engine.session import Folders, Session
from dsd.errors import DataError
from dsd.training import LEARNERS
from dsd.training.clip_heads import HeadLearner
from dsd.training.loop import Processes, Trainer, Training, accuracy, matching_loss, shape, table, train
from tests.conftest import ROOT
from tests.gradients import check_gradient

EXAMPLE = MatchingExample("x", ("i",), ("a", "b", "c", "d"), ((0, 2),), "all")
SQUARE = MatchingExample("y", ("i", "j"), ("a", "b"), ((1, 0), (0, 1)), "all")


METHODS = {"dsd": "prompt.safetensors", "clip-finetune": "weights.safetensors", "clip-prompt": "prompt.safetensors"}


def opened(params: Params, prepared: Path, cached: Path, trained: Path | None = None) -> Session:
    return Session("scenes-com", params, Folders(prepared, cached, trained or cached))


def steps_of(
    params: Params, prepared: Path, cached: Path, trained: Path, method: str = "dsd"
) -> Iterator[dict[str, float]]:
    return train(opened(params, prepared, cached, trained), Training(method))


def run(params: Params, prepared: Path, cached: Path, trained: Path, method: str = "dsd") -> list[dict[str, float]]:
    return list(steps_of(params, prepared, cached, trained, method))


def test_a_right_pair_comes_first_and_no_text_twice() -> None:
    for seed in range(20):
        [pairs], [right] = table(EXAMPLE, 1, 3, Random(seed))
        assert pairs[0].text == "c"
        assert len(set(pairs)) == 3
        assert right == [True, False, False]


def test_a_square_is_compared_whole_from_either_right_pair() -> None:
    tables = {tuple(pairs[0]): right for pairs, right in (table(SQUARE, 2, 2, Random(seed)) for seed in range(20))}
    assert {first[0] for first in tables} == {("j", "a"), ("i", "b")}
    assert all(right == [[True, False], [False, True]] for right in tables.values())


def test_another_right_text_is_no_negative() -> None:
    twice = MatchingExample("z", ("i",), ("a", "b", "c"), ((0, 0), (0, 2)), "all")
    for seed in range(20):
        [pairs], [right] = table(twice, 1, 2, Random(seed))
        assert (pairs[1].text, right) == ("b", [True, False])


def test_a_table_is_as_large_as_the_poorest_example_allows() -> None:
    twice = MatchingExample("z", ("i",), ("a", "b", "c", "d"), ((0, 0), (0, 2)), "all")
    assert [shape([EXAMPLE], most) for most in (2, 4, 9)] == [(1, 2), (1, 4), (1, 4)]
    assert shape([EXAMPLE, twice], 4) == (1, 3)
    assert shape([SQUARE], 4) == (2, 2)
    with pytest.raises(DataError, match="neither a wrong image nor a wrong text"):
        shape([MatchingExample("o", ("i",), ("a",), ((0, 0),), "all")], 4)


ROW = torch.tensor([[[True, False, False]]])
DIAGONAL = torch.tensor([[[True, False], [False, True]]])


@pytest.mark.parametrize("loss", ["softmax", "binary", "hinge"])
def test_losses_fall_when_the_right_pairs_win(loss: str, params: Params) -> None:
    training = params.training["dsd"].model_copy(update={"loss": loss, "temperature": 1.0, "margin": 0.1})
    for mask in (ROW, ROW.transpose(1, 2), DIAGONAL):
        right, wrong = 2.0 * mask, 2.0 * ~mask
        assert matching_loss(right, mask, training) < matching_loss(wrong, mask, training)
        assert (accuracy(right, mask), accuracy(wrong, mask)) == (1, 0)
        # A constant added to an example's scores is no evidence.
        assert torch.allclose(matching_loss(right, mask, training), matching_loss(right + 5, mask, training))


def test_softmax_and_hinge_by_hand(params: Params) -> None:
    scores = torch.tensor([[[1.0, 0.5, 0.0]]])
    softmax = params.training["dsd"].model_copy(update={"loss": "softmax", "temperature": 0.5})
    expected = -torch.log(torch.exp(torch.tensor(2.0)) / torch.exp(torch.tensor([2.0, 1.0, 0.0])).sum())
    assert torch.allclose(matching_loss(scores, ROW, softmax), expected)
    hinge = params.training["dsd"].model_copy(update={"loss": "hinge", "temperature": 0.5, "margin": 0.7})
    assert matching_loss(scores, ROW, hinge).item() == pytest.approx((0.7 + 0.5 - 1.0) / 0.5)


def test_binary_by_hand(params: Params) -> None:
    binary = params.training["dsd"].model_copy(update={"loss": "binary", "temperature": 0.5})
    logits = [2 * (score - 0.5) for score in (1.0, 0.5, 0.0)]  # over the example's mean
    expected = np.mean([np.log(1 + np.exp(-logits[0])), *(np.log(1 + np.exp(logit)) for logit in logits[1:])])
    assert matching_loss(torch.tensor([[[1.0, 0.5, 0.0]]]), ROW, binary).item() == pytest.approx(expected)


def test_the_prompts_gradient_is_that_of_the_score(params: Params, prepared: Path, cached: Path) -> None:
    """Its length against the finite difference along it, through every layer of the U-Net."""
    plain = params.methods["dsd"].model_copy(update={"heads": "mean"})  # eq. 7 holds the weights fixed
    of = params.model_copy(update={"methods": {**params.methods, "dsd": plain}})
    learner = LEARNERS["attention prompt"](opened(of, prepared, cached), "dsd")
    weights = list(learner.module.parameters())
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    examples = read_examples(prepared / "examples.parquet", "train")[:2]
    tables = [table(example, 2, 2, Random(0))[0] for example in examples]
    draws = [Draw(0.2, 1), Draw(0.6, 2)]
    signs = torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]])

    def value() -> torch.Tensor:
        return (learner.scores(tables, draws) * signs).sum()

    check_gradient(value, weights, step=2e-2, rel=0.03)


def test_a_gradient_does_not_depend_on_what_fits_into_a_batch(params: Params, prepared: Path, cached: Path) -> None:
    examples = read_examples(prepared / "examples.parquet", "train")[:3]
    tables = [table(example, 2, 2, Random(n))[0] for n, example in enumerate(examples)]
    results = {}
    for batch_size in (64, 5, 1):  # all twelve rows at once, some, one
        runtime = params.runtime.model_copy(update={"batch_size": batch_size})
        session = opened(params.model_copy(update={"runtime": runtime}), prepared, cached)
        learner = LEARNERS["attention prompt"](session, "dsd")
        scores = learner.scores(tables, [Draw(0.4, n) for n in range(3)])
        scores.square().sum().backward()
        results[batch_size] = [scores.detach(), *(weight.grad for weight in learner.module.parameters())]
    for batch_size in (5, 1):
        for whole, parts in zip(results[64], results[batch_size], strict=True):
            torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_was_opened_for_scoring_can_be_trained(
    method: str, params: Params, prepared: Path, tmp_path: Path
) -> None:
    """Weights and tables that are made in inference mode would have no gradient."""
    session = opened(params, prepared, tmp_path)
    with torch.inference_mode():
        _ = session.backbone.unet, session.backbone.text_encoders, session.backbone._alphas
        session.clip("embedded-clip").open()
    examples = session.examples("train")
    learner = LEARNERS[str(params.methods[method].learns)](session, method)
    assert np.isfinite(Trainer(method, params.training[method], 0, learner, examples).advance()["loss"])


def test_a_square_is_four_choices(params: Params) -> None:
    """Of an image for each text and of a text for each image."""
    [[a, b], [c, d]] = [[0.3, 0.1], [0.6, 0.4]]
    softmax = params.training["dsd"].model_copy(update={"loss": "softmax", "temperature": 1.0})
    choices = [(a, b), (a, c), (d, c), (d, b)]
    expected = np.mean([np.log(1 + np.exp(wrong - right)) for right, wrong in choices])
    scores = torch.tensor([[[a, b], [c, d]]])
    assert matching_loss(scores, DIAGONAL, softmax).item() == pytest.approx(expected)
    hinge = params.training["dsd"].model_copy(update={"loss": "hinge", "temperature": 1.0, "margin": 0.05})
    expected = np.mean([max(0, 0.05 + wrong - right) for right, wrong in choices])
    assert matching_loss(scores, DIAGONAL, hinge).item() == pytest.approx(expected, abs=1e-6)
    assert accuracy(scores, DIAGONAL) == 0  # each loses one of its two choices


@pytest.mark.parametrize("method", METHODS)
def test_training_writes_what_it_learned_once(
    method: str, params: Params, prepared: Path, cached: Path, tmp_path: Path
) -> None:
    curve = run(params, prepared, cached, tmp_path, method)
    assert [row["step"] for row in curve] == [1, 2, 3, 4]
    assert {path.name for path in (tmp_path / method).iterdir()} == {METHODS[method], "curve.csv", "summary.json"}
    assert run(params, prepared, cached, tmp_path, method) == curve  # done: read back, not trained again


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_training_ends_with_the_same_bits(
    method: str, params: Params, prepared: Path, cached: Path, tmp_path: Path
) -> None:
    whole = run(params, prepared, cached, tmp_path / "whole", method)
    cut = steps_of(params, prepared, cached, tmp_path / "cut", method)
    for _ in range(3):
        next(cut)
    cut.close()  # as a kill after step 3 and its checkpoint of step 2
    assert run(params, prepared, cached, tmp_path / "cut", method) == whole
    for name in (METHODS[method], "curve.csv", "summary.json"):
        assert (tmp_path / "cut" / method / name).read_bytes() == (tmp_path / "whole" / method / name).read_bytes()


@pytest.mark.parametrize("middle", [b"", b"?"])
def test_a_damaged_state_is_replaced(
    middle: bytes, params: Params, prepared: Path, cached: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(params, prepared, cached, tmp_path, "clip-finetune")
    (tmp_path / "clip-finetune" / "summary.json").unlink()
    cut = steps_of(params, prepared, cached, tmp_path, "clip-finetune")
    for _ in range(3):
        next(cut)
    cut.close()
    state = (tmp_path / "clip-finetune" / "state.pt").read_bytes()
    half = len(state) // 2
    (tmp_path / "clip-finetune" / "state.pt").write_bytes(state[:half] + (middle and middle + state[half + 1 :]))
    assert run(params, prepared, cached, tmp_path, "clip-finetune") == whole
    assert "state.pt is damaged" in caplog.text


@pytest.mark.parametrize("name", ["weights.safetensors", "curve.csv", "summary.json"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9] + b"123456789")])
def test_damaged_results_are_trained_again(
    name: str, damage: Callable[[Path], Any], params: Params, prepared: Path, cached: Path, tmp_path: Path
) -> None:
    run(params, prepared, cached, tmp_path, "clip-finetune")
    left = {path.name: path.read_bytes() for path in (tmp_path / "clip-finetune").iterdir()}
    damage(tmp_path / "clip-finetune" / name)
    run(params, prepared, cached, tmp_path, "clip-finetune")
    assert {path.name: path.read_bytes() for path in (tmp_path / "clip-finetune").iterdir()} == left


def test_a_state_of_other_params_is_not_resumed(params: Params, prepared: Path, cached: Path, tmp_path: Path) -> None:
    cut = steps_of(params, prepared, cached, tmp_path)
    for _ in range(3):
        next(cut)
    cut.close()
    other = params.model_copy(update={"seed": 1})
    assert [row["step"] for row in run(other, prepared, cached, tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("steps", "examples", "batch", "epochs", "least"),
    [(4, 6, 3, 2, 0), (7, 100, 1, 0.07, 7), (1, 6, 3, 0.1, 0), (5, 6, 99, 5, 4), (9, 6, 3, 2, 9)],
)
def test_steps_are_epochs_of_the_examples(
    steps: int, examples: int, batch: int, epochs: float, least: int, params: Params
) -> None:
    change = {"epochs": epochs, "examples_per_step": batch, "least_steps": least}
    row = params.training["dsd"].model_copy(update=change)
    nothing = SimpleNamespace(module=torch.nn.Linear(1, 1))
    assert Trainer("x", row, 0, nothing, [EXAMPLE] * examples).steps == steps  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_it_learns(
    method: str, params: Params, prepared: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one fixed batch the loss falls: the gradient passes through the frozen layers."""
    fixed: list[object] = []
    rows = Trainer._rows

    def once(self: Trainer) -> object:
        fixed.append(fixed[0] if fixed else rows(self))
        return fixed[0]

    monkeypatch.setattr(Trainer, "_rows", once)
    change = {"epochs": 12.5, "learning_rate": 0.02, "warmup": 1, "checkpoint_every": 100}
    longer = params.training[method].model_copy(update=change)
    curve = run(params.model_copy(update={"training": {method: longer}}), prepared, cached, tmp_path, method)
    assert len(curve) == 25
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.05


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_step(
    where: str, params: Params, prepared: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(params, prepared, cached, tmp_path / "whole", "clip-finetune")
    scores, calls = HeadLearner.scores, [0]

    def overflows(self: HeadLearner, *arguments: Any) -> torch.Tensor:
        calls[0] += 1
        found = scores(self, *arguments)
        if calls[0] == 3:
            return found * torch.inf if where == "loss" else found + (found - found.detach()).abs().sqrt()
        return found

    monkeypatch.setattr(HeadLearner, "scores", overflows)
    rare = {"clip-finetune": params.training["clip-finetune"].model_copy(update={"checkpoint_every": 100})}
    with pytest.raises(DataError, match=r"state\.pt: clip-finetune on scenes-com stopped after step 2.*nan") as error:
        run(params.model_copy(update={"training": rare}), prepared, cached, tmp_path / "cut", "clip-finetune")
    assert "\n" not in str(error.value) and "training.clip-finetune.learning_rate" in str(error.value)
    again = run(params.model_copy(update={"training": rare}), prepared, cached, tmp_path / "cut", "clip-finetune")
    assert again == whole and calls[0] == 5  # steps 3 and 4 alone were taken again


def test_an_empty_few_shot_split_is_an_error(
    params: Params, prepared: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "examples", lambda *_: [])
    with pytest.raises(DataError, match=r"datasets\.scenes-com\.few_shot"):
        run(params, prepared, cached, tmp_path)


def together(
    processes: int, steps: int, method: str, params: Params, prepared: Path, cached: Path, target: Path
) -> subprocess.CompletedProcess[str]:
    """Some steps of a training in several processes. On CPUs Accelerate has no launcher of its own."""
    settings = target.with_suffix(".json")
    settings.write_text(params.model_dump_json())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    given = map(str, (steps, settings, method, prepared, cached, target))
    return subprocess.run([*launch, "-m", "tests.together", *given], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "stopped"), [("dsd", None), ("clip-finetune", 3)])
def test_two_processes_take_the_steps_of_one(
    method: str, stopped: int | None, params: Params, prepared: Path, cached: Path, tmp_path: Path
) -> None:
    """The second process has one example more per step; curve and weights equal those of one process, also resumed."""
    alone = run(params, prepared, cached, tmp_path / "alone", method)
    if stopped:
        assert together(2, stopped, method, params, prepared, cached, tmp_path / "both").returncode == 0
        assert {path.name for path in (tmp_path / "both" / method).iterdir()} == {"state.pt"}
    done = together(2, 9, method, params, prepared, cached, tmp_path / "both")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "2"]
    assert {path.name for path in (tmp_path / "both" / method).iterdir()} == {
        METHODS[method],
        "curve.csv",
        "summary.json",
    }
    with (tmp_path / "both" / method / "curve.csv").open(newline="") as file:
        curve = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert [row["accuracy"] for row in curve] == [row["accuracy"] for row in alone]
    np.testing.assert_allclose([row["loss"] for row in curve], [row["loss"] for row in alone], atol=2e-6)
    learned = [load_file(tmp_path / name / method / METHODS[method]) for name in ("alone", "both")]
    for name, tensor in learned[0].items():
        torch.testing.assert_close(tensor, learned[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_more_processes_than_examples_is_one_line(params: Params, prepared: Path, cached: Path, tmp_path: Path) -> None:
    done = together(4, 9, "clip-finetune", params, prepared, cached, tmp_path / "four")
    assert done.returncode != 0
    line = "training.clip-finetune.examples_per_step: 3 examples of a step on scenes-com are too few for 4 processes"
    assert f"dsd.errors.DataError: {line}; launch fewer" in done.stderr
    assert not (tmp_path / "four").exists()


@given(st.integers(1, 40), st.integers(1, 8))
def test_every_example_is_one_process_s(examples: int, count: int) -> None:
    count = min(count, examples)
    several = Processes(SimpleNamespace(num_processes=count, process_index=0))
    shares = [list(range(examples))[several.own(examples, number)] for number in range(count)]
    assert [example for share in shares for example in share] == list(range(examples))
    assert min(map(len, shares)) >= 1 and max(map(len, shares)) <= -(-examples // count)
