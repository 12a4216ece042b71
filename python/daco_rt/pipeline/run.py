"""Running a build: each step once, again only when something that decides its result has changed.

``build.json`` in the build's folder records for every step the *key* it was run with (a hash of its
settings, of what it read, and of the version of daco_rt) and a *digest* of what it made. A step is up to date
if both still hold. Digests are of contents, so a step that comes out the same again leaves those behind it
alone. Contents are hashed when a step is finished, and again only where a *stamp* (names, sizes and times of
change) differs from the recorded one: a copied folder is read once, an untouched one never.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import daco_rt
from daco_rt._files import atomic_file, sha256_file
from daco_rt.artifacts.manifest import plain_json
from daco_rt.errors import DacoError, did_you_mean
from daco_rt.pipeline.config import BuildConfig
from daco_rt.pipeline.steps import Host, Step, steps_of

STATE = "build.json"
_VERSION = 2


@dataclass(frozen=True)
class StepReport:
    """What became of a step: ``state`` is "up to date", "made", or in a plan "to do" or "goes on"."""

    name: str
    output: Path
    state: str
    seconds: float = 0.0
    summary: str = ""


@dataclass(frozen=True)
class BuildReport:
    """A finished build: its folder, its steps, and the packs by name."""

    folder: Path
    steps: list[StepReport]
    packs: dict[str, Path] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return json.loads(json.dumps(asdict(self), default=str))


def plan(config: BuildConfig, folder: str | Path) -> list[StepReport]:
    """Return what a build would do, without doing it.

    What comes after a step that has to run is "to do" in the plan; in the build it may prove up to date, if
    that step comes out as it was.
    """
    folder = Path(folder)
    state = _read_state(folder)
    found: list[StepReport] = []
    stale: set[str] = set()
    for step in steps_of(config, Host(config.model, config.precision)):
        if stale.isdisjoint(step.inputs) and _up_to_date(step, folder, state, _key(step, folder, state)):
            row = state[step.name]
            found.append(
                StepReport(step.name, folder / step.output, "up to date", row["seconds"], row["summary"])
            )
            continue
        resumes = stale.isdisjoint(step.inputs) and _resumes(step, folder, state, _key(step, folder, state))
        found.append(StepReport(step.name, folder / step.output, "goes on" if resumes else "to do"))
        stale.add(step.output)
    return found


def build(
    config: BuildConfig,
    folder: str | Path,
    *,
    until: str | None = None,
    device: str = "auto",
    force: bool = False,
    report: Callable[[StepReport], None] = lambda _: None,
) -> BuildReport:
    """Run every step of a build that is not up to date; killed at any time, it goes on when called again.

    Parameters
    ----------
    config : from ``read_config``.
    folder : where everything goes. Nothing in it is touched but what a build makes.
    until : the last step to run, for example "dictionary"; by default all.
    device : where the model runs: "cpu", "cuda", "cuda:1" or "auto".
    force : run every step again.
    report : called after each step.

    Returns
    -------
    BuildReport

    Raises
    ------
    DacoError
        If another build is at work in the folder, or a step fails; what was made before is kept.

    Example
    -------
    >>> build(read_config("configs/smol-small.yaml"), "builds/smol-small").packs["default"]
    PosixPath('builds/smol-small/packs/default')
    """
    folder = Path(folder)
    steps = steps_of(config, Host(config.model, config.precision, device))
    names = [step.name for step in steps]
    if until is not None and until not in names:
        raise DacoError(f"there is no step '{until}'{did_you_mean(until, names)}")
    done: list[StepReport] = []
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        state = _read_state(folder)
        if force:
            state.clear()
        for step in steps:
            done.append(_run(step, folder, state))
            report(done[-1])
            if step.name == until:
                break
    packs = {r.name.removeprefix("pack "): r.output for r in done if r.name.startswith("pack ")}
    return BuildReport(folder, done, packs)


def _run(step: Step, folder: Path, state: dict[str, Any]) -> StepReport:
    key = _key(step, folder, state)
    output = folder / step.output
    if _up_to_date(step, folder, state, key):
        row = state[step.name]
        return StepReport(step.name, output, "up to date", row["seconds"], row["summary"])
    resume = _resumes(step, folder, state, key)
    if not resume:
        # What lies there was made of something else, and would be refused as such.
        for place in (output, output.with_name(output.name + ".run")):
            shutil.rmtree(place, ignore_errors=True)
        state[step.name] = {"key": key, "output": step.output}
        _write_state(folder, state)
    output.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    summary = step.run(folder, resume)
    # Time of earlier, interrupted runs is not known.
    seconds = round(time.monotonic() - start, 2)
    stamp = _stamp(output)
    state[step.name] = {
        "key": key, "output": step.output, "digest": _digest(output), "stamp": stamp, "seconds": seconds,
        "summary": summary,
    }  # fmt: skip
    _write_state(folder, state)
    return StepReport(step.name, output, "made", seconds, summary)


def _up_to_date(step: Step, folder: Path, state: dict[str, Any], key: str) -> bool:
    row = state.get(step.name, {})
    output = folder / step.output
    return row.get("key") == key and "digest" in row and row["digest"] == _recall(output, row)


def _resumes(step: Step, folder: Path, state: dict[str, Any], key: str) -> bool:
    """Whether the step was begun with this very key and not finished."""
    row = state.get(step.name, {})
    output = folder / step.output
    begun = output.is_dir() or output.with_name(output.name + ".run").is_dir()
    return row.get("key") == key and "digest" not in row and begun


def _key(step: Step, folder: Path, state: Mapping[str, Any]) -> str:
    """Hash what decides a step's result; steps before it must have run."""
    rows = {row.get("output"): row for row in state.values()}
    found = {name: _recall(folder / name, rows.get(name, {})) for name in step.inputs}
    parts = {
        "version": [_VERSION, daco_rt.__version__],
        "step": step.name,
        "settings": step.settings,
        "inputs": {name: digest for name, digest in found.items() if digest is not None},
        "files": [_digest(file) for file in step.files],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=plain_json).encode()).hexdigest()


def _recall(place: Path, row: Mapping[str, Any]) -> str | None:
    """Return the digest of what lies there (None of nothing), from its row where the stamp still holds."""
    if not place.exists():
        return None
    return row["digest"] if "digest" in row and row.get("stamp") == _stamp(place) else _digest(place)


def _files(place: Path) -> list[Path]:
    """Return a file, or every file below a folder."""
    return sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]


def _stamp(place: Path) -> str:
    """Hash names, sizes and times of change."""
    digest = hashlib.sha256()
    for file in _files(place):
        found = file.stat()
        digest.update(f"{file.relative_to(place)}\0{found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _digest(place: Path) -> str:
    """Hash the contents of a file, or of every file below a folder and their names."""
    if not place.is_dir():
        return sha256_file(place)
    digest, files = hashlib.sha256(), _files(place)
    with ThreadPoolExecutor(4) as pool:
        for file, sha256 in zip(files, pool.map(sha256_file, files), strict=True):
            digest.update(f"{file.relative_to(place)}\0{sha256}\n".encode())
    return digest.hexdigest()


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE).read_bytes())
        return state["steps"] if state["version"] == _VERSION else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DacoError(
            f"{folder / STATE} cannot be read ({error}); remove it, and every step runs again"
        ) from error


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    with atomic_file(folder / STATE) as file:
        file.write((json.dumps({"version": _VERSION, "steps": state}, indent=2) + "\n").encode())


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which goes with the process however that ends."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DacoError(
                f"another build is at work in {folder}; wait for it or choose another --output"
            ) from None
        yield
