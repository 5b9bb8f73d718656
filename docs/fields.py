"""Lines `name, name: text` of a docstring, outside of its sections, as a list: Markdown would join them."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

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


class Fields(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None and not obj.is_module:
            obj.docstring.value = listed(obj.docstring.value)
