"""`make gpu`: every measurement runs at tiny size on a CPU, so that none fails on the day a GPU is at hand."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks import performance
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import breakdown, published
from benchmarks.gpu.bench import REAL, TINY, Bench
from benchmarks.gpu.correctness import CPU, GPU, scored
from benchmarks.gpu.device import Machine, spread, tf32
from benchmarks.gpu.records import Case, Records, Skipped
from benchmarks.gpu.timeline import Span, kind_of
from benchmarks.gpu.timeline import breakdown as divided
from dsd.errors import DataError
from dsd.models import load_diffusion
from tests.conftest import ROOT

# Packages of a GPU machine for deep learning; benchmarks/gpu/requirements.txt lists the others that are needed.
PRESENT = {
    *("PIL", "accelerate", "huggingface_hub", "numpy", "pyarrow", "requests", "safetensors", "scipy", "tokenizers"),
    *("torch", "tqdm", "transformers", "urllib3", "yaml"),
}
XFORMERS = "scores, xformers against sdpa, float32"
RUN = """
import json, socket, sys
def refuse(*_): raise OSError("the machine has no network")
socket.socket.connect = refuse
from benchmarks.gpu.__main__ import main
status = main(["--tiny", "--out", sys.argv[1], "--minutes", "30"])
open(sys.argv[2], "w").write(json.dumps(sorted(sys.modules)))
sys.exit(status)
"""


class Run(NamedTuple):
    out: Path
    lines: list[str]
    modules: list[str]

    def results(self, measurement: str) -> dict[str, Any]:
        cases = json.loads((self.out / "cpu" / f"{measurement}.json").read_text())["cases"]
        return {name: entry["result"] for name, entry in cases.items() if "result" in entry}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # faster at this size
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=one_thread, capture_output=True, text=True)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run at tiny size, without a network."""
    folder = tmp_path_factory.mktemp("gpu")
    done = python("-c", RUN, str(folder / "out"), str(folder / "modules.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(folder / "out", done.stdout.splitlines(), json.loads((folder / "modules.json").read_text()))


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path, {"name": "NVIDIA H100 80GB HBM3", "memory": 1, "cores": 2})


def case(measure: Callable[[Any], dict[str, Any]] = lambda bench: {"value": 1}, **changes: Any) -> Case:
    return Case(**{"name": "one", "setting": {"batch": 2}, "seconds": 1.0, "measure": measure, **changes})


def cpu_bench(folder: Path) -> Bench:
    return Bench(TINY, Machine(torch.device("cpu")), folder)


def test_every_case_has_a_result(tiny_run: Run) -> None:
    files = sorted(path.stem for path in (tiny_run.out / "cpu").iterdir())
    assert files == sorted({measurement for measurement, _, _ in gpu.PLAN})
    outcomes = {
        (measurement, name): next(key for key in ("result", "skipped", "failed") if key in entry)
        for measurement in files
        for name, entry in json.loads((tiny_run.out / "cpu" / f"{measurement}.json").read_text())["cases"].items()
    }
    assert {key for key, outcome in outcomes.items() if outcome != "result"} <= {("correctness", XFORMERS)}
    assert len(outcomes) == 24 and {name for _, name in outcomes} >= {"peak", "sdxl", "sd2-base, training"}
    assert not any("failed" in line for line in tiny_run.lines)


def test_arithmetic_is_compared(tiny_run: Run) -> None:
    results = tiny_run.results("correctness")
    for name, result in results.items():
        same = "against cpu" in name or name.endswith(("steps, float32", "maps, float32", "step, float32"))
        if name.startswith("scores"):
            for row in result.values():
                assert (row["largest"] == 0) == same and row["changed"]["n"] == TINY.examples
                assert row["drift"]["low"] <= row["drift"]["value"] <= row["drift"]["high"] <= row["largest"]
        elif name.startswith("training"):
            assert (result["gradient_difference"] == 0) == same and result["gradient_cosine"] > 0.9
        elif name.startswith("heat maps"):
            assert (result["largest"] == 0) == same and result["difference"]["n"] > 1
        else:
            assert {row["largest"] for row in result.values()} == {0} and len(result) == 4


def test_rates_have_a_spread(tiny_run: Run) -> None:
    passes, captured, engine = (tiny_run.results(name) for name in ("passes", "capture", "engine"))
    assert set(passes) == {"peak", *captured} and set(engine) == set(TINY.batches)
    for result in (*(passes[name] for name in captured), *captured.values(), *engine.values()):
        rate = result["passes_per_second"]
        assert 0 < rate["low"] <= rate["value"] <= rate["high"] and rate["n"] >= 3
    assert all(
        result["rows"] == result["planned_rows"] == 4 * 8 for result in engine.values()
    )  # 6 pairs, 4 images' own
    assert all(result["texts_encoded_per_second"]["value"] > 0 for result in tiny_run.results("encoders").values())
    assert tiny_run.results("memory")["sd2-base, training"]["seconds_per_step"]["n"] == 3


def test_the_profile_divides_a_step(tiny_run: Run) -> None:
    for result in tiny_run.results("profile").values():
        assert result["busy"] + result["idle_in_inputs"] + result["idle_elsewhere"] == pytest.approx(1)
        assert result["busy"] > 0.1 and 0 < result["inputs"] < 1 and result["steps"] == TINY.profiled
        assert result["kinds"]["convolutions"] > 0 and not result["inputs_own_thread"]


def test_a_second_run_measures_only_what_is_missing(
    tiny_run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[str] = []
    monkeypatch.setattr(gpu, "attempt", lambda case, bench: (measured.append(case.name), ("skipped", "not now"))[1])
    arguments = ["--tiny", "--out", str(tiny_run.out), "--minutes", "5"]
    assert gpu.main(arguments) == 0
    assert set(measured) <= {XFORMERS} and capsys.readouterr().out.count("has a result") == 24 - len(measured)
    path = tiny_run.out / "cpu" / "passes.json"
    content = path.read_text()
    stored = json.loads(content)
    stored["cases"]["peak"]["key"] = "of another setting"
    path.write_text(json.dumps(stored))
    gpu.main(arguments)
    assert "peak" in measured and "result" in json.loads(path.read_text())["cases"]["peak"]  # the older one is kept
    path.write_text(content)


def test_the_bundle_has_what_a_gpu_machine_lacks(tiny_run: Run) -> None:
    """The third-party packages that the loaded modules of the project import."""
    imported: set[str] = set()
    for name in tiny_run.modules:
        if name.split(".")[0] in ("dsd", "benchmarks"):
            path = ROOT / name.replace(".", "/")
            source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            for node in ast.parse(source.read_text()).body:
                if isinstance(node, ast.Import):
                    imported.update(alias.name.split(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom):
                    imported.add(str(node.module).split(".")[0])
    lines = (ROOT / "benchmarks/gpu/requirements.txt").read_text().splitlines()
    carried = {line.replace("-", "_") for line in lines if not line.startswith("#")}
    assert imported - set(sys.stdlib_module_names) - {"dsd", "benchmarks"} <= PRESENT | carried
    assert {"diffusers", "pydantic", "pydantic_core"} <= carried
    constrained = (ROOT / "constraints.txt").read_text().replace("-", "_")
    assert all(f"\n{package}==" in constrained for package in carried)


def test_a_missing_library_skips_what_needs_it(
    records: Records, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def needs_accelerate(bench: Any) -> dict[str, Any]:
        raise ModuleNotFoundError("No module named 'accelerate'", name="accelerate")

    bench = cpu_bench(tmp_path)
    assert gpu.attempt(case(needs_accelerate), bench) == ("skipped", "accelerate is not installed")
    monkeypatch.setitem(sys.modules, "benchmarks.gpu.memory", None)
    monkeypatch.setattr(
        gpu, "PLAN", [("memory", "memory.cases", slice(None)), ("capture", "denoiser.capture", slice(1))]
    )
    assert [(name, own.name) for name, own in gpu.planned(TINY, records)] == [("capture", "sd2-base, batch 4")]
    assert records.entries("memory")["all"]["skipped"] == "benchmarks.gpu.memory is not installed"
    records.add("memory", case(), "result", {}, 1.0)
    assert set(records.entries("memory")) == {"one"}


def test_a_failed_case_does_not_end_the_run(records: Records, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(bench: Any) -> dict[str, Any]:
        raise RuntimeError("CUDA error:\nan illegal memory access")

    def impossible(bench: Any) -> dict[str, Any]:
        raise Skipped("it cannot run here")

    cases = [case(fails, name="fails"), case(impossible, name="impossible"), case(name="works")]
    monkeypatch.setattr(gpu, "planned", lambda sizes, records: [("passes", own) for own in cases])
    assert gpu.run(TINY, cpu_bench(tmp_path), records, gpu.Clock(1)) == 1
    entries = records.entries("passes")
    assert entries["fails"]["failed"] == "RuntimeError: CUDA error: an illegal memory access"
    assert entries["impossible"]["skipped"] == "it cannot run here" and entries["works"]["result"] == {"value": 1}
    assert records.folder.name == "nvidia-h100-80gb-hbm3"

    def broken() -> None:
        raise RuntimeError("CUDA error")

    bench = cpu_bench(tmp_path)
    monkeypatch.setattr(bench.machine, "release", broken)
    assert gpu.attempt(cases[2], bench) == ("failed", "RuntimeError: CUDA error")


def test_no_case_begins_that_cannot_end_in_time(
    records: Records, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cases = [case(name="short"), case(name="long", seconds=40.0), case(name="opens", model="sdxl")]
    monkeypatch.setattr(gpu, "planned", lambda sizes, records: [("passes", own) for own in cases])
    assert gpu.run(REAL, cpu_bench(tmp_path), records, gpu.Clock(0.5)) == 0
    entries = records.entries("passes")
    assert "result" in entries["short"]
    assert "30 s are left, it takes about 45; run again" in entries["long"]["skipped"]
    assert "it takes about 46" in entries["opens"]["skipped"]
    gpu.run(REAL, cpu_bench(tmp_path), records, gpu.Clock(2))
    assert all("result" in entry for entry in records.entries("passes").values())


def test_a_run_fits_into_seven_minutes(records: Records) -> None:
    """By the estimates, with 20 s for imports; only the engine and the profile of further checkpoints may be left."""
    planned = list(gpu.planned(REAL, records))
    whole = [own for name, own in planned if own.name == "sd2-base" or name not in ("engine", "profile")]
    opening = sum(gpu.OPENING[model] for model in REAL.batches)
    assert sum(own.seconds for own in whole) + opening + gpu.MARGIN + 20 < 7 * 60
    assert set(gpu.OPENING) == set(REAL.batches) == set(published.PUBLISHED)
    assert len({(name, own.name) for name, own in planned}) == len(planned)


def test_a_run_ends_after_its_minutes(tmp_path: Path) -> None:
    hangs = (
        "import sys, time; from benchmarks.gpu import __main__ as gpu; gpu.measure = lambda *_, **__: time.sleep(60)"
    )
    done = python("-c", f"{hangs}; gpu.main(['--out', sys.argv[1], '--minutes', '0.01'])", str(tmp_path))
    assert done.returncode == 1 and "Timeout" in done.stderr and len(done.stderr) < 2000


def test_wrong_use_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path), "--minutes"]
    if not torch.cuda.is_available():
        assert gpu.main([*out, "7"]) == 2
        assert capsys.readouterr().err == "gpu: no CUDA device; --tiny checks the code without one\n"
    with pytest.raises(SystemExit):
        gpu.main([*out, "0"])
    assert "--minutes: must be above 0, found 0" in capsys.readouterr().err
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "correctness.json").write_text("{")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([*out, "7", "--tiny"]) == 2
    assert "correctness.json" in (line := capsys.readouterr().err) and line.count("\n") == 1
    monkeypatch.setitem(sys.modules, "benchmarks.gpu.bench", None)
    assert gpu.main([*out, "7", "--tiny"]) == 2
    assert "is not installed; see `make gpu-bundle` in CONTRIBUTING.md" in capsys.readouterr().err


def test_ctrl_c_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "measure", interrupted)
    assert gpu.main(["--out", str(tmp_path), "--minutes", "7"]) == 130
    assert capsys.readouterr().err == "gpu: interrupted; run again to resume\n"


def test_a_gpu_is_described_and_its_peak_is_what_a_call_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80, multi_processor_count=132)
    fakes = {
        "get_device_properties": lambda device: properties,
        "synchronize": lambda device: calls.append("synchronize"),
        "empty_cache": lambda: calls.append("empty"),
        "memory_allocated": lambda device: 100,
        "reset_peak_memory_stats": lambda device: calls.append("reset"),
        "max_memory_allocated": lambda device: 130,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    machine = Machine(torch.device("cuda"))
    assert machine.describe()["name"] == "NVIDIA H100 80GB HBM3" and machine.describe()["multiprocessors"] == 132
    assert machine.peak(lambda: calls.append("work")) == 30
    assert calls == ["synchronize", "reset", "work", "synchronize"]
    machine.release()
    assert calls[-1] == "empty" and all(hasattr(torch.cuda, name) for name in fakes)


def test_calls_are_timed_in_turns() -> None:
    calls: list[str] = []
    machine = Machine(torch.device("cpu"))
    first, second = machine.timed(0.0, lambda: calls.append("a"), lambda: calls.append("b"))
    assert "".join(calls) == "aabb" + "ab" * 3 and len(first) == len(second) == 3
    assert spread([3, 1, 2]) == pytest.approx({"value": 2, "low": 1.1, "high": 2.9, "n": 3})


def test_tf32_is_as_before() -> None:
    before = torch.backends.cudnn.allow_tf32
    with pytest.raises(ZeroDivisionError), tf32(not before):
        assert torch.backends.cudnn.allow_tf32 is not before
        raise ZeroDivisionError
    assert torch.backends.cudnn.allow_tf32 is before


def test_a_step_by_hand() -> None:
    """Two steps of 5 s: 1 s of inputs, 4 s of a pass, of which the device computes 3 s; it also runs during inputs."""
    inputs = [Span("inputs", 0, 1, 7), Span("inputs", 5, 6, 7)]
    passes = [Span("pass", 1, 5, 8), Span("pass", 6, 10, 8)]
    device = [
        Span("Memcpy HtoD (Pageable -> Device)", 0.5, 1.5),
        Span("flash_fwd_kernel", 1.5, 3.5),
        Span("ampere_bf16_gemm", 3, 4),  # on another stream
        Span("flash_fwd_kernel", 7, 10.5),  # cut at the end of the last step
        Span("before", -2, -1),
    ]
    result = divided(device, inputs, passes)
    assert result["steps"] == 2 and result["seconds_per_step"] == 5 and result["kernels_per_step"] == 2
    assert result["busy"] == pytest.approx(0.65) and result["inputs"] == pytest.approx(0.2)
    assert result["idle_in_inputs"] == pytest.approx(0.15) and result["idle_elsewhere"] == pytest.approx(0.2)
    assert result["kinds"]["copies"] == pytest.approx(0.1) and result["kinds"]["matrix products"] == pytest.approx(0.1)
    assert result["top"][0] == {"name": "flash_fwd_kernel", "share": pytest.approx(0.5), "per_step": 1}
    assert result["inputs_own_thread"]
    with pytest.raises(ValueError, match="no kernel"):
        divided([], inputs, passes)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, ...>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolutions"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16, ...>", "convolutions"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align8", "matrix products"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<float>", "norms and softmax"),
        ("void at::native::vectorized_layer_norm_kernel<c10::BFloat16, float>", "norms and softmax"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::exp_kernel_cuda>", "other kernels"),
        ("Memcpy DtoH (Device -> Pageable)", "copies"),
    ],
)
def test_kernels_by_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_the_profilers_events_on_the_hosts_clock() -> None:
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(name: str, start: float, end: float, kind: Any, parent: Any = None) -> Any:
        times = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, time_range=times, device_type=kind, cpu_parent=parent, thread=1)

    conv = event("aten::conv2d", 3e6, 4e6, cpu)
    events = [
        *(event(breakdown.ANCHOR, 2e6, 2.1e6, kind) for kind in (cpu, cuda)),
        conv,
        event("aten::convolution", 3e6, 4e6, cpu, conv),
        event("sm90_xmma_fprop", 3.5e6, 4.5e6, cuda),
    ]
    assert breakdown.device_spans(events, cuda, 100.0) == [Span("sm90_xmma_fprop", 101.5, 102.5, 1)]
    assert breakdown.device_spans(events, cpu, 100.0) == [Span("aten::conv2d", 101.0, 102.0, 1)]


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("sd2-base", [865_910_724, 83_653_863, 340_387_840]),
        ("sd2.1-v", [865_910_724, 83_653_863, 340_387_840]),
        ("sdxl", [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]),
    ],
)
def test_the_configurations_have_the_published_sizes(name: str, counts: list[int]) -> None:
    """Built as on a GPU: on another device than the CPU."""
    model = published.PUBLISHED[name]
    with torch.device("meta"):
        parts = [published.UNet2DConditionModel(**model.unet), published.AutoencoderKL(**model.vae)]
        for kind, config in zip(published.ENCODERS.values(), model.text_encoders, strict=False):
            parts.append(kind(published.CLIPTextConfig(**config)))
    assert [sum(weight.numel() for weight in part.parameters()) for part in parts] == counts


def test_a_published_configuration_predicts_v(tmp_path: Path) -> None:
    model = published.tiny(published.PUBLISHED["sd2.1-v"])
    published.write(model, tmp_path / "v", torch.device("cpu"))
    backbone = load_diffusion(published.row(model, tmp_path / "v"), torch.device("cpu"))
    assert backbone.prediction == "v_prediction" and backbone.dtype == torch.bfloat16 and backbone.max_tokens == 77
    assert published.PUBLISHED["sd2.1-v"].unet["upcast_attention"]


def test_xformers_is_skipped_where_it_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(Skipped, match=r"runtime\.attention"):
        scored(GPU._replace(attention="xformers"), CPU, cpu_bench(tmp_path))


def test_the_page_has_the_numbers(tiny_run: Run, tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    assert performance.main(["--results", str(tiny_run.out), "--out", str(page)]) == 0
    text = page.read_text()
    assert "## CPU (at tiny size: no measurement)" in text and performance.NOTHING not in text
    titles = ("Denoiser", "Engine", "Where a step's time goes", "Kernels by kind", "Longest kernels", "Peak memory",
              "VAE and text encoders", "Not measured")  # fmt: skip
    assert all(f"### {title}" in text for title in titles) and text.count("### Correctness") == 3
    result = tiny_run.results("capture")["sdxl, batch 2"]
    assert f"| {performance.spread(result['passes_per_second'])} | {performance.spread(result['over_bare'])} |" in text
    passes = tiny_run.results("passes")
    rate = passes["sdxl, batch 2"]["passes_per_second"]["value"] * passes["sdxl, batch 2"]["operations_per_pass"]
    assert performance.share(rate / passes["peak"]["operations_per_second"]["value"]) in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") and line.count("|") > 2 for line in lines)


def test_a_page_of_a_part(tiny_run: Run, tmp_path: Path) -> None:
    """A run that ended early: what is missing is left out, what has failed is named."""
    (tmp_path / "cpu").mkdir()
    stored = json.loads((tiny_run.out / "cpu" / "passes.json").read_text())
    del stored["cases"]["peak"]
    stored["cases"]["sdxl, batch 2"] = {**stored["cases"]["sdxl, batch 2"], "failed": "RuntimeError: a | b"}
    del stored["cases"]["sdxl, batch 2"]["result"]
    (tmp_path / "cpu" / "passes.json").write_text(json.dumps(stored))
    text = performance.page(tmp_path)
    assert "| sd2-base, batch 4 |" in text and r"| passes | sdxl, batch 2 | failed: RuntimeError: a \| b |" in text
    (tmp_path / "cpu" / "engine.json").write_text((tiny_run.out / "cpu" / "engine.json").read_text())
    assert "### Engine" in performance.page(tmp_path)


def test_a_page_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert performance.page(tmp_path).endswith(f"\n{performance.NOTHING}\n")
    (tmp_path / "h100").mkdir()
    (tmp_path / "h100" / "passes.json").write_text("[]")
    assert performance.main(["--results", str(tmp_path), "--out", str(tmp_path / "page.md")]) == 2
    assert "passes.json" in (line := capsys.readouterr().err) and line.count("\n") == 1
    with pytest.raises(DataError):
        performance.page(tmp_path)


def test_the_page_in_the_docs_is_that_of_the_results() -> None:
    assert (ROOT / "docs" / "performance.md").read_text() == performance.page(ROOT / "benchmarks" / "gpu" / "results")


def test_numbers_are_short() -> None:
    assert [performance.number(value) for value in (0, 0.00001234, 0.1234, 12.34, 1234.5, 12345678)] == [
        "0", "1.23e-05", "0.123", "12.3", "1,234", "1.23e+07"
    ]  # fmt: skip
