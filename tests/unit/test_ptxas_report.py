"""Kernels keep their numbers in registers: what the assembler says of each."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LISTING = ROOT / "benchmarks" / "results" / "ptxas-sm90a.json"

spec = importlib.util.spec_from_file_location("ptxas_report", ROOT / "scripts" / "ptxas_report.py")
assert spec is not None and spec.loader is not None
ptxas_report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ptxas_report)


def test_parse_reads_registers_spills_and_shared_memory():
    text = """
ptxas info    : Compiling entry function '_ZN4daco4cuda4editILNS_5DTypeE2EEEvNS0_4CallE' for 'sm_90a'
ptxas info    : Function properties for _ZN4daco4cuda4editILNS_5DTypeE2EEEvNS0_4CallE
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 16 bytes cumulative stack size, 96 bytes smem
"""
    (kernel,) = ptxas_report.parse(text, "edit.cu")
    assert kernel["registers"] == 128 and kernel["spill_bytes"] == 12
    assert kernel["stack_bytes"] == 16 and kernel["shared_bytes"] == 96


def test_listing_covers_every_kernel_file_and_nothing_spills():
    listed = json.loads(LISTING.read_text())
    files = {kernel["file"] for kernel in listed["kernels"]}
    have = {p.name for p in (ROOT / "csrc" / "cuda").glob("*.cu") if "__global__" in p.read_text()}
    assert files == have, "run python scripts/ptxas_report.py --output benchmarks/results/ptxas-sm90a.json"
    assert not [kernel for kernel in listed["kernels"] if kernel["spill_bytes"]]


@pytest.mark.slow
@pytest.mark.skipif(ptxas_report.find_nvcc() is None, reason="no nvcc")
def test_hot_kernels_spill_nothing():
    hot = [ROOT / "csrc" / "cuda" / name for name in ("encode_mma.cu", "select.cu", "edit.cu")]
    kernels = ptxas_report.report(sources=hot)
    assert len(kernels) > 10
    assert not [kernel for kernel in kernels if kernel["spill_bytes"] or kernel["stack_bytes"]]
