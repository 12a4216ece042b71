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

# Writer, what was there before, and the fewest moments that it must have had.
WRITERS = {
    "table": ("", 6), "stimuli": ("", 6), "labels": ("", 4), "embeddings": ("", 20), "pairs": ("", 16),
    "means": ("", 30), "dictionary": ("", 40), "sae": ("", 60), "annotation": ("", 20), "jumprelu": ("", 20),
    "sweep": ("", 18), "pack": ("", 20), "figure": ("", 6), "build": ("", 30),
    "table over another": ("older_table", 6), "dictionary over another": ("older_dictionary", 40),
}  # fmt: skip
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
    before, least = WRITERS[writer]
    name, moments = writer.split()[0], world / f"{writer} moments"

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
    whole, count = visible(calm), int(moments.read_text())
    assert count >= least and set(tree(calm)) - set(whole) <= {"out/.lock"}
    for fatal in range(1, count + 1):
        folder = fresh(fatal)
        forks.start(writers.die, folder, name, fatal)
        assert forks.wait() == -signal.SIGKILL, fatal
        for file, data in visible(folder).items():
            if Path(file).name in GROWING:
                for line in data.split(b"\n")[:-1]:
                    json.loads(line)
            elif Path(file).name not in ON_THE_WAY and data != whole.get(file):
                # A folder is exchanged as one, so what is old there is all old.
                assert data == old.get(file) or Path(file).parent == Path("d"), (fatal, file)
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
