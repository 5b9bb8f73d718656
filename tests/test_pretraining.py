"""Pretraining: outputs load, training resumes exactly, and its state belongs to one recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from dsd.config import FitParams, Params
from dsd.errors import ParamsError
from dsd.models import load_clip, load_diffusion
from dsd.pretraining import recipe as pretraining
from dsd.pretraining.recipe import Loss, claim, fit, pretrain, tokenizer
from dsd.scenes.captions import vocabulary
from tests.tiny import SIZES

CPU = torch.device("cpu")


class Stop(Exception):
    """Simulates a kill between two steps."""


def regression(module: nn.Linear, stop_at: int | None = None) -> Loss:
    calls = 0

    def loss(generator: torch.Generator) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise Stop
        x = torch.randn(8, 3, generator=generator)
        return {"loss": (module(x) - x.sum(-1, keepdim=True)).square().mean()}

    return loss


def trained(root: Path, settings: FitParams, stop_at: int | None = None) -> Tensor:
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    root.mkdir(exist_ok=True)
    list(fit("line", module, regression(module, stop_at), settings, root, seed=0))
    return module.weight.detach()


def test_an_interrupted_training_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "EVERY", pretraining.WINDOW)
    settings = FitParams(steps=100, batch=8, learning_rate=0.05, warmup=5, weight_decay=0.0, ema=0.8, bfloat16=False)
    whole = trained(tmp_path / "whole", settings)
    with pytest.raises(Stop):
        trained(tmp_path / "cut", settings, stop_at=57)
    assert torch.equal(trained(tmp_path / "cut", settings), whole)
    assert torch.allclose(whole, torch.ones(1, 3), atol=0.05)  # and it learned
    assert (tmp_path / "cut" / "line.csv").read_text().splitlines()[0] == "step,loss"


def test_pretrained_checkpoints_load(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("quality", "write_cards"):
        monkeypatch.setattr(pretraining, name, lambda *_: None)
    work, target = tmp_path / "work", tmp_path / "models"
    params = params.model_copy(update={"pretrain": SIZES})
    list(pretrain(params, work, target))
    diffusion = load_diffusion(
        params.backbones["embedded"].model_copy(update={"source": str(target / "embedded")}), CPU
    )
    assert diffusion.schedule.config.prediction_type == "v_prediction"
    assert diffusion.resolution == SIZES.resolution
    load_clip(params.backbones["embedded-clip"].model_copy(update={"source": str(target / "embedded-clip")}), CPU)
    list(pretrain(params, work, target))  # again: from the finished state


def test_the_state_of_another_recipe_is_not_resumed(tmp_path: Path) -> None:
    claim(tmp_path, SIZES)
    claim(tmp_path, SIZES.model_copy(update={"diffusion": SIZES.clip.model_copy(update={"steps": 9})}))
    with pytest.raises(ParamsError, match=r"pretrain\.text_width: 64, but .* has a training with 32"):
        claim(tmp_path, SIZES.model_copy(update={"text_width": 64}))


def test_the_tokenizer_is_that_of_the_checkpoints_in_every_process() -> None:
    """The weights depend on token ids, so a training that resumes in another process needs the same ids."""
    made = tokenizer(vocabulary(), 24)
    assert all(len(made(word).input_ids) == 3 for word in vocabulary())
    for folder in ("embedded/tokenizer", "embedded-clip/tokenizer"):
        shipped = CLIPTokenizer.from_pretrained(Path(__file__).parent.parent / "models" / folder)
        assert shipped.get_vocab() == made.get_vocab()
        text = "a red circle left of a blue star"
        assert shipped(text).input_ids == made(text).input_ids
