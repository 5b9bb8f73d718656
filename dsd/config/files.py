"""The files of params: params.yaml and those beside it that hold one section each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dsd.errors import ParamsError, brief, unknown

APART = ("studies", "races", "pretrain")  # sections in a file of their own beside params.yaml: <section>.yaml


def file_of(section: str, path: Path | str = "params.yaml") -> Path:
    """The file that holds a section, where params.yaml is at `path`."""
    return Path(path).with_name(f"{section}.yaml") if section in APART else Path(path)


def files(path: Path | str = "params.yaml") -> list[Path]:
    """params.yaml and the files beside it."""
    return [Path(path), *(file_of(section, path) for section in APART)]


def read(path: Path | str = "params.yaml") -> dict[str, Any]:
    """The sections of params.yaml and the files beside it, unchecked.

    Raises:
        ParamsError: a file is missing or not YAML, or a section is in the wrong file or in two; one line.
    """
    return merged({file: _parsed(file, path) for file in files(path)}, path)


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, of which others keep the last value, and numbers that are others in
    YAML 1.2, which DVC reads: 010 (8 in YAML 1.1) and 1:30 (90)."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if re.fullmatch(r"[-+]?(0[0-9_]+|[0-9_]*:[0-9_:]*)", node.value):
            problem = f"{node.value} is another number in YAML 1.2; write it in decimals, without a leading zero"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_yaml_int(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in (key for number, key in enumerate(keys) if key in keys[:number]):
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _parsed(file: Path, path: Path | str) -> Any:
    try:
        return parsed(file)
    except FileNotFoundError:
        if file == Path(path):
            raise ParamsError(f"{file}: no such file; run from the project's folder or name the file") from None
        raise ParamsError(f"{file}: no such file; it must hold the section {file.stem}") from None


def parsed(file: Path) -> Any:
    """The content of a YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ParamsError: it cannot be read, is not YAML, or has a key twice; one line.
    """
    try:
        return yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ParamsError(f"{file}: not valid YAML: {brief(error, None)}") from None
    except UnicodeDecodeError:
        raise ParamsError(f"{file}: not text in UTF-8") from None
    # A number of thousands of digits, thousands of levels, a NUL in the path.
    except (ValueError, RecursionError) as error:
        raise ParamsError(f"{str(file)!r}: cannot be read: {str(error)[:200]}") from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ParamsError(f"{file}: {error.strerror}") from None


def merged(contents: Mapping[Path, Any], path: Path | str = "params.yaml") -> dict[str, Any]:
    """The sections of all files.

    Raises:
        ParamsError: a section is not in its file; one line that names both.
    """
    sections: dict[str, Any] = {}
    for file, content in contents.items():
        if not isinstance(content, Mapping):
            raise ParamsError(f"{file}: not a mapping of sections, found {content!r}")
        for section in content:
            if (home := file_of(section, path)) != file:
                raise ParamsError(f"{file}: holds the section {section}, which belongs in {home} alone")
        sections |= content
    return sections


def by_file(sections: Mapping[str, Any], path: Path | str = "params.yaml") -> dict[Path, dict[str, Any]]:
    """The content of each file, from the sections of all; the inverse of `merged`."""
    contents: dict[Path, dict[str, Any]] = {file: {} for file in files(path)}
    for section, content in sections.items():
        contents[file_of(section, path)][section] = content
    return contents


def assign(sections: Any, path: Sequence[str], value: Any, where: str) -> None:
    """Set the value of an existing key; for errors see `node_at`."""
    node_at(sections, path, where)
    node_at(sections, path[:-1], where)[path[-1]] = value


def node_at(sections: Any, path: Sequence[str], where: str) -> Any:
    """The value at a path of keys.

    Raises:
        ParamsError: there is no such key; the line starts with `where`.
    """
    node = sections
    for part in path:
        if not isinstance(node, dict) or part not in node:
            raise ParamsError(f"{where}: {unknown('key', part, node if isinstance(node, dict) else ())}")
        node = node[part]
    return node
