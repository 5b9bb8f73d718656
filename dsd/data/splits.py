"""Few-shot splits that share no image (first paper, section 5.2: 5 % of the data are used for training)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Literal, get_args

from dsd.errors import DataError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def split_groups(
    groups: Sequence[str], *, few_shot: int, validation: int, test: int, seed: int, sample: int
) -> dict[str, Split]:
    """Assign groups of rows to splits; groups that no split needs are left out of the result.

    Groups are sorted by the hash of (seed, group). Test takes whole groups from the end until it has its number of
    rows, validation from the beginning. Train takes the rest, sorted by the hash of (seed, sample, group). So other
    rows do not change the order, every few-shot sample is evaluated on the same test rows, and a larger one contains
    the smaller. A split can exceed its number by less than its last group.

    Args:
        groups: the group of each row. Rows that share an image share their group.
        few_shot, validation, test: number of rows in train, validation and test.
        seed: selects the order of the groups.
        sample: selects the few-shot sample; validation and test do not depend on it.

    Raises:
        DataError: there are too few rows for the three splits.
    """
    sizes = Counter(groups)

    def order(*salt: int) -> list[str]:
        return sorted(sizes, key=lambda group: hashlib.sha256("/".join(map(str, (*salt, group))).encode()).digest())

    result: dict[str, Split] = {}
    requests: list[tuple[Split, int, list[str]]] = [
        ("test", test, order(seed)[::-1]),
        ("validation", validation, order(seed)),
        ("train", few_shot, order(seed, sample)),
    ]
    for name, rows, ordered in requests:
        filled = 0
        remaining = (group for group in ordered if group not in result)
        while filled < rows:
            group = next(remaining, None)
            if group is None:
                largest, most = sizes.most_common(1)[0] if sizes else ("", 0)
                shared = f"; {most} of them share images, among them {largest}" if most > 1 else ""
                raise DataError(
                    f"{sizes.total()} rows in whole groups are too few for {few_shot} few-shot, {validation} "
                    f"validation and {test} test examples{shared}"
                )
            result[group] = name
            filled += sizes[group]
    return result
