"""``python -m daco_rt.export.tensorrt BUNDLE``: build the engine of an exported bundle on this machine."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from daco_rt.console import guarded

EPILOG = """\
examples:
  python -m daco_rt.export.tensorrt bundles/internvl
  python -m daco_rt.export.tensorrt bundles/internvl --decoder-plan decoder.plan --vision-plan vision.plan
"""


def run(arguments: argparse.Namespace) -> int:
    """Build, or record, and print where the engine is."""
    from daco_rt.artifacts.bundle import load_bundle
    from daco_rt.artifacts.engine import DECODER_PLAN, VISION_PLAN
    from daco_rt.errors import DacoError
    from daco_rt.export.tensorrt.build import build_engines, import_tensorrt

    began = time.perf_counter()
    bundle = load_bundle(arguments.bundle, verify=True)
    given = {DECODER_PLAN: arguments.decoder_plan, VISION_PLAN: arguments.vision_plan}
    plans = {name: path for name, path in given.items() if path is not None}
    if plans and DECODER_PLAN not in plans:
        raise DacoError("--vision-plan needs --decoder-plan: an engine without a decoder answers nothing")
    for path in plans.values():
        if not path.is_file():
            raise DacoError(f"{path} does not exist; give the plan that trtexec saved")
    folder = build_engines(bundle, import_tensorrt(), given=plans or None)
    print(f"{'recorded' if plans else 'built'} {folder} in {time.perf_counter() - began:.0f} s")
    print(f"next: daco-rt generate {arguments.bundle} --prompt 'What is a dagger?'")
    return 0


parser = argparse.ArgumentParser(
    prog="python -m daco_rt.export.tensorrt",
    description="Build the TensorRT engine of an exported bundle, on the machine that will run it.",
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
)
parser.add_argument("bundle", type=Path, help="a bundle exported with --runtime tensorrt")
parser.add_argument(
    "--decoder-plan", type=Path, metavar="FILE", help="record this plan instead of building one"
)
parser.add_argument("--vision-plan", type=Path, metavar="FILE", help="the vision tower's plan, likewise")
parser.set_defaults(run=run)

if __name__ == "__main__":
    sys.exit(guarded(parser, None))
