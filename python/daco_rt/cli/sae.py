"""``daco-rt sae``: fill an activation store, train sparse autoencoders, convert one to JumpReLU."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daco_rt.cli.blocks import parse_blocks
from daco_rt.console import add_json, print_json
from daco_rt.errors import ArtifactError, DacoError

if TYPE_CHECKING:
    from daco_rt.artifacts import ConceptDictionary, ModelIdentity
    from daco_rt.sae.feed import RowSource
    from daco_rt.sae.settings import SaeTraining
    from daco_rt.sae.store import ActivationStore

EPILOG = """\
examples:
  daco-rt sae --checkpoint smol-internvl --texts corpus.txt --store stores/smol --blocks 15-19 \\
      --output saes/smol
  daco-rt sae --store stores/smol --blocks 16 --dictionary smol-internvl --k 64 --output saes/b16 --resume
  daco-rt sae --store stores/smol --blocks 16 --init random --latents 4096 --sparsity l1 \\
      --output saes/control
  daco-rt sae --convert saes/smol/block-016 --store stores/smol --output saes/jump-016

The first reads the texts once for all blocks and trains one SAE a block into OUTPUT/block-NNN. Texts are one
a line, or JSON lines with a field "text", such as those of daco-rt stimuli; without --texts the built-in
ones. Without --store the activations are computed live. Both go on where they were stopped: the store by
itself, the training with --resume. A dictionary may be named by its built-in checkpoint.
"""

_OPTIONS = {
    "k": "codes a row, with --sparsity topk",
    "l1": "price of the codes' sum, with --sparsity l1",
    "latents": "number of latents (default: one for each concept)",
    "steps": "optimiser steps",
    "batch": "rows in a step",
    "lr": "peak learning rate",
    "aux": "weight of the auxiliary loss for dead latents",
    "buffer_rows": "rows shuffled together",
    "log_every": "steps between lines of metrics",
    "checkpoint_every": "steps between checkpoints",
    "seed": "decides initialisation and the order of rows",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--blocks", metavar="LIST", help="15-19 or 3,5 (default: all of the store's)")
    parser.add_argument("--force", action="store_true", help="replace what is there, discard unfinished runs")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--store", metavar="DIR", help="activation store; filled first if --checkpoint is given"
    )
    data.add_argument("--checkpoint", metavar="DIR|NAME", help="model to read activations from")
    data.add_argument("--texts", metavar="FILE", help="what the model reads")
    data.add_argument(
        "--position",
        default="all",
        metavar="RULE",
        help="token whose rows are read, as in daco-rt harvest: word, before-word, ... (default all)",
    )
    data.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the store (default bf16)")
    data.add_argument(
        "--texts-per-shard", type=int, default=512, metavar="N", help="texts behind a shard (default 512)"
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--dictionary",
        metavar="DIR",
        help="concept dictionary to start from (default: the shipped one of a built-in checkpoint)",
    )
    training.add_argument("--init", choices=("dictionary", "random"), default="dictionary")
    training.add_argument(
        "--hold", action="store_true", help="keep decoder rows that start at the dictionary's atoms there"
    )
    training.add_argument("--sparsity", choices=("topk", "l1"), default="topk")
    for name, (kind, default) in _number_options().items():
        shown = "" if default is None else f" (default {default})"
        training.add_argument(
            f"--{name.replace('_', '-')}", type=kind, metavar="N", help=f"{_OPTIONS[name]}{shown}"
        )
    training.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto (default auto)")
    training.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    training.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    training.add_argument("--tensorboard", action="store_true", help="also write metrics for TensorBoard")
    converting = parser.add_argument_group("conversion")
    converting.add_argument(
        "--convert", metavar="SAE", help="turn this TopK SAE into a JumpReLU SAE instead of training"
    )
    converting.add_argument(
        "--rows", type=int, default=16384, metavar="N", help="rows to calibrate thresholds on (default 16384)"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train or convert, and say what was written."""
    found = _convert(arguments) if arguments.convert else _train(arguments)
    if arguments.json:
        print_json(found)
        return 0
    for row in found:
        print(
            f"wrote {row.pop('path')}: " + ", ".join(f"{name} {_round(value)}" for name, value in row.items())
        )
    print("next: daco-rt annotate SAE --dictionary DIR --eta 0.3 --output DIR")
    return 0


def _number_options() -> dict[str, tuple[type, Any]]:
    # The settings are read without importing torch: their module has none.
    from daco_rt.sae.settings import SaeTraining

    defaults = {field.name: field.default for field in fields(SaeTraining)}
    return {name: (float if isinstance(defaults[name], float) else int, defaults[name]) for name in _OPTIONS}


def _settings(arguments: argparse.Namespace) -> SaeTraining:
    from daco_rt.sae.settings import SaeTraining

    given = {name: getattr(arguments, name) for name in (*_OPTIONS, "init", "hold", "sparsity", "precision")}
    return SaeTraining(**{name: value for name, value in given.items() if value is not None})


def _train(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    training = _settings(arguments)
    if arguments.checkpoint is None and arguments.store is None:
        raise DacoError(
            "there is nothing to train on; give --store, or --checkpoint and --texts, or all three"
        )
    if arguments.checkpoint is None and arguments.position != "all":
        raise DacoError("--position is for reading texts; a store has its rows, so leave it out")
    if arguments.checkpoint is None and arguments.texts is not None:
        raise DacoError("--texts needs a model that reads them; give --checkpoint")
    blocks = None if arguments.blocks is None else parse_blocks(arguments.blocks)
    sources, identity, label = _sources(arguments, blocks)
    dictionary = _dictionary(arguments, label) if training.init == "dictionary" else None
    from daco_rt.sae.train import train_sae

    found = []
    for block, source in sources.items():
        sae = train_sae(
            source,
            Path(arguments.output) / f"block-{block:03d}",
            model=identity,
            block=block,
            training=training,
            dictionary=dictionary,
            device=arguments.device,
            resume=arguments.resume,
            overwrite=arguments.force,
            tensorboard=arguments.tensorboard,
        )
        found.append({"path": str(sae.path), **_result(sae.path)})
    return found


def _result(path: Path) -> dict[str, Any]:
    recipe = json.loads((path / "manifest.json").read_bytes())["recipe"]
    return {**recipe["evaluation"], "dead_fraction": recipe["dead_fraction"]}


def _sources(
    arguments: argparse.Namespace, blocks: tuple[int, ...] | None
) -> tuple[dict[int, RowSource], ModelIdentity, str]:
    from daco_rt.sae.feed import StoreSource
    from daco_rt.sae.store import open_store

    if arguments.checkpoint is None:
        store: ActivationStore = open_store(arguments.store, verify=True)
        return {b: StoreSource(store, b) for b in _of_store(store, blocks)}, store.model, ""

    from daco_rt.dictionary.positions import rule
    from daco_rt.dictionary.rows import read_rows
    from daco_rt.models import model_identity, resolve_checkpoint
    from daco_rt.models.loading import load_torch
    from daco_rt.sae.harvest import LiveSource, TextReader, harvest_activations
    from daco_rt.sae.texts import built_in_texts, read_texts

    if arguments.position != "all" and arguments.texts is None:
        raise DacoError("--position looks for the concept's word in stimuli; give --texts of daco-rt stimuli")
    if blocks is None:
        raise DacoError("which blocks are to be read is not said; give --blocks, for example 15-19")
    rule(arguments.position)
    texts, kept = None, None
    if arguments.position == "all":
        texts = built_in_texts() if arguments.texts is None else read_texts(arguments.texts)
    checkpoint = resolve_checkpoint(None, arguments.checkpoint)
    identity = model_identity(checkpoint)
    model, tokenizer = load_torch(checkpoint.path, arguments.device)
    if texts is None:
        texts, kept = read_rows(arguments.texts, arguments.position, tokenizer)
    rows = {"texts_per_shard": arguments.texts_per_shard, "position": arguments.position, "kept": kept}
    if arguments.store is None:
        readers = {b: TextReader(model, tokenizer, texts, (b,), **rows) for b in blocks}
        live = {b: LiveSource(reader, identity.hidden_size) for b, reader in readers.items()}
        return dict(live), identity, checkpoint.label
    store = harvest_activations(
        model,
        tokenizer,
        texts,
        blocks,
        arguments.store,
        identity=identity,
        dtype=arguments.dtype,
        **rows,
    )
    return {b: StoreSource(store, b) for b in blocks}, identity, checkpoint.label


def _of_store(store: ActivationStore, blocks: tuple[int, ...] | None) -> tuple[int, ...]:
    missing = sorted(set(blocks or ()) - set(store.blocks))
    if missing:
        raise ArtifactError(
            f"store {store.path} has no block {missing[0]}; available: {', '.join(map(str, store.blocks))}"
        )
    return blocks or store.blocks


def _dictionary(arguments: argparse.Namespace, label: str) -> ConceptDictionary:
    from daco_rt.artifacts import load_dictionary
    from daco_rt.dictionary import dictionary_for

    path = dictionary_for(arguments.dictionary or label) or arguments.dictionary
    if path is None:
        raise DacoError(
            "there is no dictionary to start from; give --dictionary, or --init random --latents N"
        )
    return load_dictionary(path)


def _convert(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from daco_rt.artifacts import load_sae
    from daco_rt.sae.feed import StoreSource
    from daco_rt.sae.jumprelu import convert_to_jumprelu
    from daco_rt.sae.store import open_store

    if arguments.store is None:
        raise DacoError("thresholds are calibrated on activations; give --store")
    sae, store = load_sae(arguments.convert), open_store(arguments.store, verify=True)
    _of_store(store, (sae.block,))
    made, cost = convert_to_jumprelu(
        sae,
        StoreSource(store, sae.block),
        arguments.output,
        rows=arguments.rows,
        model=None if sae.model else store.model,
        overwrite=arguments.force,
    )
    return [{"path": str(made.path), **asdict(cost), "loss": cost.loss}]


def _round(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
