"""``python -m daco_rt.export --model internvl``."""

import argparse
import sys

from daco_rt.console import guarded
from daco_rt.export import command

parser = argparse.ArgumentParser(
    prog="python -m daco_rt.export",
    description="Write a bundle: the model's ONNX graphs with concept steering baked in.",
)
command.add_arguments(parser)
sys.exit(guarded(parser, None))
