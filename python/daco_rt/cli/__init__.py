"""``daco-rt``: every verb is a module of this folder, and a thin call of a public function."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from daco_rt import __version__
from daco_rt.console import guarded

VERBS = (
    ("export", "daco_rt.export.command", "write a bundle: the model's ONNX graphs with steering baked in"),
    ("verify", "daco_rt.cli.verify", "prove on this machine that a bundle steers as it should"),
    ("generate", "daco_rt.cli.generate", "answer a prompt, with pictures, under a policy"),
    ("concepts", "daco_rt.cli.concepts", "choose concepts from WordNet and label them"),
    ("stimuli", "daco_rt.cli.stimuli", "write the texts, or find the pictures, that stand for concepts"),
    ("harvest", "daco_rt.cli.harvest", "read stimuli through a model into the mean of each concept"),
    ("dictionary", "daco_rt.cli.dictionary", "make a dictionary of concept means, and look at it"),
    ("sae", "daco_rt.cli.sae", "train sparse autoencoders on a model's activations"),
    ("annotate", "daco_rt.cli.annotate", "label an SAE's latents, choose eta and gamma"),
    ("pack", "daco_rt.cli.pack", "compile a policy file with a dictionary or SAEs into a pack"),
    ("build", "daco_rt.cli.build", "from words to packs by one configuration file"),
    ("inspect", "daco_rt.cli.inspect", "print what any artifact holds"),
    ("models", "daco_rt.cli.models", "list or fetch the built-in checkpoints"),
    ("scenes", "daco_rt.cli.scenes", "write pictures of which everything is known"),
    ("evaluate", "daco_rt.cli.evaluate", "compare methods on safety benchmarks and write a report"),
    ("doctor", "daco_rt.cli.doctor", "say what is installed, built and usable"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status instead of raising."""
    return guarded(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="daco-rt",
        description="Concept steering inside the inference engine of multimodal LLMs.",
        epilog="Start here: daco-rt export --model internvl, then daco-rt generate BUNDLE --prompt …",
    )
    parser.add_argument("--version", action="version", version=f"daco-rt {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, place, summary in VERBS:
        verb = verbs.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module = importlib.import_module(place)
        verb.epilog = module.EPILOG
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    return parser
