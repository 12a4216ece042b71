"""Everything here needs a GPU and a build with CUDA kernels, and is skipped elsewhere with the reason.

DACO_RT_TEST_DEVICE=cpu runs what makes sense there on the CPU kernels: it tests the tests.
"""

from __future__ import annotations

import os

import pytest


def _why_not(device: str) -> str | None:
    from daco_rt.errors import DacoError

    try:
        import torch

        from daco_rt.ops import torch_ops
    except (ImportError, DacoError) as error:
        return str(error)
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None if torch_ops._HAS_CUDA else "this build has no CUDA kernels"


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tests run."""
    chosen = os.environ.get("DACO_RT_TEST_DEVICE", "cuda")
    reason = _why_not(chosen)
    if reason is not None:
        pytest.skip(reason)
    return chosen


@pytest.fixture
def gpu(device: str) -> str:
    """A device with streams and graphs."""
    if device == "cpu":
        pytest.skip("needs a GPU, not only its tests' logic")
    return device


@pytest.fixture(autouse=True)
def dirty_memory(device: str) -> None:
    """Leave NaN and large numbers where torch's allocator will put outputs and workspaces."""
    import torch

    held = [
        torch.full((size,), fill, device=device)
        for size in (64, 1 << 10, 1 << 16, 1 << 20, 1 << 24)
        for fill in (float("nan"), 3e38, float("nan"))
    ]
    del held
