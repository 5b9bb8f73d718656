"""Base classes and shared types of the params models."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import import_module
from inspect import get_annotations
from itertools import pairwise
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from dsd.errors import unknown

if TYPE_CHECKING:
    from dsd.config.load import Params

Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Margin = Annotated[float, Field(ge=0, lt=1)]  # of a difference between two shares
Positive = Annotated[int, Field(gt=0)]
LONGEST_SIDE = 4096  # an image of this side takes 50 MB
Side = Annotated[int, Field(gt=0, le=LONGEST_SIDE)]  # of a resized image, in pixels
LEVEL_NUMBERS = 1_000_000  # different noise levels
Level = Fraction  # of the noise schedule: 0 is the image, 1 is noise
Direction = Literal["clean", "noisy", "middle"]  # in which a hierarchical schedule orders the noise levels
# When a hierarchical schedule drops candidates. Section 3 of the second paper: after each timestep; its Algorithm 1:
# after each sample.
Reading = Literal["text", "listing"]
Budget = Annotated[float, Field(ge=1)]  # maximum number of evaluations, as a multiple of the number of candidates
Heads = Literal["weighted", "mean"]
Prompt = Literal["none", "few-shot"]  # of the attention: none, or the one that is trained on the few-shot split
PROMPTS: tuple[Prompt, ...] = get_args(Prompt)
Part = Literal["attention", "prompted-attention", "denoising", "prompted-denoising"]
Pooling = Literal["logsumexp", "maximum", "cosine", "logits"]
Template = Annotated[str, Field(pattern=r"^[^{}]*\{\}[^{}]*$")]  # with one placeholder {}


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuse an empty or repeating list: its mean would be NaN or count a value twice."""
    if not values or len(set(values)) < len(values):
        raise ValueError("needs at least one value, and none twice")
    return values


def _apart(values: tuple[float, ...]) -> tuple[float, ...]:
    """Refuse levels that are one to a draw, whose noise is seeded by the rounded level."""
    if len({level_number(value) for value in values}) < len(values):
        raise ValueError(f"levels must differ by at least {1 / LEVEL_NUMBERS:.0e}")
    return values


def level_number(level: float) -> int:
    """Return the number of a noise level that its noise is seeded by."""
    return round(level * LEVEL_NUMBERS)


def _falling(values: tuple[int, ...]) -> tuple[int, ...]:
    if any(b > a for a, b in pairwise(values)):
        raise ValueError("must fall from stage to stage")
    return values


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", value):
        raise ValueError("a name has letters, digits, '.', '_' and '-' only and starts with a letter, a digit or '_'")
    return value


def _word_or_number(*words: str) -> BeforeValidator:
    """Refuse what is neither one of the words nor a number above 0, in one message for the whole union."""

    def check(value: Any) -> Any:
        if value not in words and not (type(value) is int and value > 0):
            raise ValueError(f"must be {', '.join(words)} or a number above 0")
        return value

    return BeforeValidator(check)


Name = Annotated[str, AfterValidator(_name)]  # of a row that files and folders are named by
Layers = Annotated[Literal["all"] | Positive, _word_or_number("all")]  # all, or the last n
HeadChoice = Annotated[Heads | Positive, _word_or_number(*get_args(Heads))]  # a number: so many random heads
Distinct = AfterValidator(_distinct)
ToKeep = Annotated[tuple[Positive, ...], Field(min_length=1), AfterValidator(_falling)]
Levels = Annotated[tuple[Level, ...], Distinct, AfterValidator(_apart)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # larger ones overflow the seeds of draws
Parts = Annotated[tuple[Part, ...], Distinct]
Poolings = Annotated[tuple[Pooling, ...], Distinct]


def check_known(key: str, kind: str, name: str, choices: Iterable[str]) -> None:
    """Raise ValueError, which starts with the key, unless the name is among the choices."""
    if name not in (known := list(choices)):
        raise ValueError(f"{key}: {unknown(kind, name, known)}")


WORD_FOR_NUMBER = "word_for_number"  # the type of this error, whose key is in its context


class ParamsModel(BaseModel):
    """A section or a row of params: frozen, and unknown keys are errors.

    Fields have no defaults, because DVC would not see them, except for optional keys, whose default is None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_words_for_numbers(cls, data: Any) -> Any:
        """Refuse a YAML word such as `no` or `on` where a number belongs; pydantic would read it as 0 or 1."""
        for key, value in data.items() if isinstance(data, dict) else ():
            field = cls.model_fields.get(key)
            if _has_bool(value) and field is not None and not _mentions(field.annotation, bool):
                raise PydanticCustomError(WORD_FOR_NUMBER, "must not be yes, no, true or false", {"key": key})
        return data


def _has_bool(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_has_bool, value)))


def _mentions(annotation: Any, kind: type) -> bool:
    return annotation in (kind, Any) or any(_mentions(part, kind) for part in get_args(annotation))


def is_unset(value: object) -> bool:
    """Omit unset optional keys (`exclude_if`), so that adding such a key changes no digest of a row without it."""
    return value is None


class Kind(ParamsModel):
    """A row that comes in several kinds; the value of one Literal field, the selector, names the kind.

    A section's base class sets `selector` and `package`. A subclass that annotates the selector field is a kind: it
    registers itself in `kinds` under each value of the Literal. A class without that field, used as a field type, means
    the tagged union of all kinds that derive from it.
    """

    selector: ClassVar[str] = ""
    package: ClassVar[str] = ""  # imported on an unknown kind: its modules define further kinds
    kinds: ClassVar[dict[str, Any]] = {}  # value of the selector → class

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "selector" in cls.__dict__:
            cls.kinds = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        if cls.selector not in get_annotations(cls):
            return
        for value in get_args(cls.model_fields[cls.selector].annotation):
            other = cls.kinds.get(value, cls)
            if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TypeError(f"{cls.selector} {value!r} is both {other.__qualname__} and {cls.__qualname__}")
            cls.kinds[value] = cls

    @classmethod
    def choices(cls) -> dict[str, Any]:
        """The kinds that a field of this type accepts, by the value of the selector; none if this is a kind itself."""
        if cls.selector in cls.__pydantic_fields__:
            return {}
        return {value: kind for value, kind in cls.kinds.items() if issubclass(kind, cls)}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schemas = {value: handler.generate_schema(kind) for value, kind in cls.choices().items()}
        return core_schema.tagged_union_schema(schemas, cls.selector) if schemas else handler(source)

    def check(self, name: str, params: Params) -> None:
        """Check this row, called `name`, against the other sections.

        Raises:
            ValueError: they disagree; the message starts with the key.
        """


def constants(package: str, path: Iterable[str], name: str) -> list[Any]:
    """The constant `name` of each module of a package that has one; imports all its modules."""
    modules = [import_module(f"{package}.{module.name}") for module in iter_modules(path)]
    return [getattr(module, name) for module in modules if hasattr(module, name)]


def registered() -> list[tuple[str, Any]]:
    """All kinds that are registered now."""
    return [item for base in Kind.__subclasses__() for item in base.kinds.items()]
