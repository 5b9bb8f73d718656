"""What holds the parts together: dvc.yaml says what the code depends on, and imports go where they may."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import grimp
import pytest
import yaml

from dsd import config
from dsd.config import Params, load

ROOT = Path(__file__).parent.parent
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
ORDER = ["pretrain", "download", "prepare", "cache", "train", "score", "evaluate", "report"]
LAZY = {"dsd", "flows", "flows.stages"}  # packages that change no result
# Packages that import all their modules, found by `pkgutil`.
TABLES = {"dsd.datasets", "dsd.models", "dsd.schedules", "dsd.scorers", "dsd.training"}
SECTIONS = set(Params.model_fields)


@cache
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("dsd", "flows", exclude_type_checking_imports=True)


def upstream(module: str) -> set[str]:
    return {module} | graph().find_upstream_modules(module)


def listed(stage: str) -> list[tuple[str, str]]:
    """(file, section) of the params that dvc.yaml lists for a stage."""
    entries = STAGES[stage].get("params", ())
    apart = [entry for entry in entries if isinstance(entry, dict)]
    own = [("params.yaml", entry) for entry in entries if isinstance(entry, str)]
    return own + [(file, section) for entry in apart for file, sections in entry.items() for section in sections]


def closure(stage: str) -> set[str]:
    """Every module of the project that runs with a stage, imports inside functions included.

    Importing a module also runs its parent packages. What is imported by a computed name is not seen.
    """
    found = upstream(f"flows.stages.{stage}")
    while missing := ({m.rpartition(".")[0] for m in found} | _tabled(found)) - found - {""} - LAZY:
        found |= set().union(*map(upstream, missing))
    return found | LAZY


def _tabled(found: set[str]) -> set[str]:
    return {module for package in TABLES & found for module in graph().find_children(package)}


def file_of(module: str) -> str:
    path = Path(*module.split("."))
    return (path / "__init__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")).as_posix()


def room_of(module: str) -> str:
    """What dvc.yaml lists for a module: its package in dsd, in flows the file."""
    parts = module.split(".")
    path = Path(*(parts[:2] if parts[0] == "dsd" else parts))
    return path.as_posix() if (ROOT / path).is_dir() else path.with_suffix(".py").as_posix()


def test_the_stages_are_in_order() -> None:
    assert list(STAGES) == ORDER
    assert all(STAGES[stage]["cmd"] == f"python -m flows.stages.{stage}" for stage in ORDER)


@pytest.mark.parametrize("stage", ORDER)
def test_dependencies_are_the_packages_that_a_stage_runs(stage: str) -> None:
    rooms = {room_of(module) for module in closure(stage) - LAZY}
    assert {dep for dep in STAGES[stage]["deps"] if dep.split("/")[0] in ("dsd", "flows")} == rooms


@pytest.mark.parametrize("stage", ORDER)
def test_dependencies_cover_the_data(stage: str) -> None:
    """The folders data/<stage> that a flow names are its deps and outs."""
    text = (ROOT / "flows" / "stages" / f"{stage}.py").read_text()
    constants = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
    named = {other for other in ORDER if other in constants} - {stage}
    listed = {dep.split("/")[1] for dep in STAGES[stage]["deps"] if dep.startswith("data/")}
    assert named <= listed


@pytest.mark.parametrize("stage", ORDER)
def test_whoever_opens_a_backbone_depends_on_its_files(stage: str) -> None:
    made = {path for out in STAGES["pretrain"]["outs"] for path in out}
    local = {row.source for row in load(ROOT / "params.yaml").backbones.values()} & made
    opens = "backbones" in STAGES[stage]["params"] and stage != "pretrain"
    assert {dep for dep in STAGES[stage]["deps"] if dep.startswith("models/")} == (local if opens else set())


def test_every_curve_is_a_plot() -> None:
    rows = yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"]
    plots = {name: plot for row in rows for name, plot in row.items()}
    params = load(ROOT / "params.yaml")
    curves = {f"data/train/{name}/{method}/curve.csv" for name in params.datasets for method in params.training}
    assert set(plots["loss"]["y"]) == set(plots["accuracy"]["y"]) == curves


def test_a_timing_makes_nothing_stale() -> None:
    """In dvc.lock it would make the results of two machines differ. That of the frozen stage is in Git."""
    for stage in ORDER:
        listed = [*STAGES[stage]["deps"], *(path for out in STAGES[stage]["outs"] for path in out)]
        timings = {path for path in listed if "timings" in path}
        assert timings <= {"data/timings/pretrain.json"} and bool(timings) == (stage in ("pretrain", "report"))


@cache
def answers() -> dict[str, set[str]]:
    """The sections that each method and property of `Params` reads."""
    tree = ast.parse((ROOT / "dsd" / "config" / "load.py").read_text())
    [kind] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Params"]
    parts = {part.name: part for part in kind.body if isinstance(part, ast.FunctionDef) and part.name[0] != "_"}
    reads = {
        name: {p.attr for p in ast.walk(part) if isinstance(p, ast.Attribute) and ast.unparse(p.value) == "self"}
        for name, part in parts.items()
    }
    while wider := {n: r for n, r in reads.items() if not set().union(*(reads.get(a, r) for a in r), r) <= r}:
        for name, read in wider.items():
            reads[name] = read.union(*(reads.get(attribute, read) for attribute in read))
    return {name: read & SECTIONS for name, read in reads.items()}


class Reads:
    """The sections of params that a stage can read, found in its source.

    It follows every name that is mentioned from the stage's function on (functions, classes, tables of them), and
    counts `.section` on whatever is called `params` or annotated `Params`. Of a class it follows what is not a method,
    special methods, and the methods whose name is an attribute somewhere in what was followed. So a section counts even
    if only a branch reads it, and one is missed that is read under another name or a computed one (getattr).
    Those are caught when the stage runs: `flows.stages.common.params` hands it nothing but what dvc.yaml lists.
    Classes of dsd.config are not followed: what their checks read, `load` has checked before a stage starts.
    """

    def __init__(self) -> None:
        self._nodes: dict[tuple[str, str], list[ast.AST]] = {}
        self._methods: dict[tuple[str, str], dict[str, ast.AST]] = {}
        self._aliases: dict[tuple[str, str], str] = {}
        for module in graph().modules:
            self._index(module, ast.parse((ROOT / file_of(module)).read_text()))

    def _index(self, module: str, tree: ast.Module) -> None:
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                self._nodes[module, node.name] = [node]
            if isinstance(node, ast.ClassDef) and not module.startswith("dsd.config"):
                methods = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
                named = {name: part for name, part in methods.items() if not name.startswith("__")}
                rest = [part for part in node.body if part not in named.values()]
                self._nodes[module, node.name] = [*rest, *node.bases, *node.decorator_list]
                self._methods[module, node.name] = dict(named)
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Name):
                    self._nodes[module, target.id] = [node]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for name in node.names:
                    self._aliases[module, name.asname or name.name] = f"{node.module}.{name.name}"
            if isinstance(node, ast.Import):
                for name in node.names:
                    self._aliases[module, name.asname or name.name] = name.name

    def _find(self, module: str, name: str) -> tuple[str, str] | None:
        """Where a name that a module mentions is defined."""
        while (module, name) not in self._nodes:
            target = self._aliases.get((module, name))
            if target is None or target in graph().modules:
                return None
            module, _, name = target.rpartition(".")
        return module, name

    def _mentions(self, module: str, node: ast.AST) -> set[tuple[str, str]]:
        found = set()
        for part in ast.walk(node):
            if isinstance(part, ast.Name):
                found.add(self._find(module, part.id))
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                found.add(self._find(self._aliases.get((module, part.value.id), ""), part.attr))
        return {place for place in found if place is not None}

    def of(self, stage: str) -> set[str]:
        first = (f"flows.stages.{stage}", stage)
        waiting, places, attributes, sections = [first], set(), set(), set()
        followed: set[tuple[str, str, str]] = set()  # methods

        def follow(module: str, node: ast.AST) -> None:
            nonlocal sections, attributes
            waiting.extend(self._mentions(module, node))
            attributes |= {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
            sections |= self._sections(node)

        while waiting:
            while waiting:
                place = waiting.pop()
                if place not in places:
                    places.add(place)
                    for node in self._nodes[place]:
                        follow(place[0], node)
            for module, kind in places & self._methods.keys():
                for name, node in self._methods[module, kind].items():
                    if name in attributes and (module, kind, name) not in followed:
                        followed.add((module, kind, name))
                        follow(module, node)
        return sections

    @staticmethod
    def _sections(node: ast.AST) -> set[str]:
        types = {
            part.arg: ast.unparse(part.annotation)
            for part in ast.walk(node)
            if isinstance(part, ast.arg) and part.annotation is not None
        }
        names = {name for name, kind in ({"params": "Params"} | types).items() if kind == "Params"}
        read = {
            part.attr
            for part in ast.walk(node)
            if isinstance(part, ast.Attribute)
            if (isinstance(part.value, ast.Name) and part.value.id in names)
            or (isinstance(part.value, ast.Attribute) and part.value.attr in names)
        }
        return read & SECTIONS | {section for name in read for section in answers().get(name, ())}


@cache
def reads() -> Reads:
    return Reads()


@pytest.mark.parametrize("stage", ORDER)
def test_params_are_those_that_the_stage_reads(stage: str) -> None:
    read = reads().of(stage) - {"runtime"}
    assert sorted(listed(stage)) == sorted((str(config.file_of(section)), section) for section in read)


def test_templates_read_no_params_that_the_stage_is_not_seen_to_read() -> None:
    read = {
        name for file in (ROOT / "dsd/report").glob("*.j2") for name in re.findall(r"params\.(\w+)", file.read_text())
    }
    assert read - {"yaml"} <= {section for _, section in listed("report")}


def test_the_shipped_params_load() -> None:
    load(ROOT / "params.yaml")


def test_import_contracts() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "heavy"),
    [
        ("import dsd", {"torch", "prefect", "mlflow", "dvc"}),
        ("import dsd.config, dsd.datasets.preparation", {"torch", "prefect", "mlflow", "dvc"}),
        ("import flows.cli", {"torch", "prefect", "mlflow", "dvc"}),
        ("from dsd import Matcher", {"diffusers", "transformers", "prefect", "mlflow", "dvc"}),
    ],
)
def test_imports_that_must_be_cheap(command: str, heavy: set[str]) -> None:
    check = f"{command}; import sys; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
