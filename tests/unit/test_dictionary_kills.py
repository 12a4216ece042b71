"""A harvest that is killed, anywhere and however often, ends in the same bytes and leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sae_samples
from tiny_harvest import Forks, die_at, run, slowly, train, tree

from daco_rt.errors import ArtifactError

# What is written, and how often a file of that name: the folder of the means, in which its spec is made, the
# store's spec, a shard (one file of the means, one a block of the store) and its commit (one of each).
WRITERS = {
    "means": 1, "ordinary.safetensors": 1, "means.json": 1, "store.json": 1, "00001.safetensors": 3,
    "00001.json": 2,
}  # fmt: skip
MOMENTS = ("write", "written half", "flush", "rename", "renamed")


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    made = Forks()
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("whole")
    forks.start(run, path)
    assert forks.wait() == 0
    found = tree(path)
    assert len(found) == (3 + 2 + 2) + (1 + 2 * 2 + 2)
    for name, number in WRITERS.items():
        assert name == "means" or sum(Path(file).name == name for file in found) == number
    return found


@pytest.mark.parametrize("writer", WRITERS)
def test_a_kill_at_any_write_changes_nothing(
    forks: Forks, whole: dict[str, bytes], tmp_path: Path, writer: str
):
    # A folder is renamed, not written to.
    for moment in MOMENTS[3:] if writer == "means" else MOMENTS:
        for turn in range(1, WRITERS[writer] + 1):
            path = tmp_path / f"{moment} {turn}"
            path.mkdir()
            forks.start(die_at, path, writer, moment, turn)
            assert forks.wait() == -signal.SIGKILL, (moment, turn)
            # What has its name is whole; the rest is hidden, and swept by the next run.
            left = tree(path)
            assert all(whole[name] == data for name, data in left.items() if not hidden(name))
            # The last rename completes the harvest.
            assert (left == whole) == ((writer, moment, turn) == ("00001.json", "renamed", 2))
            run(path)
            assert tree(path) == whole, (moment, turn)


def hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def kill_twenty(forks: Forks, function: Callable[..., None], folder: Path, seed: int) -> int:
    """Kill a function of a folder twenty times at random, a finished one begun anew; return how many of the
    kills found something unfinished. ``folder/timed`` is the result of an undisturbed run, and so is each
    other folder."""
    draw = random.Random(seed)
    began = time.monotonic()
    (folder / "timed").mkdir()
    forks.start(function, folder / "timed")
    assert forks.wait() == 0
    lasts, whole = time.monotonic() - began, tree(folder / "timed")
    kills, unfinished, path = 0, 0, folder / "0"
    while True:
        path.mkdir(exist_ok=True)
        child = forks.start(function, path)
        if kills < 20:
            time.sleep(draw.uniform(0, 0.7 * lasts))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        if forks.wait() == 0:
            assert tree(path) == whole
            if kills == 20:
                return unfinished
            path = folder / str(kills)
            continue
        kills += 1
        unfinished += bool(tree(path)) and tree(path) != whole


def test_twenty_random_kills_of_a_harvest(forks: Forks, whole: dict[str, bytes], tmp_path: Path):
    assert kill_twenty(forks, slowly, tmp_path, 20) >= 5, "the kills came before the harvest had begun"
    assert tree(tmp_path / "timed") == whole


def test_twenty_random_kills_of_a_training(forks: Forks, tmp_path: Path):
    sae_samples.store(tmp_path / "world" / "store", dtype="fp32")
    sae_samples.dictionary(tmp_path / "world" / "dictionary")
    assert kill_twenty(forks, train, tmp_path, 21) >= 5, "the kills came before the training had begun"


def test_a_full_disk_is_one_sentence(tmp_path: Path, whole: dict[str, bytes], monkeypatch: Any):
    fsync, count = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal count
        count += 1
        if count == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch, pytest.raises(ArtifactError, match="the disk is full"):
        patch.setattr(os, "fsync", full)
        run(tmp_path)
    assert tree(tmp_path) != whole and not any(hidden(name) for name in tree(tmp_path))
    run(tmp_path)
    assert tree(tmp_path) == whole
