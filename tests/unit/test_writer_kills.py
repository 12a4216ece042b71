"""Every writer, killed at every moment of its writing: what has a name is whole, the next run ends alike."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
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
        ("table", "stimuli", "labels", "embeddings", "pairs", "means", "dictionary", "sae", "annotation",
         "jumprelu", "sweep", "pack", "figure", "build"),
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


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_a_kill_at_any_moment_loses_nothing(forks: Forks, world: Path, writer: str):
    before, name, moments = WRITERS[writer], writer.split()[0], world / f"{writer} moments"

    def fresh(number: int) -> Path:
        folder = world / f"{writer} {number}"
        folder.mkdir()
        if before:
            getattr(writers, before)(folder)
        return folder

    calm = fresh(0)
    old = tree(calm)
    forks.start(writers.die, calm, name, 0, moments)
    assert forks.wait() == 0
    whole, met = visible(calm), moments.read_text().splitlines()
    assert set(met) >= (APPENDS if writer == "labels" else ATOMIC)
    # Of each kind of moment the first and the last, and one between.
    places = {kind: [i for i, other in enumerate(met, 1) if other == kind] for kind in set(met)}
    for fatal in sorted({at[i] for at in places.values() for i in (0, len(at) // 2, -1)}):
        folder = fresh(fatal)
        forks.start(writers.die, folder, name, fatal)
        assert forks.wait() == -signal.SIGKILL, fatal
        for file, data in visible(folder).items():
            if Path(file).name in GROWING:
                for line in data.split(b"\n")[:-1]:
                    json.loads(line)
            elif Path(file).parts[0] == "d":
                # It is written twice, and before it another may lie there: one of the three, and whole.
                open_artifact(folder / "d", "dictionary")
            elif Path(file).name not in ON_THE_WAY:
                assert data in (whole.get(file), old.get(file)), (fatal, file)
        forks.start(writers.die, folder, name, 0)
        assert forks.wait() == 0, fatal
        left = tree(folder)
        assert equal(visible(folder)) == equal(whole), fatal
        assert {file for file in left if hidden(file)} <= {"out/.lock"}, (fatal, "an orphan")


def hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def visible(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if not hidden(name)}


def equal(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if Path(name).name not in UNEQUAL}
