"""Timing on a GPU: calls are captured in a CUDA graph, replayed, and timed by the device's own clock.

On the CPU the same calls just run, so that every script can be tried without a GPU. Scripts of this folder
import the modules of the folder above by putting it on the path; importing this one does that.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

Call = Callable[[], object]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare ``--device`` (cuda where there is one, else the CPU) and ``--compact``."""
    chosen = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default=chosen, help=f"where to run (here: {chosen})"
    )
    parser.add_argument(
        "--compact",
        action="store_true",
        help="full sizes, but only the cases that have a goal, and fewer rounds",
    )


def on_gpu(device: torch.device) -> bool:
    """Whether times come from a GPU; otherwise they mean nothing and only show that the script runs."""
    return device.type == "cuda"


def describe(device: torch.device) -> dict[str, Any]:
    """What a report says about the device: its name, its size, and the CUDA version of torch."""
    if not on_gpu(device):
        return {"device": "cpu (dry run: times mean nothing)"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "device_memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }


class Replay:
    """One or more calls as a CUDA graph; on the CPU, and with ``capture=False``, the calls themselves.

    Parameters
    ----------
    calls : the calls of one replay, in order. Each should use other buffers, so that no call finds its
        operands in the cache because the one before has just read them.
    capture : False for code that waits for the device and so cannot be captured.
    """

    def __init__(self, calls: Sequence[Call], device: torch.device, *, capture: bool = True) -> None:
        self.calls, self.device = calls, device
        self.graph: torch.cuda.CUDAGraph | None = None
        if not on_gpu(device):
            return
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):
                for call in calls:
                    call()
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        if capture:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                for call in calls:
                    call()

    def run(self) -> None:
        """Replay once."""
        if self.graph is not None:
            self.graph.replay()
        else:
            for call in self.calls:
                call()

    def seconds(self) -> float:
        """Replay once and return the seconds of one call."""
        if not on_gpu(self.device):
            start = time.perf_counter()
            self.run()
            return (time.perf_counter() - start) / len(self.calls)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self.run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(self.calls)


def in_turns(replays: Mapping[str, Replay], *, rounds: int) -> dict[str, np.ndarray]:
    """Time replays in turns, A B A B …, and return each one's seconds a call, round by round."""
    times: dict[str, list[float]] = {name: [] for name in replays}
    for turn in range(rounds + 1):
        for name, replay in replays.items():
            spent = replay.seconds()
            if turn > 0:
                times[name].append(spent)
    return {name: np.array(spent) for name, spent in times.items()}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written together, of a large copy: the ceiling of what memory bounds."""
    count = (1 << 30) if on_gpu(device) else (1 << 20)
    source = torch.ones(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times = in_turns({"copy": Replay([lambda: target.copy_(source)], device)}, rounds=15)["copy"]
    return 2 * source.numel() * 4 / float(np.median(times))


def peak_memory_mb(device: torch.device) -> float | None:
    """Most memory that torch's allocator has held on the GPU, in MB."""
    return torch.cuda.max_memory_allocated(device) / 1e6 if on_gpu(device) else None
