"""What it is worth to start an SAE at a dictionary: explained variance, dead and labelled latents, by seed.

    python benchmarks/sae_start.py                      # smol-internvl, block 16, the built-in texts
    python benchmarks/sae_start.py --steps 4000 --seeds 0,1,2,3,4

Both starts see the same rows in the same order; only the decoder's first values differ. Prints a table and
writes everything, with the machine, as JSON. About three minutes on one core after the activations are read.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from daco_rt.artifacts import load_dictionary
from daco_rt.console import print_table
from daco_rt.dictionary import dictionary_for
from daco_rt.models import model_identity, resolve_checkpoint
from daco_rt.sae import SaeTraining, StoreSource, convert_to_jumprelu, harvest_activations, train_sae
from daco_rt.sae.annotate import count_labels
from daco_rt.sae.texts import built_in_texts

ETAS = (0.1, 0.2, 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smol-internvl", help="a built-in checkpoint")
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--store", type=Path, help="where activations are kept (default: read anew)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sae_start.json"))
    arguments = parser.parse_args()
    dictionary = load_dictionary(dictionary_for(arguments.model))
    with tempfile.TemporaryDirectory() as folder:
        source = StoreSource(read(arguments, Path(folder) / "store"), arguments.block)
        rows = []
        for seed in map(int, arguments.seeds.split(",")):
            for init in ("dictionary", "random"):
                training = SaeTraining(
                    init=init, latents=dictionary.size, k=arguments.k, steps=arguments.steps,
                    batch=arguments.batch, seed=seed,
                )  # fmt: skip
                rows.append(measure(source, training, dictionary, Path(folder) / f"{init}-{seed}"))
    print_table(list(rows[0]), rows, list(rows[0]))
    report = {
        "benchmark": "sae_start",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "settings": {key: str(value) for key, value in vars(arguments).items()},
        "activations": source.describe(),
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def read(arguments: argparse.Namespace, temporary: Path) -> Any:
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    checkpoint = resolve_checkpoint(None, arguments.model)
    return harvest_activations(
        AutoModelForImageTextToText.from_pretrained(checkpoint.path).eval(),
        AutoTokenizer.from_pretrained(checkpoint.path),
        built_in_texts(),
        [arguments.block],
        arguments.store or temporary,
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
    )
    recipe = json.loads((path / "manifest.json").read_bytes())["recipe"]
    _, cost = convert_to_jumprelu(sae, source, path.with_name(path.name + "-jump"), rows=8192)
    own = recipe.get("cosine_to_own_atom", {}).get("mean")
    row = {
        "init": training.init,
        "seed": training.seed,
        "explained_variance": round(recipe["evaluation"]["explained_variance"], 4),
        "dead": round(recipe["dead_fraction"], 4),
        "silent": round(recipe["evaluation"]["silent_fraction"], 4),
        "own_atom": None if own is None else round(own, 3),
    }
    for counts in count_labels(sae, dictionary, ETAS):
        row[f"undesirable@{counts['eta']}"] = counts["undesirable"]
        row[f"desirable@{counts['eta']}"] = counts["desirable"]
    return row | {"jumprelu_loss": round(cost.loss, 4)}


if __name__ == "__main__":
    main()
