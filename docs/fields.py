"""What the API pages show besides docstrings as they are.

Lines `name, name: text` of a docstring, outside of its sections, are a list: Markdown would join them. The fields of a
class follow its docstring.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Docstring, Extension, Object

FIELD = re.compile(r"(?:[a-z_]\w*, )*[a-z_]\w*: ")


def listed(text: str) -> str:
    lines: list[str] = []
    inside = False  # a list item, which continues on the next lines
    for line in text.splitlines():
        field = FIELD.match(line)
        if field and not inside:
            lines.append("")
        inside = bool(line) and (inside or bool(field))
        names, _, rest = line.partition(": ")
        if field:
            quoted = ", ".join(f"`{name}`" for name in names.split(", "))
            lines.append(f"- {quoted}: {rest}")
        else:
            lines.append(f"    {line.strip()}" if inside else line)
    return "\n".join(lines)


def declared(cls: Class) -> str:
    """The fields that a class adds to its bases, as they are written."""
    own = [member for name, member in cls.members.items() if member.is_attribute and not name.startswith("_")]
    fields = [f for f in own if f.annotation and "property" not in f.labels and "ClassVar" not in str(f.annotation)]
    lines = [f"{field.name}: {field.annotation}" for field in fields]
    return "\n".join(["", "", "```python", *lines, "```"]) if lines else ""


class Fields(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None and not obj.is_module:
            obj.docstring.value = listed(obj.docstring.value)

    def on_class(self, *, cls: Class, **_: Any) -> None:
        fields = declared(cls)
        if cls.docstring is None and fields:
            cls.docstring = Docstring("", parent=cls)
        if cls.docstring is not None:
            cls.docstring.value += fields
