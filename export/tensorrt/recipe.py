"""What to do on the machine with the GPU, in words and commands, written into the bundle."""

from __future__ import annotations

import shlex

from daco_rt.artifacts.engine import DECODER_PLAN, PLUGIN, VISION_PLAN, TensorRTPlan
from daco_rt.export.tensorrt.profiles import Shapes, decoder_profiles, shape_options, vision_profiles

RECIPE = "BUILD_ENGINE.md"


def recipe(plan: TensorRTPlan, decoder: Shapes, vision: Shapes | None, *, steered: bool) -> str:
    """Return the recipe as Markdown.

    Parameters
    ----------
    plan : limits of the engine.
    decoder, vision : inputs of the two graphs and their shapes, −1 where open; ``vision`` may be None.
    steered : whether the decoder needs the plugin.
    """
    lines = [
        "# Building the engine",
        "",
        "An engine belongs to one GPU model and one version of TensorRT, so it is built where it will run. "
        "TensorRT",
        "10.15 or later is needed (in-place cache), and a driver for its CUDA version.",
        "",
        f"Limits, fixed at export: up to {plan.max_batch} rows, {plan.cache_length} positions a row, "
        "prompts in pieces",
        f"of up to {plan.max_width} tokens, {plan.max_tiles} image tiles at once.",
        "",
        "## With Python",
        "",
        "In an environment with `daco-rt`, `torch` for CUDA and `tensorrt`, beside this file:",
        "",
        "```",
        "python -m daco_rt.export.tensorrt .",
        "```",
        "",
        "It loads the plugin library of this bundle, builds the engine strongly typed with one profile for "
        "prompts and",
        "one for single tokens, and records versions and hashes in `engine/engine.json`.",
        "",
        "## With trtexec",
        "",
        "Run from this folder, so that the weights beside the graph are found:",
        "",
        *_command("decoder.onnx", DECODER_PLAN, decoder_profiles(decoder, plan), plugin=steered),
    ]
    if vision is not None:
        lines += ["", *_command("vision.onnx", VISION_PLAN, vision_profiles(vision, plan), plugin=False)]
    record = f"python -m daco_rt.export.tensorrt . --decoder-plan {DECODER_PLAN}"
    if vision is not None:
        record += f" --vision-plan {VISION_PLAN}"
    lines += ["", "Then let the bundle know them:", "", "```", record, "```", ""]
    return "\n".join(lines)


def _command(graph: str, plan: str, profiles: list, *, plugin: bool) -> list[str]:
    words = ["trtexec", f"--onnx={graph}", "--stronglyTyped", "--skipInference"]
    if plugin:
        words.append(f"--dynamicPlugins={PLUGIN}")
    words += [*shape_options(profiles), f"--saveEngine={plan}"]
    return ["```", " \\\n  ".join(shlex.quote(word) for word in words), "```"]
