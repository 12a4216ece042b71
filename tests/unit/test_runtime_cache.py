"""Cache lengths and the copy of rows."""

from __future__ import annotations

import numpy as np
import pytest

from daco_rt.errors import DacoError
from daco_rt.runtime.cache import KvCache, cache_length


@pytest.mark.parametrize(
    ("prompt", "new", "longest", "expected"),
    [(1, 1, 2048, 64), (60, 4, 2048, 64), (60, 5, 2048, 128), (90, 10, 100, 100), (5, 5, 10, 10)],
)
def test_lengths_are_rounded_up_within_the_limit(prompt: int, new: int, longest: int, expected: int) -> None:
    assert cache_length(prompt, new, longest) == expected


def test_what_does_not_fit_says_what_to_do() -> None:
    with pytest.raises(DacoError, match=r"has 90 tokens and 20 new .* holds 100; ask for at most 10 .* 110"):
        cache_length(90, 20, 100)
    with pytest.raises(DacoError, match="shorten the prompt"):
        cache_length(100, 1, 100)


def test_kept_rows_are_copies_in_order() -> None:
    cache = KvCache.allocate(4, 64, layers=2, kv_heads=2, head_dim=4, dtype=np.dtype(np.float16))
    assert cache.nbytes == 2 * 2 * 4 * 2 * 64 * 4 * 2 and cache.dtype == np.float16
    for row in range(4):
        cache.arrays["v.1"][row] = row
    cache.lengths[:] = [1, 2, 3, 4]
    cache.next_position[:] = [5, 6, 7, 8]
    kept = cache.keep(np.array([3, 1]))
    assert kept.batch == 2 and kept.lengths.tolist() == [4, 2] and kept.next_position.tolist() == [8, 6]
    assert (kept.arrays["v.1"][0] == 3).all() and (kept.arrays["v.1"][1] == 1).all()
    cache.arrays["v.1"][:] = 9
    assert (kept.arrays["v.1"] < 9).all()
