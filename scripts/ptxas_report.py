"""Registers, shared memory and spills of every CUDA kernel, as the assembler reports them.

    python scripts/ptxas_report.py                       # a table
    python scripts/ptxas_report.py --output FILE.json    # and the same as JSON

Compiles each kernel file of csrc/cuda for one generation of GPU (default sm_90a) to nothing but machine code.
Needs nvcc, no GPU. About a minute. Exits with 1 if a kernel spills registers to memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin")


def find_nvcc() -> str | None:
    """The compiler on PATH or in the usual folder, or None."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def kernels_of(source: Path, arch: str, nvcc: str) -> list[dict[str, object]]:
    """Compile one file and return its kernels: name, registers, stack, spills and shared memory in bytes."""
    target = f"arch=compute_{arch},code=sm_{arch}"
    done = subprocess.run(
        [nvcc, *FLAGS, "-gencode", target, f"-I{ROOT / 'csrc'}", "-o", os.devnull, str(source)],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"ptxas_report: {source.name} does not compile:\n{done.stderr}")
    return parse(done.stderr, source.name)


def parse(text: str, file: str) -> list[dict[str, object]]:
    """Read what ``-Xptxas -v`` printed.

    Example
    -------
    >>> lines = '''ptxas info    : Compiling entry function '_Z1kv' for 'sm_90a'
    ...     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
    ... ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem'''
    >>> parse(lines, "a.cu")[0]["registers"], parse(lines, "a.cu")[0]["spill_bytes"]
    (40, 16)
    """
    found: list[dict[str, object]] = []
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            found.append({"file": file, "kernel": readable(match[1])})
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            if found and "registers" not in found[-1]:
                found[-1] |= {"stack_bytes": int(match[1]), "spill_bytes": int(match[2]) + int(match[3])}
        elif (match := re.search(r"Used (\d+) registers", line)) and found:
            shared = re.search(r"(\d+) bytes smem", line)
            found[-1] |= {"registers": int(match[1]), "shared_bytes": int(shared[1]) if shared else 0}
    return found


def readable(symbol: str) -> str:
    """A kernel's name without namespaces and arguments."""
    tool = shutil.which("c++filt")
    name = symbol
    if tool is not None:
        name = subprocess.run([tool, symbol], capture_output=True, text=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)|daco::cuda::|daco::", "", name)
    types = ("fp32", "fp16", "bf16", "int8", "fp8")
    name = re.sub(r"\(DType\)(\d)", lambda m: types[int(m[1])], name)
    name = re.sub(r"^void |::", "", name)
    depth, kept = 0, []
    for letter in name:
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            break
        kept.append(letter)
    return "".join(kept)


def report(arch: str = "90a", sources: list[Path] | None = None) -> list[dict[str, object]]:
    """Compile the kernel files and return all kernels, files in order of name."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("ptxas_report: no nvcc on PATH")
    files = sorted(SOURCES.glob("*.cu")) if sources is None else sources
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return [kernel for part in pool.map(lambda f: kernels_of(f, arch, nvcc), files) for kernel in part]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="90a", help="generation of GPU (default: 90a)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where JSON goes")
    options = parser.parse_args()
    kernels = report(options.arch)
    for k in kernels:
        print(f"{k['registers']:>4} registers  {k['spill_bytes']:>5} spilled  {k['stack_bytes']:>5} stack  "
              f"{k['shared_bytes']:>6} shared  {k['file']}: {k['kernel']}")  # fmt: skip
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        text = {"arch": f"sm_{options.arch}", "kernels": kernels}
        options.output.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    return 1 if any(k["spill_bytes"] for k in kernels) else 0


if __name__ == "__main__":
    sys.exit(main())
