"""What it is worth to start an SAE at a dictionary: explained variance, dead and labelled latents, by seed.

    python benchmarks/sae_start.py --texts builds/smol-small/texts.jsonl.gz --work builds/sae-start
    python benchmarks/sae_start.py --steps 4000 --seeds 0,1,2,3,4
    python benchmarks/sae_start.py --sparsity l1 --l1 0.1 --output l1.json --figure l1.png

Both starts see the same rows in the same order; only the decoder's first values differ. Prints a table, draws
a figure, and writes everything, with the machine, as JSON. A run that was stopped goes on where ``--work`` is
given; the SAEs stay there, and ``benchmarks/sae_sweep.py`` takes one of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import commit, machine, versions

from daco_rt._plot import COLOURS, new_figure
from daco_rt.artifacts import load_dictionary
from daco_rt.console import print_table
from daco_rt.dictionary import dictionary_for
from daco_rt.models import model_identity, resolve_checkpoint
from daco_rt.models.loading import load_torch
from daco_rt.sae import (
    SaeTraining,
    StoreSource,
    convert_to_jumprelu,
    harvest_activations,
    open_store,
    read_metrics,
    train_sae,
)
from daco_rt.sae.annotate import count_labels
from daco_rt.sae.texts import built_in_texts, mixed, read_texts

ETAS = (0.1, 0.2, 0.3)
CURVE = tuple(round(0.02 * i, 2) for i in range(31))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smol-internvl", help="a built-in checkpoint")
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--sparsity", choices=("topk", "l1"), default="topk", help="default topk")
    parser.add_argument("--k", type=int, default=32, help="codes a row, with topk")
    parser.add_argument("--l1", type=float, default=0.1, help="price of the codes, with l1 (default 0.1)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--precision", default="auto", help="of the training: auto, fp32, bf16")
    parser.add_argument("--texts", type=Path, help="what the model reads (default: the built-in texts)")
    parser.add_argument("--store", type=Path, help="activations that are there already, in place of texts")
    parser.add_argument("--work", type=Path, help="where activations and SAEs stay (default: nowhere)")
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/sae/start.png"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sae_start.json"))
    arguments = parser.parse_args()
    dictionary = load_dictionary(dictionary_for(arguments.model))
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        source = StoreSource(read(arguments, folder / "store"), arguments.block)
        rows = []
        for seed in map(int, arguments.seeds.split(",")):
            for init in ("dictionary", "random"):
                training = SaeTraining(
                    init=init, latents=dictionary.size, sparsity=arguments.sparsity, k=arguments.k,
                    l1=arguments.l1, steps=arguments.steps, batch=arguments.batch, seed=seed,
                    precision=arguments.precision, log_every=50, checkpoint_every=50,
                )  # fmt: skip
                name = f"{init}-{seed}" + ("" if arguments.sparsity == "topk" else "-l1")
                rows.append(measure(source, training, dictionary, folder / name))
    keys = [key for key, value in rows[0].items() if not isinstance(value, list)]
    print_table(keys, rows, keys)
    draw(rows, arguments.figure)
    report = {
        "benchmark": "sae_start",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine() | {"threads": torch.get_num_threads()},
        "versions": versions(),
        "settings": {
            key: value.name if isinstance(value, Path) else str(value)
            for key, value in vars(arguments).items()
        },
        "activations": source.describe(),
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def read(arguments: argparse.Namespace, place: Path) -> Any:
    if arguments.store is not None:
        return open_store(arguments.store, verify=True)
    checkpoint = resolve_checkpoint(None, arguments.model)
    return harvest_activations(
        *load_torch(checkpoint.path),
        built_in_texts() if arguments.texts is None else mixed(read_texts(arguments.texts)),
        [arguments.block],
        place,
        identity=model_identity(checkpoint),
    )


def measure(source: StoreSource, training: SaeTraining, dictionary: Any, path: Path) -> dict[str, Any]:
    sae = train_sae(
        source,
        path,
        model=source.store.model,
        block=source.block,
        training=training,
        dictionary=dictionary if training.init == "dictionary" else None,
        resume=True,
    )
    recipe = json.loads((path / "manifest.json").read_bytes())["recipe"]
    loss = None
    if training.sparsity == "topk":
        jump = path.with_name(path.name + "-jump")
        loss = round(convert_to_jumprelu(sae, source, jump, rows=8192, overwrite=True)[1].loss, 4)
    own = recipe.get("cosine_to_own_atom", {}).get("mean")
    row = {
        "init": training.init,
        "seed": training.seed,
        "explained_variance": round(recipe["evaluation"]["explained_variance"], 4),
        "codes": round(recipe["evaluation"]["l0"], 2),
        "dead": round(recipe["dead_fraction"], 4),
        "silent": round(recipe["evaluation"]["silent_fraction"], 4),
        "own_atom": None if own is None else round(own, 3),
    }
    for counts in count_labels(sae, dictionary, ETAS):
        row[f"undesirable@{counts['eta']}"] = counts["undesirable"]
        row[f"desirable@{counts['eta']}"] = counts["desirable"]
    curve = [
        [line["step"], line["eval_explained_variance"], line["dead_fraction"]]
        for line in read_metrics(path.with_name(path.name + ".run"))
        if "eval_explained_variance" in line
    ]
    labelled = [[row["eta"], row["undesirable"]] for row in count_labels(sae, dictionary, CURVE)]
    return row | {"jumprelu_loss": loss, "curve": curve, "labelled": labelled}


def draw(rows: list[dict[str, Any]], output: Path) -> None:
    """Draw what both starts explain, let die and label: a thin line a seed."""
    with new_figure(output, width=8.4, height=2.9) as figure:
        explained, dead, labelled = figure.subplots(1, 3)
        for row in rows:
            first = row["seed"] == min(other["seed"] for other in rows)
            colour = COLOURS[0] if row["init"] == "dictionary" else COLOURS[1]
            style = {"color": colour, "linewidth": 1.1, "label": row["init"] if first else None}
            steps, shares, gone = zip(*row["curve"], strict=True)
            explained.plot(steps, shares, **style)
            dead.plot(steps, [100 * share for share in gone], **style)
            labelled.plot(*zip(*row["labelled"], strict=True), **style)
        explained.set(title="Explained variance, held out", xlabel="steps")
        dead.set(title="Dead latents, %", xlabel="steps")
        dead.set_ylim(bottom=0)
        labelled.set(title="Latents labelled undesirable", xlabel="η")
        labelled.set_yscale("symlog", linthresh=1)
        explained.legend(title="decoder starts at")


if __name__ == "__main__":
    main()
