"""Progress bars with rate and remaining time, on a terminal only."""

from __future__ import annotations

from functools import partial

from tqdm import tqdm

# disable=None: no bar if stderr is not a terminal.
progress = partial(tqdm, disable=None, dynamic_ncols=True, smoothing=0.1)
