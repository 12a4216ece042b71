"""Export of a 24-block, d = 1,024 InternVL with random weights: seconds and peak memory.

    python benchmarks/export_memory.py            # about two minutes, 7 GB of disk in the temporary folder
    python benchmarks/export_memory.py --quick

Each export is a fresh ``python -m daco_rt.export`` process, its memory the peak that the system recorded for
it. In place: precision unchanged, weights linked; with the checkpoint in the system's file cache and without.
Converting: fp32 to fp16, against a plain copy of the checkpoint file that is flushed to disk; rates count
bytes read and written.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import Check, Report, Row, Target, arguments
from timing import against, spread

from daco_rt._machine import cores
from daco_rt.artifacts import load_bundle, write_safetensors
from daco_rt.errors import DacoError
from daco_rt.models import family, resolve_checkpoint

# Starts a command from a small process: a child's recorded peak includes what it was forked from.
LAUNCHER = """
import json, os, subprocess, sys, time
began = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
message = child.stderr.read().decode(errors="replace")
_, status, usage = os.wait4(child.pid, 0)
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "peak": usage.ru_maxrss * 1024, "status": status, "message": message}))
"""


@dataclass(frozen=True)
class Size:
    """Shape of the checkpoint and how often each thing is done."""

    blocks: int
    dim: int
    inner: int
    vocabulary: int
    tower: dict[str, Any]
    image_tokens: int
    rounds: int


# The text model has the sizes of Qwen1.5-0.5B, the tower those that the architecture has by default.
FULL = Size(24, 1_024, 2_816, 151_936, {}, 256, 3)
_SMALL_TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
QUICK = Size(3, 128, 256, 2_000, _SMALL_TOWER | {"image_size": [56, 56]}, 4, 1)


# What is measured: name, precision, whether the checkpoint is in the file cache.
CASES = (
    ("in place", "fp32", True),
    ("in place, file not cached", "fp32", False),
    ("converting fp32 to fp16", "fp16", True),
)


def write_checkpoint(folder: Path, size: Size) -> Path:
    """Write a checkpoint of random fp32 weights, a tensor at a time, and return its weight file."""
    text = {
        "model_type": "qwen2", "hidden_size": size.dim, "intermediate_size": size.inner,
        "num_hidden_layers": size.blocks, "num_attention_heads": 16, "num_key_value_heads": 16,
        "vocab_size": size.vocabulary, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True,
    }  # fmt: skip
    config = {
        "architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl", "dtype": "float32",
        "image_token_id": 5, "image_seq_length": size.image_tokens, "downsample_ratio": 0.5,
        "tie_word_embeddings": True, "text_config": text, "vision_config": size.tower,
    }  # fmt: skip
    spec = family("internvl")
    shapes = {
        spec.text_prefixes[0] + name: shape
        for name, shape in spec.decoder_config(config, False).tensor_shapes().items()
    }
    shapes |= {spec.vision_prefixes[0] + name: shape for name, shape in spec.vision_shapes(config).items()}
    folder.mkdir()
    # A tokenizer is needed beside the weights; the built-in one serves, for no text is made here.
    for path in resolve_checkpoint("internvl", "pocket-internvl").path.iterdir():
        if path.suffix in (".json", ".jinja") and path.name not in ("config.json", "build.json"):
            shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    draw = np.random.default_rng(0)
    weights = folder / "model.safetensors"
    write_safetensors(
        weights, {name: ("F32", shape, partial(random_rows, draw, shape)) for name, shape in shapes.items()}
    )
    return weights


def random_rows(draw: np.random.Generator, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield a tensor of deviation 0.02, some rows at a time."""
    step = max(1, (4 << 20) * shape[0] // int(np.prod(shape)))
    for start in range(0, shape[0], step):
        rows = draw.standard_normal((min(step, shape[0] - start), *shape[1:]), dtype=np.float32)
        yield rows * np.float32(0.02)


def export(checkpoint: Path, output: Path, precision: str) -> dict[str, Any]:
    """Export in a fresh process; seconds from its start to its end, peak resident bytes, how it ended."""
    command = [
        sys.executable, "-m", "daco_rt.export", "--model", "internvl", "--checkpoint", str(checkpoint),
        "--output", str(output), "--precision", precision,
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LAUNCHER, *command],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    found: dict[str, Any] = json.loads(done.stdout)
    if found["status"]:
        raise SystemExit(f"the export failed: {found['message'].strip()}")
    return found


def copy_flushed(source: Path, target: Path) -> float:
    """Copy a file, flush it to disk, and return the seconds."""
    began = time.perf_counter()
    shutil.copyfile(source, target)
    with open(target, "rb+") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - began


def settle_cache(file: Path, cached: bool) -> None:
    """Bring a file into the system's file cache, or put it out; finish what was being written first."""
    os.sync()
    with open(file, "rb") as source:
        if cached:
            while source.read(16 << 20):
                pass
        else:
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check_bundle(bundle: Path, checkpoint: Path, precision: str) -> Check:
    """The bundle opens whole, ONNX Runtime-free, and its first block's weights are the checkpoint's."""
    try:
        found = load_bundle(bundle, verify=True)
    except DacoError as error:
        return Check(False, str(error))
    source = resolve_checkpoint("internvl", checkpoint)
    linked = [bundle / name for name in found.manifest["references"]]
    if precision == "fp32":
        same = bool(linked) and all(
            os.path.samefile(path, checkpoint / "model.safetensors") for path in linked
        )
        return Check(same, f"files as recorded; {len(linked)} weight file, the checkpoint's own by hard link")
    table = found.embedding_ref()
    raw = np.memmap(table.file, np.float16, "r", table.offset, tuple(table.shape))
    wanted = source.read("embed_tokens.weight")
    same = all(
        np.array_equal(raw[i : i + 64], wanted[i : i + 64].astype(np.float16))
        for i in range(0, len(raw), max(64, len(raw) // 8))
    )
    return Check(same, "files as recorded; sampled embeddings equal the checkpoint's, rounded to fp16")


def measure(size: Size, scratch: Path, settings: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows, each export beside a plain copy."""
    checkpoint = scratch / "checkpoint"
    began = time.perf_counter()
    weights = write_checkpoint(checkpoint, size)
    nbytes = weights.stat().st_size
    settings["checkpoint_bytes"] = nbytes
    print(f"  wrote {nbytes / 1e9:.2f} GB in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    for name, precision, cached in CASES:
        times: dict[str, list[float]] = {"export": [], "copy": []}
        peak, written, check = 0.0, 0, Check(False, "")
        for turn in range(size.rounds):
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                output = Path(folder) / "bundle"
                settle_cache(weights, cached)
                done = export(checkpoint, output, precision)
                times["export"].append(done["seconds"])
                peak = max(peak, done["peak"] / 1e6)
                if turn == 0:
                    check = check_bundle(output, checkpoint, precision)
                    written = owned_bytes(output)
            settle_cache(weights, cached)
            times["copy"].append(copy_flushed(weights, scratch / "copy"))
            (scratch / "copy").unlink()
        spent = {key: np.array(values) for key, values in times.items()}
        copy_rate = 2 * nbytes / float(np.median(spent["copy"]))
        rate = (nbytes + written) / float(np.median(spent["export"]))
        low, high = np.quantile(spent["copy"], (0.1, 0.9)) * 1e3
        extra: dict[str, float | int | str] = {
            "written_bytes": written,
            "copy_bytes_per_s": copy_rate,
            "copy_p10_ms": float(low),
            "copy_p90_ms": float(high),
        }
        if precision != "fp32":
            extra |= {"bytes_per_s": rate, "percent_of_copy_rate": 100 * rate / copy_rate}
        yield Row(
            case=f"export, {name}",
            shape={"blocks": size.blocks, "d": size.dim, "vocab": size.vocabulary},
            dtype=f"fp32 → {precision}",
            threads=cores(),
            **spread(spent["export"]),
            floor_ms=None,
            floor_bytes=None,
            percent_of_floor=None,
            baseline="copy of the checkpoint, flushed",
            baseline_ms=float(np.median(spent["copy"])) * 1e3,
            ratio=against(spent["export"], spent["copy"]),
            peak_memory_mb=peak,
            check=check,
            extra=extra,
        )


def owned_bytes(bundle: Path) -> int:
    """Bytes of the files that a bundle does not share with the checkpoint."""
    return sum(
        path.stat().st_size for path in bundle.rglob("*") if path.is_file() and path.stat().st_nlink == 1
    )


def targets(rows: list[Row]) -> list[Target]:
    """Hold both exports against their goals."""
    in_place, _, converting = rows
    seconds, share = in_place.median_ms / 1e3, float(converting.extra["percent_of_copy_rate"])

    def memory(row: Row, what: str) -> Target:
        used = row.peak_memory_mb or 0.0
        return Target(f"{what}: peak memory", "≤ 1000 MB", f"{used:.0f} MB", used <= 1000)

    return [
        Target("in place: seconds", "≤ 5 s", f"{seconds:.2f} s", seconds <= 5),
        memory(in_place, "in place"),
        memory(converting, "converting"),
        Target("converting: share of the disk's copy rate", "≥ 70 %", f"{share:.0f} %", share >= 70),
    ]


def main() -> int:
    options = arguments(__doc__, "export_memory")
    size = QUICK if options.quick else FULL
    print(f"threads: {cores()} (the exporter's own choice); {size.blocks} blocks, d = {size.dim}", flush=True)
    settings: dict[str, Any] = {
        "threads": [cores()],
        "checkpoint": "random fp32 weights, InternVL on Qwen2 text",
    }
    report = Report("export_memory", options.quick, settings, shown=("percent_of_copy_rate",))
    with tempfile.TemporaryDirectory(prefix="daco-rt-bench-") as folder:
        report.rows.extend(measure(size, Path(folder), settings))
    if not options.quick:
        report.targets = targets(report.rows)
    return report.finish(options.output)


if __name__ == "__main__":
    sys.exit(main())
