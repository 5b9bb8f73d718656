"""Checkpoints: ε and v agree, and every defect of a folder is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dsd import Matcher
from dsd.config import Params
from dsd.engine.session import Folders, Session
from dsd.errors import CheckpointError
from dsd.models import load, load_clip, load_diffusion, stable_diffusion
from dsd.models.attention import Capture, cross_attention_layers
from dsd.models.checkpoint import commit, locate, remote
from dsd.models.clip_heads import cosine
from dsd.models.prompts import AttentionPrompt
from dsd.models.stable_diffusion import StableDiffusion
from dsd.training.loop import Training, training_key
from tests.hubserver import COMMIT, TOKEN, Hub, connected, files_of
from tests.tiny import row, save_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "embedded", tmp_path / "checkpoint"))


def test_noising_and_prediction_are_those_of_the_scheduler(params: Params) -> None:
    backbone = load_diffusion(params.backbones["embedded"], CPU)
    latents, noise = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 500, 999])
    expected = backbone.schedule.add_noise(latents, noise, timesteps)
    assert torch.allclose(backbone.add_noise(latents, noise, timesteps), expected, atol=1e-6)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize("method", ["cross-attention", "denoising"])
def test_the_same_model_scores_the_same_whether_it_predicts_noise_or_velocity(folder: Path, method: str) -> None:
    """The U-Net of the second answers v for the ε of the first, by v = (ε − √(1 − ᾱ) z_t) / √ᾱ (Salimans and Ho
    2022)."""
    matchers = []
    for predicted in ("epsilon", "v_prediction"):
        edit(folder / SCHEDULER, prediction_type=predicted)
        matchers.append(Matcher.from_pretrained(folder, method=method, levels=(0.2, 0.5, 0.8)))
    backbone = matchers[1].backbone
    predict, alphas = backbone.unet.forward, backbone.schedule.alphas_cumprod

    def velocity(noised: torch.Tensor, timesteps: torch.Tensor, *args: torch.Tensor) -> object:
        output = predict(noised, timesteps, *args)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        output.sample = (output.sample - (1 - alpha).sqrt() * noised) / alpha.sqrt()
        return output

    backbone.unet.forward = velocity  # type: ignore[method-assign]
    images = list(np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8))
    texts = ["a red circle", "a blue star", "a green ring left of a pink bolt"]
    noise, v = (matcher.score(images, texts) for matcher in matchers)
    assert torch.allclose(noise, v, atol=1e-6) and noise.std() > 1e-5


def test_a_row_says_what_is_predicted_where_the_scheduler_does_not(folder: Path) -> None:
    assert load_diffusion(row(folder), CPU).prediction == "v_prediction"
    assert load_diffusion(row(folder, prediction="v_prediction"), CPU).prediction == "v_prediction"
    with pytest.raises(CheckpointError) as error:
        load_diffusion(row(folder, prediction="epsilon"), CPU)
    assert str(error.value) == (
        f"{folder}: prediction is epsilon, but the scheduler has v_prediction; set it to v_prediction or null"
    )
    edit(folder / SCHEDULER, prediction_type=None)  # as the oldest say nothing
    plain, velocity = (load_diffusion(row(folder, prediction=said), CPU) for said in (None, "v_prediction"))
    assert (plain.prediction, velocity.prediction) == ("epsilon", "v_prediction")
    assert plain.digest != velocity.digest
    edit(folder / SCHEDULER, prediction_type="sample")
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json: prediction_type 'sample' is neither"):
        load_diffusion(row(folder), CPU)
    (folder / SCHEDULER).write_text("{")
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json: does not load"):
        load_diffusion(row(folder), CPU)


def test_the_resolution_is_that_of_its_training(folder: Path) -> None:
    edit(folder / "unet" / "config.json", sample_size=96)  # as of 2.x for v
    assert load_diffusion(row(folder), CPU).resolution == 768


def test_missing_component(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    with pytest.raises(CheckpointError, match="lacks the component vae/"):
        load(row(folder), CPU)


def test_a_pickle_is_never_opened(folder: Path) -> None:
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(CheckpointError, match=r"only diffusion_pytorch_model\.bin, a pickle"):
        load(row(folder), CPU)


def test_missing_tensor(folder: Path) -> None:
    weights = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(weights)
    del tensors["conv_in.weight"]
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"unet: .*conv_in\.weight"):
        load(row(folder), CPU)


def test_wrong_shape(folder: Path) -> None:
    weights = next((folder / "text_encoder").glob("*.safetensors"))
    tensors = load_file(weights)
    name = next(key for key in tensors if key.endswith("token_embedding.weight"))
    tensors[name] = tensors[name][:, :8].clone()
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match="text_encoder"):
        load(row(folder), CPU)


def test_components_that_do_not_fit_each_other(folder: Path, models: Path) -> None:
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"latent_channels": 3}))
    with pytest.raises(CheckpointError):
        load(row(folder), CPU)


def test_a_tokenizer_without_files_is_none(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: model\.type None: that of a CLIP is BPE"):
        load(row(folder), CPU)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer: no tokenizer"):
        load(row(folder), CPU)


def test_unknown_family_and_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="did you mean 'stable-diffusion'"):
        load(row(folder, "stable-difusion"), CPU)
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        load(row(folder.parent / "nowhere"), CPU)


def test_families_are_not_mixed_up(models: Path) -> None:
    with pytest.raises(CheckpointError, match="no cross-attention"):
        load_diffusion(row(models / "embedded-clip", "clip"), CPU)
    with pytest.raises(CheckpointError, match="no CLIP"):
        load_clip(row(models / "embedded"), CPU)


def test_clip_cosines_are_those_of_the_model(params: Params) -> None:
    clip = load_clip(params.backbones["embedded-clip"], CPU)
    images = np.random.default_rng(0).integers(0, 255, (2, 24, 24, 3), dtype=np.uint8)
    texts = ["a red circle", "a blue star"]
    images_BD = clip.model.visual_projection(clip.image_features(images))
    texts_BD = clip.model.text_projection(clip.text_features(texts))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    ids = clip.tokenizer(texts, padding="max_length", return_tensors="pt")
    with torch.inference_mode():
        logits = clip.model(
            pixel_values=pixels, input_ids=ids.input_ids, attention_mask=ids.attention_mask
        ).logits_per_image
    found = cosine(images_BD[:, None], texts_BD[None])
    assert torch.allclose(found * clip.model.logit_scale.exp(), logits, atol=1e-5)


def test_a_card_is_no_part_of_the_identity(folder: Path) -> None:
    before = load_diffusion(row(folder), CPU).digest
    (folder / "README.md").write_text("a card")
    assert load_diffusion(row(folder), CPU).digest == before


# Components are opened at their first use.


def description(backbone: StableDiffusion) -> dict[str, object]:
    """All that a backbone says of itself, without its digest."""
    names = ("layers", "layer_widths", "text_width", "latent_channels", "resolution", "scale", "max_tokens")
    return {name: getattr(backbone, name) for name in (*names, "schedule_length", "prediction")}


def test_a_lazy_backbone_is_described_without_weights(folder: Path, opened: list[str]) -> None:
    eager = load_diffusion(row(folder), CPU)
    assert sorted(opened) == ["text_encoder", "unet", "vae"]
    opened.clear()
    lazy = load_diffusion(row(folder), CPU, lazy=True)
    assert description(lazy) == description(eager) and lazy.digest == eager.digest and opened == []
    assert (lazy.text_width, lazy.latent_channels, lazy.resolution, lazy.max_tokens) == (32, 4, 32, 24)
    assert lazy.layer_widths == [len(m.to_k.weight) for _, m in cross_attention_layers(eager.unet)]
    assert lazy.text_width == eager.encode_texts(["a"]).hidden.shape[-1]
    lazy.open()
    assert description(lazy) == description(eager) and sorted(opened) == ["text_encoder", "unet", "vae"]
    lazy.open()
    assert len(opened) == 3
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"no tensors")
    assert description(load_diffusion(row(folder), CPU, lazy=True)) == description(eager)


def test_each_component_is_opened_at_its_first_use(folder: Path, opened: list[str]) -> None:
    lazy, eager = load_diffusion(row(folder), CPU, lazy=True), load_diffusion(row(folder), CPU)
    opened.clear()
    text = lazy.encode_texts(["a red circle"])
    assert opened == ["text_encoder"] and torch.equal(text.hidden, eager.encode_texts(["a red circle"]).hidden)
    assert lazy.truncated(["a ring " * 40]) == 1 and opened == ["text_encoder"]
    image = np.random.default_rng(0).integers(0, 255, (1, 32, 32, 3), dtype=np.uint8)
    latents = lazy.encode_images(image)
    assert opened == ["text_encoder", "vae"] and torch.equal(latents, eager.encode_images(image))
    timesteps = torch.tensor([300])
    noised = lazy.add_noise(latents, torch.ones_like(latents), timesteps)
    assert opened == ["text_encoder", "vae"]
    with torch.inference_mode():
        predicted, expected = (b.predict_noise(noised, timesteps, text.hidden) for b in (lazy, eager))
    assert opened == ["text_encoder", "vae", "unet"] and torch.equal(predicted, expected)


def test_threads_open_the_denoiser_once(folder: Path, opened: list[str]) -> None:
    lazy = load_diffusion(row(folder), CPU, lazy=True)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: lazy.unet, range(8)))
    assert opened == ["unet"] and all(unet is found[0] for unet in found)


@pytest.mark.parametrize(
    ("component", "use"),
    [
        ("unet", lambda backbone: backbone.unet),
        ("vae", lambda backbone: backbone.encode_images(np.zeros((1, 32, 32, 3), dtype=np.uint8))),
        ("text_encoder", lambda backbone: backbone.encode_texts(["a"])),
    ],
)
def test_weights_that_do_not_load_are_one_line_at_their_first_use(
    component: str, use: Callable[[StableDiffusion], object], folder: Path
) -> None:
    next((folder / component).glob("*.safetensors")).write_bytes(b"no tensors")
    lazy = load_diffusion(row(folder), CPU, lazy=True)
    for attempt in (lambda: use(lazy), lambda: use(lazy), lazy.open, lambda: load(row(folder), CPU)):
        with pytest.raises(CheckpointError, match=f"{component}: does not load as") as error:
            attempt()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("component", "content"),
    [
        *(("unet", content) for content in (None, "{", '{"block_out_channels": "wide"}')),
        *(("vae", content) for content in (None, "{", '{"block_out_channels": "wide"}')),
        *(("text_encoder", content) for content in ("{", '{"hidden_size": "wide"}')),
    ],
)
def test_a_config_that_does_not_load_is_one_line(component: str, content: str | None, folder: Path) -> None:
    file = folder / component / "config.json"
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    lazy = load_diffusion(row(folder), CPU, lazy=True)
    use = {
        "unet": lambda: lazy.layers,
        "vae": lambda: lazy.scale,
        "text_encoder": lambda: lazy.max_tokens,
    }[component]
    for attempt in (use, lambda: lazy.unet, lambda: load(row(folder), CPU)):
        with pytest.raises(CheckpointError) as error:
            attempt()
        assert "\n" not in str(error.value) and component in str(error.value)


def test_an_incomplete_folder_is_reported_before_anything_is_opened(folder: Path, opened: list[str]) -> None:
    edit(folder / SCHEDULER, prediction_type="sample")
    with pytest.raises(CheckpointError, match="neither epsilon nor v_prediction"):
        load_diffusion(row(folder), CPU, lazy=True)
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(CheckpointError, match="a pickle"):
        load_diffusion(row(folder), CPU, lazy=True)
    shutil.rmtree(folder / "unet")
    with pytest.raises(CheckpointError, match="lacks the component unet/"):
        load_diffusion(row(folder), CPU, lazy=True)
    assert opened == []


def test_a_lazy_clip_is_opened_at_its_first_use(models: Path, opened: list[str]) -> None:
    lazy = load_clip(row(models / "embedded-clip", "clip"), CPU, lazy=True)
    identity = lazy.digest
    assert opened == []
    eager = load_clip(row(models / "embedded-clip", "clip"), CPU)
    assert opened == [""] and eager.digest == identity
    assert torch.equal(lazy.text_features(["a red circle"]), eager.text_features(["a red circle"]))
    assert opened == ["", ""] and (lazy.resolution, lazy.max_tokens) == (eager.resolution, eager.max_tokens)


# Layouts as they are published, some years old.

OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def test_the_names_of_the_oldest_checkpoints_are_known(folder: Path) -> None:
    """Of the autoencoder's attention and of the text encoder, whose positions were part of the file."""
    expected = load_diffusion(row(folder), CPU)
    file = next((folder / "vae").glob("*.safetensors"))
    tensors = load_file(file)
    for new, old in OLD_NAMES.items():
        tensors = {k.replace(new, old) if ".attentions." in k else k: tensor for k, tensor in tensors.items()}
    save_file(tensors, file, {"format": "pt"})
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{k.removeprefix('text_model.')}": tensor for k, tensor in load_file(file).items()}
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(24)[None]}, file, {"format": "pt"})
    found = load_diffusion(row(folder), CPU)
    for mine, theirs in ((found.vae, expected.vae), (found.text_encoders[0], expected.text_encoders[0])):
        there = theirs.state_dict()
        assert all(torch.equal(tensor, there[key]) for key, tensor in mine.state_dict().items())


def test_a_published_tokenizer_has_no_single_file(folder: Path) -> None:
    before = load_diffusion(row(folder), CPU)
    shutil.rmtree(folder / "tokenizer")
    save_tokenizer(folder / "tokenizer", "!", 24)  # pads with the first token, as that of 2.x does
    found = load_diffusion(row(folder), CPU)
    texts = ["a red circle", "", "a red circle left of a blue star " * 3]
    assert found.tokenizer.pad_token_id == 0 != before.tokenizer.pad_token_id
    mine, theirs = found.encode_texts(texts), before.encode_texts(texts)
    assert torch.equal(mine.content, theirs.content) and torch.equal(mine.truncated, theirs.truncated)
    ends = theirs.content.sum(-1) + 2  # the mask is causal: what pads comes after all that counts
    for row_, end in enumerate(ends.tolist()):
        assert torch.equal(mine.hidden[row_, :end], theirs.hidden[row_, :end])


def test_a_published_clip_has_its_tokenizer_beside_its_weights_and_says_how_pixels_are_normalised(
    models: Path, tmp_path: Path
) -> None:
    before = load_clip(row(models / "embedded-clip", "clip"), CPU)
    folder = Path(shutil.copytree(models / "embedded-clip", tmp_path / "clip"))
    for file in (folder / "tokenizer").iterdir():
        file.rename(folder / file.name)
    (folder / "tokenizer").rmdir()
    mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    settings = folder / "preprocessor_config.json"
    settings.write_text(json.dumps({"image_mean": mean, "image_std": deviation, "crop_size": 24}))
    found = load_clip(row(folder, "clip"), CPU)
    assert found.digest != before.digest
    texts = ["a red circle", "a blue star"]
    assert torch.equal(found.text_features(texts), before.text_features(texts))
    images = np.random.default_rng(0).integers(0, 255, (2, 24, 24, 3), dtype=np.uint8)
    pixels = (torch.from_numpy(images).float() / 255 - torch.tensor(mean)) / torch.tensor(deviation)
    with torch.inference_mode():
        expected = found.model.vision_model(pixel_values=pixels.permute(0, 3, 1, 2)).pooler_output
    assert torch.allclose(found.image_features(images), expected, atol=1e-5)
    assert not torch.allclose(found.image_features(images), before.image_features(images), atol=1e-2)
    settings.write_text(json.dumps({"image_mean": mean}))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: image_std: Field required"):
        load_clip(row(folder, "clip"), CPU)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    settings.write_text(json.dumps({"image_mean": mean, "image_std": deviation}))
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_clip(row(folder, "clip"), CPU)


def test_images_are_encoded_a_few_at_a_time(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_diffusion(row(models / "embedded"), CPU)
    images = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
    expected, sizes = backbone.encode_images(images), []
    encode = backbone.vae.encode
    monkeypatch.setattr(backbone.vae, "encode", lambda pixels: (sizes.append(len(pixels)), encode(pixels))[1])
    monkeypatch.setattr(stable_diffusion, "AT_ONCE", 2 * 32 * 32)
    assert torch.allclose(backbone.encode_images(images), expected, atol=1e-6) and sizes == [2, 2, 1]
    monkeypatch.setattr(stable_diffusion, "AT_ONCE", 1)
    assert torch.allclose(backbone.encode_images(images), expected, atol=1e-6)


# Other arithmetic than float32.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_arithmetic_is_near_with_and_without_a_prompt(dtype: str, models: Path, params: Params) -> None:
    full, low = (load_diffusion(row(models / "embedded", dtype=kind), CPU) for kind in ("float32", dtype))
    assert (low.unet.dtype, low.vae.dtype) == (getattr(torch, dtype), torch.float32)
    text, latents = full.encode_texts(["a red circle", "a blue star"]), torch.randn(2, 4, 4, 4)
    assert torch.equal(low.encode_texts(["a red circle", "a blue star"]).hidden, text.hidden)
    prompt = AttentionPrompt(32, full.layer_widths, 4, rank=2, conditional=True, seed=0)
    for up in prompt.up:
        torch.nn.init.normal_(up, std=0.1, generator=torch.Generator().manual_seed(0))
    for bound in (None, prompt.bind(latents)):
        results, timesteps, hidden = [], torch.full((2,), 300), text.hidden.clone()
        for backbone in (full, low):
            capture = Capture.of(params.evidence, text.content)
            with torch.no_grad():
                noise = backbone.predict_noise(latents, timesteps, hidden, capture=capture, prompt=bound)
            results.append((noise, *capture.stacked()))
        for exact, near in zip(*results, strict=True):
            assert near.isfinite().all() and (near - exact).abs().max() < 0.05 * exact.abs().max()


def test_logits_that_float16_cannot_hold_are_computed_as_the_config_asks(folder: Path, params: Params) -> None:
    """Stable Diffusion 2.1 says upcast_attention: its logits are that large."""
    evidence, finite = params.evidence.model_copy(update={"poolings": ("logsumexp", "maximum")}), []
    for upcast in (False, True):
        edit(folder / "unet" / "config.json", upcast_attention=upcast)
        backbone = load_diffusion(row(folder, dtype="float16"), CPU)
        text = backbone.encode_texts(["a red circle"])
        capture = Capture.of(evidence, text.content)
        with torch.inference_mode():
            for name, module in backbone.unet.named_modules():
                if name.endswith(("attn2.to_q", "attn2.to_k")):
                    module.weight *= 2000
            backbone.predict_noise(torch.ones(1, 4, 4, 4), torch.tensor([300]), text.hidden, capture=capture)
        finite.append(bool(capture.stacked()[0].isfinite().all()))
    assert finite == [False, True]


def test_other_arithmetic_is_another_training(params: Params, prepared: Path) -> None:
    def key(dtype: str, method: str) -> str:
        rows = {name: kept.model_copy(update={"dtype": dtype}) for name, kept in params.backbones.items()}
        changed, folders = params.model_copy(update={"backbones": rows}), Folders(prepared, prepared, prepared)
        return training_key(Session("scenes-com", changed, folders), Training(method))

    for method in ("dsd", "clip-finetune"):
        assert key("float32", method) != key("bfloat16", method)


def test_features_of_a_clip_in_other_arithmetic_are_other_features(models: Path) -> None:
    full, low = (load_clip(row(models / "embedded-clip", "clip", dtype=kind), CPU) for kind in ("float32", "bfloat16"))
    assert full.digest != low.digest
    near, exact = low.text_features(["a red circle"]), full.text_features(["a red circle"])
    assert (near - exact).abs().max() < 0.1 * exact.abs().max()


# The hub.


UNREAD = (
    "v2-1.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.non_ema.safetensors",
    "sample.png",
    "safety_checker/model.safetensors",
    "feature_extractor/preprocessor_config.json",
)


@pytest.fixture
def served(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one checkpoint, and beside it all that a published one has and nobody reads."""
    files = files_of(models / "embedded") | dict.fromkeys(UNREAD, b"never read")
    with connected(Hub({"someone/model": files}), tmp_path, monkeypatch) as server:
        yield server


def test_no_more_of_a_repository_is_fetched_than_is_read(served: Hub, models: Path) -> None:
    found, read = load_diffusion(row(Path("someone/model"), revision=COMMIT), CPU), files_of(models / "embedded")
    assert sorted(served.fetched()) == sorted(read)
    assert found.digest == f"someone/model@{COMMIT}"
    assert remote(row(Path("someone/model"))) == sum(map(len, read.values()))
    assert commit(row(Path("someone/model"))) == COMMIT
    assert locate(row(Path("someone/model")))[1] == found.digest  # what is not pinned is told by its commit
    load_diffusion(row(Path("someone/model"), revision=COMMIT), CPU)
    assert len(served.fetched()) == len(read)


def test_weights_that_are_not_there_are_told_before_anything_is_fetched(served: Hub) -> None:
    files = served.repositories["someone/model"]
    served.repositories["someone/model"] = {name: b"" for name in files if not name.endswith(".safetensors")}
    with pytest.raises(CheckpointError, match=r"^someone/model: has no weights in safetensors for family stable-diff"):
        remote(row(Path("someone/model"), revision=COMMIT))


def test_the_settings_of_one_file_may_come_from_the_hub(served: Hub, tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    save_file({"weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="tensors of vae missing"):
        load(row(file, config="someone/model", revision=COMMIT), CPU)
    assert served.fetched() and all(name.endswith((".json", ".txt")) for name in served.fetched())
    assert remote(row(file, config="someone/model")) > 0


LOGIN = "log in with `hf auth login` or set HF_TOKEN"


@pytest.mark.parametrize(
    ("source", "token", "line"),
    [
        ("someone/gated", None, f"someone/gated is gated: accept its terms at {{url}}/someone/gated, then {LOGIN}"),
        ("someone/gone", TOKEN, "someone/gone is neither a folder here nor at {url}/someone/gone: it was removed or"),
        ("someone/private", None, "someone/private is neither a folder here nor at {url}/someone/private: it was rem"),
        ("someone/model", "hf_wrong", f"someone/model: the hub refuses the token (401): {LOGIN} again, or use no tok"),
        ("someone/model", None, "someone/model has no commit v9; see {url}/someone/model"),
    ],
)
def test_a_repository_that_cannot_be_had_is_one_line(
    source: str, token: str | None, line: str, served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.repositories["someone/gated"] = served.repositories["someone/model"]
    served.gated.add("someone/gated")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    asked = row(Path(source), revision=COMMIT if source == "someone/gated" else "v9")
    for ask in (partial(load, device=CPU), remote):
        with pytest.raises(CheckpointError) as error:
            ask(asked)
        assert str(error.value).startswith(line.format(url=served.url)) and "\n" not in str(error.value)


def test_what_the_hub_says_is_told(served: Hub) -> None:
    served.down = 403, "The token lacks a permission"
    with pytest.raises(CheckpointError) as error:
        load(row(Path("someone/model"), revision=COMMIT), CPU)
    line = "nor whole in the cache, and the hub answers 403: The token lacks a permission"
    assert str(error.value) == f"someone/model is neither a folder here {line}"
    for ask in (remote, commit):
        with pytest.raises(
            CheckpointError, match=r"^someone/model: the hub answers 403: The token lacks a permission$"
        ):
            ask(row(Path("someone/model")))


def test_no_hub_at_all_is_one_line(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"nor whole in the cache, and HF_HUB_OFFLINE is set: unset it") as error:
        load(row(Path("someone/model"), revision=COMMIT), CPU)
    assert "\n" not in str(error.value)
