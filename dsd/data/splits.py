"""Few-shot splits that never share a picture (first paper, section 5.2: 5 % of the data train the model)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Literal, get_args

from dsd.errors import DataError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def split(
    groups: Sequence[str], *, few_shot: int, validation: int, test: int, seed: int, sample: int
) -> dict[str, Split]:
    """Which split each group of rows belongs to; a group that is not in the answer belongs to none.

    Groups are ordered by the hash of (seed, group), so neither the order of the rows nor the other groups
    move one within that order, and are then dealt out whole: from its end to test until that has its rows, from
    its beginning to validation. What is left is ordered anew with `sample` and fills train. So every few-shot
    sample is measured on the same test rows, and a larger one contains the smaller. A split can exceed its number
    by the rest of its last group.

    Args:
        groups: the group of each row. Rows that share a picture share their group.
        few_shot, validation, test: rows wanted in train, validation and test, 0 or more.
        seed: another seed gives another order.
        sample: another one gives another few-shot sample beside the same validation and test rows.

    Raises:
        DataError: there are too few rows for the three splits.
    """
    sizes = Counter(groups)

    def order(*salt: int) -> list[str]:
        return sorted(sizes, key=lambda group: hashlib.sha256("/".join(map(str, (*salt, group))).encode()).digest())

    result: dict[str, Split] = {}
    dealt: list[tuple[Split, int, list[str]]] = [
        ("test", test, order(seed)[::-1]),
        ("validation", validation, order(seed)),
        ("train", few_shot, order(seed, sample)),
    ]
    for name, rows, ordered in dealt:
        filled = 0
        remaining = (group for group in ordered if group not in result)
        while filled < rows:
            group = next(remaining, None)
            if group is None:
                raise DataError(
                    f"{sizes.total()} rows are too few for {few_shot} + {validation} + {test} in whole groups"
                )
            result[group] = name
            filled += sizes[group]
    return result
