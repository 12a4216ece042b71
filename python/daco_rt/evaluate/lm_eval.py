"""lm-evaluation-harness with the model ``daco``: its own command, with every option that it has.

::

    python -m daco_rt.evaluate.lm_eval --model daco \\
        --model_args bundle=bundles/smol-internvl,policy=default --tasks hellaswag --batch_size 8

The harness finds models by their import alone, so ``lm_eval --model daco`` cannot know ours. Importing this
module registers it for programs, too: ``lm_eval.simple_evaluate(model="daco", model_args=…)``.
"""

from __future__ import annotations

import sys

from daco_rt.errors import DacoError

try:
    from daco_rt.evaluate.lm_eval_model import DacoLM
except ModuleNotFoundError as error:
    if error.name != "lm_eval":
        raise
    missing = "lm-evaluation-harness is not installed; pip install 'daco-rt[lm-eval]'"
    if __name__ == "__main__":
        print(f"daco_rt.evaluate.lm_eval: error: {missing}", file=sys.stderr)
        sys.exit(2)
    raise DacoError(missing) from error

__all__ = ["DacoLM", "main"]


def main() -> int:
    """Run the harness's command; what a user can mend ends with one sentence and status 2."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except DacoError as error:
        print(f"daco_rt.evaluate.lm_eval: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
