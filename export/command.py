"""Arguments of ``python -m daco_rt.export``, which is also ``daco-rt export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from daco_rt.console import add_json, print_json

EPILOG = """\
examples:
  python -m daco_rt.export --model internvl
  python -m daco_rt.export --model internvl --checkpoint OpenGVLab/InternVL3-1B-hf --pack packs/mine
  python -m daco_rt.export --model internvl --checkpoint ./my-internvl --layers 15-19 --precision fp16
  python -m daco_rt.export --model internvl --runtime tensorrt

Without --checkpoint the small built-in model of the family is used (fetched on first use), without
--pack its own concept pack. Weights stay where they are: the bundle holds hard links to them.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser`` and set its ``run``."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", required=True, metavar="FAMILY", help="model family: internvl")
    parser.add_argument(
        "--checkpoint",
        metavar="DIR|ID|NAME",
        help="a Hugging Face checkpoint folder, a hub id, or a built-in name such as pocket-internvl "
        "(default: smol-FAMILY)",
    )
    parser.add_argument("--pack", metavar="DIR", help="concept pack to bake in (default: the built-in one)")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="the bundle to write (default: bundles/CHECKPOINT, with -trt for TensorRT)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "bf16"),
        help="of weights and activations (default: the checkpoint's own; fp32 for bf16 checkpoints; for "
        "TensorRT fp16 or bf16)",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="longest prompt plus answer in tokens (default: the model's, at most 8192; for TensorRT 2048)",
    )
    parser.add_argument(
        "--runtime",
        choices=("onnxruntime", "tensorrt"),
        default="onnxruntime",
        help="what will run the bundle; for tensorrt the engine is built too, where TensorRT is installed",
    )
    parser.add_argument(
        "--max-batch", type=int, metavar="N", help="most requests run together by an engine (default 8)"
    )
    parser.add_argument(
        "--layers", metavar="LIST", help="steer only these of the pack's blocks: 15-19 or 3,5"
    )
    parser.add_argument("--no-vision", action="store_true", help="leave the vision tower out")
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Export as the arguments say and print what was written."""
    from daco_rt.export import export_model, parse_layers

    result = export_model(
        arguments.model,
        checkpoint=arguments.checkpoint,
        pack=arguments.pack,
        output=arguments.output,
        precision=arguments.precision,
        max_length=arguments.max_length,
        layers=None if arguments.layers is None else parse_layers(arguments.layers),
        vision=not arguments.no_vision,
        overwrite=arguments.force,
        runtime=arguments.runtime,
        max_batch=arguments.max_batch,
    )
    if arguments.json:
        print_json(result.to_dict())
    else:
        result.print()
    return 0


def default_output(label: str) -> Path:
    """Where a bundle goes when nothing was said: ``bundles/LABEL`` under the working directory."""
    return Path("bundles") / label
