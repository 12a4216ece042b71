"""The folder of a training run: settings, metrics as JSON lines, and one checkpoint in safetensors.

A checkpoint is a single file that is replaced in one step, so a run that is killed has the old one or the new
one. Its JSON half travels in the same file as a tensor of bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from daco_rt._files import append_file, atomic_file
from daco_rt.artifacts import from_array, read_header, write_safetensors
from daco_rt.errors import ArtifactError

SETTINGS, METRICS, CHECKPOINT = "settings.json", "metrics.jsonl", "checkpoint.safetensors"
_STATE = "state"


class Saved(NamedTuple):
    """What a checkpoint holds: arrays by name, and plain values."""

    tensors: dict[str, np.ndarray]
    state: dict[str, Any]


class RunFolder:
    """One training run on disk.

    Example
    -------
    >>> with RunFolder(Path("saes/b16.run")).locked() as run:
    ...     run.begin(settings, resume=True)
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def locked(self) -> Iterator[RunFolder]:
        """Hold the folder for this process.

        Raises
        ------
        ArtifactError
            If another process trains there.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ArtifactError(f"{self.path} is in use by another training; wait for it") from error
            yield self
        finally:
            os.close(handle)

    def begin(self, settings: Mapping[str, Any], *, resume: bool) -> Saved | None:
        """Record the settings, or compare them with those of the run that is resumed; return its checkpoint.

        Raises
        ------
        ArtifactError
            If there is a run already and ``resume`` is false, its settings differ, or a file is damaged.
        """
        # What a reader sees: tuples have become lists, keys text.
        plain = json.loads(json.dumps(settings, allow_nan=False))
        file = self.path / SETTINGS
        if not resume:
            if (self.path / CHECKPOINT).exists():
                raise ArtifactError(
                    f"{self.path} holds an unfinished training; go on with --resume, or discard it with "
                    f"--force"
                )
            (self.path / METRICS).unlink(missing_ok=True)
        elif file.exists():
            before = _read_json(file)
            keys = sorted(set(plain) | set(before))
            other = [key for key in keys if before.get(key) != plain.get(key)]
            if other:
                raise ArtifactError(
                    f"{file}: the training was begun with {other[0]} {_short(before.get(other[0]))}, now it "
                    f"is "
                    f"{_short(plain.get(other[0]))}; resume with the same settings or begin anew with --force"
                )
        with atomic_file(file) as out:
            out.write((json.dumps(plain, indent=1) + "\n").encode())
        return self._load() if resume else None

    def discard(self) -> None:
        """Remove what an earlier training left."""
        for name in (CHECKPOINT, METRICS, SETTINGS):
            (self.path / name).unlink(missing_ok=True)

    def save(self, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        """Replace the checkpoint in one step."""
        text = np.frombuffer(json.dumps(state, allow_nan=False).encode(), np.uint8)
        sources = {name: from_array(array) for name, array in tensors.items()}
        write_safetensors(self.path / CHECKPOINT, {**sources, _STATE: from_array(text)})

    def _load(self) -> Saved | None:
        file = self.path / CHECKPOINT
        if not file.exists():
            return None
        tensors = {name: ref.read() for name, ref in read_header(file).items()}
        try:
            state = json.loads(tensors.pop(_STATE).tobytes())
        except (KeyError, ValueError) as error:
            raise ArtifactError(f"{file} is damaged ({error}); begin anew with --force") from error
        return Saved(tensors, state)

    def finish(self) -> None:
        """Remove the checkpoint of a run that is complete; settings and metrics stay."""
        (self.path / CHECKPOINT).unlink(missing_ok=True)

    def cut_metrics(self, step: int) -> None:
        """Drop metrics of steps after ``step``: they will be written again."""
        rows = [row for row in read_metrics(self.path) if row["step"] <= step]
        with atomic_file(self.path / METRICS) as out:
            for row in rows:
                out.write((json.dumps(row) + "\n").encode())

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line of metrics."""
        append_file(self.path / METRICS, (json.dumps(row) + "\n").encode())


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """Return the metrics of a run, one dictionary a line; a line that was cut short ends the list.

    Example
    -------
    >>> read_metrics("saes/b16.run")[-1]["explained_variance"]
    0.81
    """
    rows: list[dict[str, Any]] = []
    with contextlib.suppress(FileNotFoundError):
        for line in (Path(run) / METRICS).read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not isinstance(row, dict) or "step" not in row:
                break
            rows.append(row)
    return rows


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} is damaged ({error}); begin anew with --force") from error
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"
