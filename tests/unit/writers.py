"""Every writer of the way from words to a pack, on worlds so small that each takes milliseconds.

A function brings a folder to its end, whatever state a kill has left it in. ``die`` runs one and dies at the
n-th *moment* of writing: before a write, with half of it written, before and after an fsync, a rename, a
removal. ``fill`` runs one while the disk is full from such a moment on.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import errno
import importlib
import io
import os
import shutil
import signal
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.figure  # noqa: F401
import numpy as np
import sae_samples
import torch
from means_samples import make_means
from tiny_harvest import tree

from daco_rt import _files
from daco_rt._plot import new_figure
from daco_rt.artifacts import load_dictionary, load_sae, save_sae
from daco_rt.cli import stimuli as stimuli_command
from daco_rt.concepts import WordConcept, make_stimuli, save_stimuli, save_table, subset_concepts
from daco_rt.concepts.chat import LineCache
from daco_rt.corpus import Pair, Problems, save_pairs
from daco_rt.corpus.arrow import arrow
from daco_rt.corpus.embeddings import create_embeddings, open_embeddings
from daco_rt.corpus.retrieve import retrieve_pairs
from daco_rt.dictionary import build_dictionary, open_means
from daco_rt.dictionary.heard import Heard, without_heard
from daco_rt.dictionary.report import diagnose, save_report
from daco_rt.errors import ArtifactError
from daco_rt.evaluate.scene_layouts import write_scene_jailbreakv, write_scene_mm_safetybench
from daco_rt.pipeline import run as pipeline
from daco_rt.pipeline.steps import Step
from daco_rt.sae import (
    StoreSource,
    annotate_sae,
    convert_to_jumprelu,
    open_store,
    sweep_policies,
    train_sae,
)
from daco_rt.scenes.files import write_pairs, write_scenes
from daco_rt.steering import PolicySpec, compile_pursuit_pack

# What is imported on first use would be imported by every fork.
for module in ("PIL.Image", "daco_rt.scenes.compose", "daco_rt.scenes.draw"):
    importlib.import_module(module)
arrow()
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])

# Where a full disk shows; names can still be changed and removed.
REFUSED = {"before a write", "in the middle of a write", "before fsync"}
WORDS = ("dagger", "soup", "truck", "house", "lake", "apple")


@cache
def concepts() -> tuple[WordConcept, ...]:
    labels = ("undesirable", *["neutral"] * (len(WORDS) - 1))
    return tuple(
        WordConcept(f"{word}.n.01", word, topic="artifact", gloss=f"a kind of {word} of old", label=label)
        for word, label in zip(WORDS, labels, strict=True)
    )


def table(folder: Path) -> None:
    save_table(subset_concepts(concepts(), 5), folder / "t.jsonl.gz", overwrite=True)


def older_table(folder: Path) -> None:
    save_table(concepts(), folder / "t.jsonl.gz")


def stimuli(folder: Path) -> None:
    save_stimuli(make_stimuli(concepts(), count=5).stimuli, folder / "texts.jsonl.gz", overwrite=True)


def unseen(folder: Path) -> None:
    """What ``daco-rt stimuli --held-out`` writes."""
    parser = argparse.ArgumentParser()
    stimuli_command.add_arguments(parser)
    table, texts, held_out = (
        folder.parent / "world" / "t.jsonl",
        folder / "texts.jsonl.gz",
        folder / "h.jsonl.gz",
    )
    arguments = parser.parse_args(
        [str(table), "--output", str(texts), "--held-out", str(held_out), "--force"]
    )
    # Standard output is how the parent is told of the end.
    with contextlib.redirect_stdout(io.StringIO()):
        stimuli_command.run(arguments)


def labels(folder: Path) -> None:
    for part in (WORDS[:3], WORDS[3:]):
        cache_of = LineCache(folder / "cache.jsonl", lambda row: {"label": row["label"]}, "label")
        cache_of.add({word: {"label": "neutral"} for word in part})


def embeddings(folder: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((24, 8)).astype(np.float32)
    store = create_embeddings(
        folder / "e",
        encoder={"name": "x", "weights": "w"},
        corpus={"kind": "x"},
        dim=8,
        images=False,
        shard_pairs=24,
    )
    if not store._commit_file(0).is_file():
        store.add(0, [Pair(f"p{i}", f"{WORDS[i % 6]} {i}") for i in range(24)], rows, None)
    if store.shards is None:
        store.finish(1)


def pairs(folder: Path) -> None:
    place = folder.parent / "world" / "e"
    encoder = SimpleNamespace(
        dim=8, describe=lambda: {"name": "x", "weights": "w"},
        texts=lambda texts: np.random.default_rng(1).standard_normal((len(texts), 8)).astype(np.float32),
    )  # fmt: skip
    found = retrieve_pairs(
        open_embeddings(place), concepts()[:4], encoder, count=4, minimum=2, sample=24, block=4,
        work=folder / "work", progress=False,
    )  # fmt: skip
    problems = Problems()
    problems.add("empty caption", "3", "line 3")
    problems.save(folder / "p.problems.jsonl")
    save_pairs(found.columns, folder / "p.parquet", root=folder, settings=found.settings, overwrite=True)


def means(folder: Path) -> None:
    rng = np.random.default_rng(0)
    make_means(folder / "means", {b: rng.standard_normal((8, 16)) for b in (1, 2)})


def dictionary(folder: Path) -> None:
    made = build_dictionary(
        open_means(folder.parent / "world" / "means"), folder / "d", overwrite=True, progress=False
    )
    without_heard(made, [Heard(1, 0.5, 1, "a")], folder / "d", overwrite=True)


def diagnostics(folder: Path) -> None:
    made = load_dictionary(folder.parent / "world" / "dictionary")
    save_report(diagnose(made, progress=False), folder / "figures" / "diagnostics.json")


def scenes(folder: Path) -> None:
    for name, write in (
        ("test", partial(write_scenes, count=6)),
        ("pairs", partial(write_pairs, count=1)),
        ("mm", partial(write_scene_mm_safetybench, questions=1)),
        ("jbv", partial(write_scene_jailbreakv, questions=1)),
    ):
        if not (folder / name).exists():
            write(folder / name)


def older_dictionary(folder: Path) -> None:
    shutil.copytree(folder.parent / "world" / "dictionary", folder / "d")


def sae(folder: Path) -> None:
    """Settings, metrics, checkpoints, and the SAE."""
    torch.set_num_threads(1)
    world = folder.parent / "world"
    train_sae(
        StoreSource(open_store(world / "store"), sae_samples.BLOCK), folder / "sae", model=sae_samples.MODEL,
        block=sae_samples.BLOCK, dictionary=load_dictionary(world / "dictionary"), resume=True,
        training=sae_samples.quick(steps=6, log_every=1, checkpoint_every=3), progress=False,
    )  # fmt: skip


def annotation(folder: Path) -> None:
    world = folder.parent / "world"
    made = load_dictionary(world / "dictionary")
    annotate_sae(load_sae(world / "sae"), made, folder / "sae", eta=0.2, overwrite=True)


def jumprelu(folder: Path) -> None:
    world = folder.parent / "world"
    source = StoreSource(open_store(world / "store"), sae_samples.BLOCK)
    convert_to_jumprelu(load_sae(world / "sae"), source, folder / "jump", rows=200, overwrite=True)


def sweep(folder: Path) -> None:
    world = folder.parent / "world"
    sweep_policies(
        load_sae(world / "sae"), load_dictionary(world / "dictionary"), etas=[0.1, 0.2], gammas=[0.0],
        safety=lambda table, _: len(table), capability=lambda *_: 1.0, results=folder / "sweep.jsonl",
    )  # fmt: skip


def pack(folder: Path) -> None:
    compile_pursuit_pack(
        load_dictionary(folder.parent / "world" / "dictionary"), folder / "pack", k=2,
        policies=[PolicySpec("default")], overwrite=True,
    )  # fmt: skip


def figure(folder: Path) -> None:
    with new_figure(folder / "f.png", width=1, height=1) as drawn:
        drawn.add_subplot().plot([1, 2])


def build(folder: Path) -> None:
    """The journal of a build, around steps that write a file each."""

    def step(name: str, *inputs: str) -> Step:
        def run(at: Path, _resume: bool) -> str:
            with _files.atomic_file(at / f"{name}.txt") as file:
                file.write(name.encode())
            return name

        return Step(name, f"{name}.txt", inputs, (), {}, run)

    pipeline.steps_of = lambda *_: [step("a"), step("b", "a.txt")]
    pipeline.build(SimpleNamespace(model="m", precision="auto"), folder / "out")  # type: ignore[arg-type]


def prepare(folder: Path) -> None:
    """What the writers read, in ``folder``."""
    save_table(concepts(), folder / "t.jsonl")
    embeddings(folder)
    means(folder)
    sae_samples.store(folder / "store", dtype="fp32")
    made = sae_samples.dictionary(folder / "dictionary")
    decoder = made.atoms(sae_samples.BLOCK).astype(np.float32)
    zeros = {"b_enc": np.zeros(len(decoder), np.float32), "b_dec": np.zeros(decoder.shape[1], np.float32)}
    save_sae(
        folder / "sae", model=sae_samples.MODEL, block=sae_samples.BLOCK, coder="topk", k=3,
        weights={"W_enc": np.ascontiguousarray(decoder.T), "W_dec": decoder, **zeros},
    )  # fmt: skip


def die(folder: Path, writer: str, fatal: str, note: str = "") -> None:
    """Run a writer and die at its moment number ``fatal``; without, write the kind of each into ``note``."""
    met: list[str] = []

    def moment(kind: str) -> None:
        met.append(kind)
        if len(met) == int(fatal):
            os.kill(os.getpid(), signal.SIGKILL)

    watch(moment)
    globals()[writer](folder)
    if note:
        Path(note).write_text("\n".join(met))


def fill(folder: Path, writer: str, first: str, note: str) -> None:
    """Run a writer on a disk that is full from its moment ``first`` on; write its error to ``note``."""
    met = 0

    def moment(kind: str) -> None:
        nonlocal met
        met += 1
        if met >= int(first) and kind in REFUSED:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    watch(moment)
    try:
        globals()[writer](folder)
    except ArtifactError as error:
        Path(note).write_text(str(error))


def watch(moment: Callable[[str], None]) -> None:
    """Have ``moment`` called with the kind of every moment of writing in this process."""

    def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            moment(f"before {name}")
            result = function(*arguments, **options)
            moment(f"after {name}")
            return result

        return call

    def in_halves(write: Callable[..., Any], flush: Callable[[Any], None]) -> Callable[..., Any]:
        def call(self: Any, data: Any) -> Any:
            moment("before a write")
            write(self, data[: len(data) // 2])
            flush(self)
            moment("in the middle of a write")
            return write(self, data[len(data) // 2 :])

        return call

    opened = builtins.open

    def open_to_append(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        made = opened(file, mode, *rest, **options)
        if "a" not in mode:
            return made
        write = in_halves(lambda _, data: made.write(data), lambda _: made.flush())
        return contextlib.closing(SimpleNamespace(write=lambda data: write(made, data), close=made.close))

    builtins.open = open_to_append  # type: ignore[assignment]
    _files.HashingFile.write = in_halves(  # type: ignore[method-assign]
        _files.HashingFile.write, lambda file: file._file.flush()
    )
    os.fsync, os.replace = around("fsync", os.fsync), around("rename", os.replace)  # type: ignore[assignment]
    _files._renameat2 = around("rename", _files._renameat2)
    _files.shutil.rmtree = around("removal", _files.shutil.rmtree)  # type: ignore[assignment]


__all__ = ["REFUSED", "die", "fill", "prepare", "tree"]
