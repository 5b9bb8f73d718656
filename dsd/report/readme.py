"""The result table of the README, made from metrics.json: `python -m dsd.report.readme` writes it between its marks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dsd.errors import DataError

BEGIN, END = "<!-- results: made from data/evaluate/metrics.json by `make readme` -->", "<!-- /results -->"


def table(metrics: dict[str, Any]) -> str:
    """One Markdown table a dataset: methods by metrics, in percent with the interval."""
    parts = []
    for dataset, methods in metrics.items():
        names = list(next(iter(methods.values())))
        counts = next(iter(methods.values()))
        head = " | ".join(f"{name} (n = {counts[name]['n']})" for name in names)
        lines = [f"| {dataset} | {head} |", "|---" * (len(names) + 1) + "|"]
        for method, values in methods.items():
            cells = (
                f"{100 * v['value']:.1f} [{100 * v['low']:.1f}, {100 * v['high']:.1f}]"
                for v in (values[n] for n in names)
            )
            lines.append(f"| {method} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def updated(readme: str, metrics: dict[str, Any]) -> str:
    """The README with the table of these metrics between its marks.

    Raises:
        DataError: the marks are not there.
    """
    if BEGIN not in readme or END not in readme:
        raise DataError(f"README.md: lacks the marks {BEGIN} and {END}")
    before, rest = readme.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{table(metrics)}\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    readme = Path("README.md")
    try:
        readme.write_text(updated(readme.read_text(), json.loads(Path("data/evaluate/metrics.json").read_text())))
    except (DataError, FileNotFoundError) as error:
        sys.exit(f"readme: {error}")


if __name__ == "__main__":
    main()
