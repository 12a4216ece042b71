"""Every writer, killed at every moment of its writing, or met by a full disk there: what has a name is whole,
the next run ends alike."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_harvest import Forks, tree

pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra 'corpus')")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra 'figures')")

import writers

from daco_rt.artifacts.manifest import open_artifact

# Writer, and what was there before.
WRITERS = {
    **dict.fromkeys(
        ("table", "stimuli", "unseen", "labels", "embeddings", "pairs", "means", "dictionary", "diagnostics",
         "sae", "annotation", "jumprelu", "sweep", "pack", "figure", "build", "scenes"),
        "",
    ),
    "table over another": "older_table",
    "dictionary over another": "older_dictionary",
}  # fmt: skip
APPENDS = {"before a write", "in the middle of a write"}
ATOMIC = APPENDS | {"before fsync", "after fsync", "before rename", "after rename"}
# These grow, or are replaced on the way; their lines must be whole but for a torn last one.
GROWING = {"metrics.jsonl", "cache.jsonl", "sweep.jsonl"}
ON_THE_WAY = {"checkpoint.safetensors", "build.json"}
# Folders that come to be in one step.
AT_ONCE = {"test", "pairs", "mm", "jbv", "pack", "jump"}
# The journal of a build knows seconds and times of change; its lock stays.
UNEQUAL = {"build.json", ".lock"}


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    made = Forks("writers")
    yield made
    made.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    writers.prepare(folder / "world")
    return folder


@dataclass(frozen=True)
class Calm:
    """A writer's folder before it, after it, and the kinds of its moments in between."""

    world: Path
    writer: str
    old: dict[str, bytes]
    whole: dict[str, bytes]
    moments: list[str]

    def fresh(self, what: str) -> Path:
        """A folder as it was before."""
        folder = self.world / f"{self.writer} {what}"
        folder.mkdir()
        if before := WRITERS[self.writer]:
            getattr(writers, before)(folder)
        return folder

    def some(self, kinds: set[str]) -> list[int]:
        """Of each kind of moment the first and the last, and one between."""
        places = [[i for i, met in enumerate(self.moments, 1) if met == kind] for kind in kinds]
        return sorted({at[i] for at in places if at for i in (0, len(at) // 2, -1)})

    def check_sound(self, folder: Path, moment: int) -> None:
        """What has a name is whole."""
        found = visible(folder)
        for file, data in found.items():
            if Path(file).name in GROWING:
                for line in data.split(b"\n")[:-1]:
                    json.loads(line)
            elif Path(file).parts[0] == "d":
                # It is written twice, and before it another may lie there: one of the three, and whole.
                open_artifact(folder / "d", "dictionary")
            elif Path(file).name not in ON_THE_WAY:
                assert data in (self.whole.get(file), self.old.get(file)), (moment, file)
        for top in AT_ONCE & {Path(file).parts[0] for file in found}:
            assert below(found, top) == below(self.whole, top), (moment, top)

    def check_again(self, forks: Forks, folder: Path, moment: int) -> None:
        """The next run ends alike, and leaves nothing behind."""
        forks.start(writers.die, folder, self.writer.split()[0], 0)
        assert forks.wait() == 0, moment
        assert equal(visible(folder)) == equal(self.whole), moment
        assert orphans(folder) == set(), moment


@pytest.fixture(scope="module", params=WRITERS)
def calm(request: pytest.FixtureRequest, forks: Forks, world: Path) -> Calm:
    writer = request.param
    found = Calm(world, writer, {}, {}, [])
    folder, moments = found.fresh("calm"), world / f"{writer} moments"
    old = tree(folder)
    forks.start(writers.die, folder, writer.split()[0], 0, moments)
    assert forks.wait() == 0
    return Calm(world, writer, old, visible(folder), moments.read_text().splitlines())


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_nothing(forks: Forks, calm: Calm):
    assert set(calm.moments) >= (APPENDS if calm.writer == "labels" else ATOMIC)
    for fatal in calm.some(set(calm.moments)):
        folder = calm.fresh(f"killed at {fatal}")
        forks.start(writers.die, folder, calm.writer.split()[0], fatal)
        assert forks.wait() == -signal.SIGKILL, fatal
        calm.check_sound(folder, fatal)
        calm.check_again(forks, folder, fatal)


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(forks: Forks, calm: Calm):
    for first in calm.some(writers.REFUSED):
        folder, note = calm.fresh(f"full at {first}"), calm.world / f"{calm.writer} error {first}"
        forks.start(writers.fill, folder, calm.writer.split()[0], first, note)
        assert forks.wait() == 0, first
        assert "the disk is full" in note.read_text() and "\n" not in note.read_text(), first
        calm.check_sound(folder, first)
        # Unlike a kill it leaves time to tidy up, and to take back half a line.
        assert orphans(folder) == set(), first
        for file, data in visible(folder).items():
            assert Path(file).name not in GROWING or data.endswith(b"\n") or not data, (first, file)
        calm.check_again(forks, folder, first)


def hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def orphans(folder: Path) -> set[str]:
    return {file for file in tree(folder) if hidden(file)} - {"out/.lock"}


def below(files: dict[str, bytes], top: str) -> dict[str, bytes]:
    return {file: data for file, data in files.items() if Path(file).parts[0] == top}


def visible(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if not hidden(name)}


def equal(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if Path(name).name not in UNEQUAL}
