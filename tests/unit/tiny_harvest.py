"""A harvest on a model of a few thousand parameters, in a process that can be told where to die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import sae_samples
import torch
from harvest_samples import TEMPLATES, tree

from daco_rt import _files
from daco_rt.artifacts import Concept, ModelIdentity, load_dictionary
from daco_rt.dictionary.harvest import HarvestPlan
from daco_rt.dictionary.items import HarvestItem, ItemTable
from daco_rt.sae import StoreSource, open_store, train_sae

DIM, BLOCKS = 16, (0, 1)
IDENTITY = ModelIdentity(DIM, 2, 128, 2, 1, "qwen2", (0.25,))


class Letters:
    """A tokenizer of one token a character, with what the harvest asks of one."""

    def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
        return {
            "input_ids": [[ord(letter) % 128 for letter in text] for text in texts],
            "offset_mapping": [[(i, i + 1) for i in range(len(text))] for text in texts],
        }


@cache
def model() -> Any:
    from transformers import Qwen2Config, Qwen2Model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128, hidden_size=DIM, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
    )  # fmt: skip
    return Qwen2Model(config).eval()


def loaded() -> tuple[Any, Any]:
    """Model and tokenizer, as a worker on another machine would load them."""
    return model(), Letters()


def loaded_noting(folder: str) -> tuple[Any, Any]:
    """The same, leaving a file named after the process."""
    Path(folder, str(os.getpid())).touch()
    return loaded()


def killed() -> tuple[Any, Any]:
    """A worker that runs out of memory while it loads."""
    os.kill(os.getpid(), signal.SIGKILL)
    return loaded()


def loaded_dying(folder: str, deaths: int) -> tuple[Any, Any]:
    """The same in a process that kills itself when it has written half of its second shard, so many times in
    all; ``folder`` gets a file for each."""
    written = 0

    def happens(what: str) -> None:
        nonlocal written
        written += what == "written half"
        if written == 2 and len(list(Path(folder).iterdir())) < deaths:
            Path(folder, f"death of {os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    watch("", happens, in_folder="/means/shards/")
    return loaded()


def plan(folder: Path, concepts: int = 4) -> HarvestPlan:
    """A harvest into ``folder/means`` and ``folder/store``, two concepts a shard."""
    table = tuple(Concept(i, f"thing{i}") for i in range(concepts))
    items = []
    for concept in table:
        for template in TEMPLATES:
            text = template.format(concept.name)
            start = text.index(concept.name)
            items.append(HarvestItem(concept.index, 1, text, start, start + len(concept.name), None, text))
    return HarvestPlan(
        table, ItemTable(items, concepts), BLOCKS, folder / "means", IDENTITY,
        concepts_per_shard=2, activations=folder / "store", norm_limit=50.0,
    )  # fmt: skip


def run(folder: Path, concepts: int = 4) -> None:
    """Run the plan of a folder in this process."""
    plan(folder, concepts).run(*loaded(), progress=False)


def train(folder: Path, steps: str = "40") -> None:
    """Train a small SAE into ``folder/sae``, on the store and dictionary in ``world`` beside the folder."""
    torch.set_num_threads(1)
    world = folder.parent / "world"
    train_sae(
        StoreSource(open_store(world / "store"), sae_samples.BLOCK),
        folder / "sae",
        model=sae_samples.MODEL,
        block=sae_samples.BLOCK,
        training=sae_samples.quick(steps=int(steps), checkpoint_every=4),
        dictionary=load_dictionary(world / "dictionary"),
        resume=True,
        progress=False,
    )


def watch(file: str, happens: Callable[[str], None], in_folder: str = "") -> None:
    """Have ``happens`` called at each moment of writing a file of that name, or the folder ``means``, or any
    file in ``in_folder``.

    The moments are "write" (of the first bytes), "written half", "flush", "rename" and "renamed".
    """
    begun: set[str] = set()

    def ours(path: Any) -> bool:
        return in_folder in str(path) if in_folder else f".{file}.partial-" in str(path)

    write, fsync, replace, install = (
        _files.HashingFile.write, os.fsync, os.replace, _files._renameat2,
    )  # fmt: skip

    def slow_write(self: Any, data: Any) -> None:
        if not ours(self._file.name):
            return write(self, data)
        if self._file.name in begun:
            return write(self, data)
        begun.add(self._file.name)
        happens("write")
        write(self, data[: len(data) // 2])
        self._file.flush()
        happens("written half")
        return write(self, data[len(data) // 2 :])

    def slow_fsync(handle: int) -> None:
        if ours(os.readlink(f"/proc/self/fd/{handle}")):
            happens("flush")
        fsync(handle)

    def slow_replace(source: Any, target: Any) -> None:
        if not ours(source):
            return replace(source, target)
        happens("rename")
        replace(source, target)
        return happens("renamed")

    def slow_install(partial: Path, target: Path, flags: int) -> bool:
        happens("rename")
        done = install(partial, target, flags)
        happens("renamed")
        return done

    _files.HashingFile.write = slow_write  # type: ignore[method-assign]
    os.fsync, os.replace = slow_fsync, slow_replace  # type: ignore[assignment]
    if file == "means":
        _files._renameat2 = slow_install


def die_at(folder: Path, file: str, moment: str, turn: str) -> None:
    """Harvest, and die by SIGKILL when the file of that name that is number ``turn`` comes to a moment."""
    count = 0

    def happens(what: str) -> None:
        nonlocal count
        count += what == moment
        if what == moment and count == int(turn):
            os.kill(os.getpid(), signal.SIGKILL)

    watch(file, happens)
    run(folder)


def slowly(folder: Path) -> None:
    """Harvest with a pause at every write, so that a kill finds something under way."""
    for name in ("means", "store.json", "00000.safetensors", "00001.safetensors", "00000.json", "00001.json"):
        watch(name, lambda _: time.sleep(0.002))
    run(folder)


class Forks:
    """A process with model and imports at hand that forks others, of which each costs some milliseconds.

    multiprocessing's own fork server is one a process, and has the imports of whoever used it first.
    """

    def __init__(self, module: str = "tiny_harvest") -> None:
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import tiny_harvest, {module}; tiny_harvest.serve({module})"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def start(self, function: Callable[..., None], *arguments: Any) -> int:
        """Run a function of the module in a new process; return its number."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([function.__name__, *map(str, arguments)]) + "\n")
        return self._answer()

    def wait(self) -> int:
        """Return how the process ended: 0, or minus the signal."""
        return self._answer()

    def close(self) -> None:
        self._process.communicate(timeout=60)

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


def serve(module: Any) -> None:
    """Fork for every line that comes; print the process' number, and how it ended."""
    model()
    for line in sys.stdin:
        name, path, *arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                getattr(module, name)(Path(path), *arguments)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


__all__ = [
    "Forks",
    "die_at",
    "killed",
    "loaded",
    "loaded_dying",
    "loaded_noting",
    "plan",
    "run",
    "slowly",
    "train",
    "tree",
]
