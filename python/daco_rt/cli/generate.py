"""``daco-rt generate``: ask a bundle, with pictures, under a policy."""

from __future__ import annotations

import argparse
import sys

from daco_rt.console import add_json, print_json
from daco_rt.errors import DacoError

EPILOG = """\
examples:
  daco-rt generate bundles/smol-internvl --prompt 'What is a dagger?'
  daco-rt generate bundles/smol-internvl --prompt 'What is this?' --image photo.jpg --telemetry
  daco-rt generate bundles/smol-internvl --prompt - --policy off --temperature 0.7 --seed 1 < question.txt

The answer streams to standard output; what steering did goes to standard error with --telemetry.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on ``parser``."""
    parser.epilog = EPILOG
    parser.add_argument("bundle", help="a folder written by daco-rt export")
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="the question; - reads standard input"
    )
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="a picture; repeat for several"
    )
    parser.add_argument("--policy", help="policy name, 'off' or 'observe' (default: the pack's default)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text"
    )
    parser.add_argument("--max-tiles", type=int, metavar="N", help="most tiles that a picture is cut into")
    parser.add_argument("--raw", action="store_true", help="take the prompt without the chat template")
    sampling = parser.add_argument_group("sampling (greedy by default)")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="0 is off")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 is off")
    sampling.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0 is off")
    sampling.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="1 is off")
    sampling.add_argument("--seed", type=int, help="repeatable draws")
    running = parser.add_argument_group("running")
    running.add_argument(
        "--telemetry", action="store_true", help="show for every token which concepts were active and removed"
    )
    running.add_argument(
        "--library",
        choices=("auto", "require", "off"),
        default="auto",
        help="use the custom-op library if it is there (auto), insist on it, or run the portable functions",
    )
    running.add_argument("--threads", type=int, metavar="N", help="default: as ONNX Runtime chooses")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Answer one prompt."""
    from daco_rt.runtime.generate import Generator, run_generate
    from daco_rt.runtime.sampling import Sampling

    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if not prompt.strip():
        raise DacoError("--prompt is empty; ask something")
    sampling = Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
    )
    generator = Generator(
        arguments.bundle, library=arguments.library, threads=arguments.threads, batch_size=1
    )
    answer = run_generate(
        generator,
        prompt,
        images=arguments.image,
        policy=arguments.policy,
        on_text=None if arguments.json else _print_now,
        sampling=sampling,
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
        stop=arguments.stop,
        max_tiles=arguments.max_tiles,
        raw=arguments.raw,
    )
    text_of = generator.processor.token_text
    if arguments.json:
        print_json(answer.to_json(tokens=arguments.telemetry, token_text=text_of))
        return 0
    print(flush=True)
    if answer.telemetry is not None:
        from rich.console import Console
        from rich.markup import escape

        from daco_rt.runtime.telemetry import telemetry_table

        console = Console(stderr=True, highlight=False)
        if arguments.telemetry:
            console.print(telemetry_table(answer.telemetry, text_of))
        console.print(escape(answer.telemetry.sentence()), style="dim")
    return 0


def _print_now(text: str) -> None:
    print(text, end="", flush=True)
