"""Few-shot splits that never share a picture (first paper, section 5.2: 5 % of the data train the model)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Literal, get_args

from dsd.errors import DataError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def split(groups: Sequence[str], *, few_shot: int, validation: int, test: int, seed: int) -> dict[str, Split]:
    """Which split each group of rows belongs to; a group that is not in the answer belongs to none.

    Groups are ordered by the hash of (seed, group), so neither the order of the rows nor the other groups
    move one within that order, and are then dealt out whole: train until it has `few_shot` rows, then
    validation, then test. A split can therefore exceed its number by the rest of its last group.

    Args:
        groups: the group of each row. Rows that share a picture share their group.
        few_shot, validation, test: rows wanted in train, validation and test, 0 or more.
        seed: another seed gives another order.

    Raises:
        DataError: there are too few rows for the three splits.
    """
    sizes = Counter(groups)
    wanted: dict[Split, int] = {"train": few_shot, "validation": validation, "test": test}
    remaining = iter(sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest()))
    result: dict[str, Split] = {}
    for name, rows in wanted.items():
        filled = 0
        while filled < rows:
            group = next(remaining, None)
            if group is None:
                raise DataError(
                    f"{sizes.total()} rows are too few for {few_shot} + {validation} + {test} in whole groups"
                )
            result[group] = name
            filled += sizes[group]
    return result
