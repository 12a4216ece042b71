"""Timing in turns, and the measured speed of memory and arithmetic.

A figure counts only beside others of the same run. So functions are timed in turns (A B A B …) and compared
pair by pair, and the floor of a row is the time that a plain one-pass sum of as many bytes took in the same
rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from daco_rt._machine import last_level_cache

_SETTLE_S = 0.015
"""Wait before each measured call, until the worker threads of the call before it have stopped spinning."""


def in_turns(
    functions: Mapping[str, Callable[[int], object]],
    *,
    seconds: float,
    least: int = 5,
    most: int = 30,
    before: Callable[[], object] | None = None,
) -> dict[str, np.ndarray]:
    """Time functions in turns, A B A B …, and return each one's seconds, round by round.

    Parameters
    ----------
    functions : name → function of the round's number, by which it picks its buffers. One round is run first
        and thrown away.
    seconds : stop after about this long, but not before ``least`` rounds nor after ``most``.
    before : called, untimed, before each call; by default the machine just settles.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    began = time.perf_counter()
    for turn in range(most + 1):
        for name, function in functions.items():
            if before is not None:
                before()
            settle()
            start = time.perf_counter()
            function(turn)
            times[name].append(time.perf_counter() - start)
        if turn >= least and time.perf_counter() - began > seconds:
            break
    return {name: np.array(spent[1:]) for name, spent in times.items()}


def settle() -> None:
    """Wait at work, not asleep, as a decoder keeps its thread at work between two calls.

    After a sleep of this length a scheduler starts or wakes workers on the caller's own core, and they get to
    run only when it next looks there, milliseconds later.
    """
    until = time.perf_counter() + _SETTLE_S
    while time.perf_counter() < until:
        pass


class Reader:
    """Reads memory once and adds it up, as fast as plain library code does: the floor of everything here.

    Successive reads take different stretches of a pool larger than the last-level cache (without ``cold``, of
    two times ``largest`` bytes). Two ways of adding are tried for each number of threads, and the faster one
    is kept.
    """

    def __init__(self, largest: int, *, cold: bool = True) -> None:
        import torch

        count = max(int(1.25 * last_level_cache()) if cold else 0, 2 * largest) // 4
        self.pool = torch.ones(count)
        self._at = 0
        self._way: dict[int, str] = {}

    def read(self, nbytes: int, threads: int) -> None:
        """Sum ``nbytes`` of the pool with so many threads."""
        self._sum(self._next(nbytes), self.way(threads))

    def evict(self) -> None:
        """Read the whole pool, after which no cache holds what was used before."""
        self.pool.sum()

    def way(self, threads: int) -> str:
        """How reads with so many threads are done: "sum" or "dot" (of the two halves)."""
        import torch

        torch.set_num_threads(threads)
        if threads not in self._way:
            probe = self.pool.numel() * 4 // 2
            times = in_turns(
                {way: lambda _, w=way: self._sum(self._next(probe), w) for way in ("sum", "dot")},
                seconds=1.0,
                most=5,
            )
            self._way[threads] = min(times, key=lambda way: float(np.median(times[way])))
        return self._way[threads]

    def _next(self, nbytes: int) -> Any:
        count = nbytes // 4
        if self._at + count > self.pool.numel():
            self._at = 0
        self._at += count
        return self.pool[self._at - count : self._at]

    @staticmethod
    def _sum(part: Any, way: str) -> None:
        import torch

        if way == "sum":
            part.sum()
        else:
            half = part.numel() // 2
            torch.dot(part[:half], part[half : 2 * half])


def peak_flops(threads: int, size: int = 1024) -> float:
    """Best operations a second of torch's fp32 product of two ``size`` x ``size`` matrices."""
    import torch

    torch.set_num_threads(threads)
    left, right = torch.rand(size, size), torch.rand(size, size)
    times = in_turns({"mm": lambda _: left @ right}, seconds=1.0, most=15)["mm"]
    return 2.0 * size**3 / float(times.min())


def copies_for(nbytes: int) -> int:
    """How many copies of a buffer it takes so that going round them leaves none of it in a cache."""
    return max(2, -(-int(1.25 * last_level_cache()) // nbytes))


def spread(seconds: np.ndarray) -> dict[str, Any]:
    """The fields of a row that describe a sample of times."""
    low, middle, high = np.quantile(seconds, (0.1, 0.5, 0.9)) * 1e3
    return {
        "median_ms": float(middle),
        "p10_ms": float(low),
        "p90_ms": float(high),
        "samples": len(seconds),
    }


def against(mine: np.ndarray, other: np.ndarray) -> float:
    """How many times longer the other took, the median over the pairs."""
    return float(np.median(other / mine))
