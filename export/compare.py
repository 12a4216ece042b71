"""The checks of a verification that need the original model: the exported graph against Hugging Face."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from daco_rt.export.report import Report

if TYPE_CHECKING:
    from daco_rt.artifacts.pack import Pack
    from daco_rt.models.checkpoint import Checkpoint
    from daco_rt.runtime.processor import Prepared

LOGIT_BOUND = {"fp32": 2e-5, "fp16": 2e-2}
TIE = 1e-4


@dataclass(frozen=True)
class Answer:
    """Greedy tokens [n] and the logits [n, V] that they were taken from."""

    tokens: NDArray[np.int64]
    logits: NDArray[np.float32]


class ReferenceModel:
    """A checkpoint as transformers runs it: fp32, eager attention, one prompt at a time without padding."""

    def __init__(self, checkpoint: Checkpoint, architecture: str) -> None:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.model: Any = (
            getattr(transformers, architecture)
            .from_pretrained(
                str(checkpoint.path),
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
            )
            .eval()
        )

    def answer(self, prompt: Prepared, tokens: int, pack: Pack | None, policy: str) -> Answer:
        """Generate greedily; with a pack, under its policy through hooks on the blocks."""
        import torch

        inputs: dict[str, Any] = {"input_ids": torch.from_numpy(prompt.input_ids[None])}
        if prompt.pixel_values is not None:
            inputs["pixel_values"] = torch.from_numpy(prompt.pixel_values)
        with torch.no_grad(), _steered(self.model, pack, policy), _quiet():
            out = self.model.generate(
                **inputs,
                attention_mask=torch.ones_like(inputs["input_ids"]),
                max_new_tokens=tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        made = len(out.logits)
        return Answer(
            out.sequences[0, -made:].numpy(), torch.cat([step.float() for step in out.logits]).numpy()
        )


def check_against_model(
    report: Report,
    name: str,
    exported: Sequence[Answer],
    original: Sequence[Answer],
    precision: str,
) -> None:
    """Logits agree for as long as the tokens do, and tokens differ only where two logits tie."""
    worst, same, ties, total = 0.0, 0, 0, 0
    parted: list[int] = []
    for row, (ours, theirs) in enumerate(zip(exported, original, strict=True)):
        steps = len(theirs.tokens)
        differs = np.flatnonzero(ours.tokens[:steps] != theirs.tokens)
        shared = int(differs[0]) + 1 if differs.size else steps
        scale = np.abs(theirs.logits[:shared]).max()
        worst = max(worst, float(np.abs(ours.logits[:shared] - theirs.logits[:shared]).max() / scale))
        same, total = same + (shared if not differs.size else shared - 1), total + steps
        if differs.size:
            best = np.sort(theirs.logits[shared - 1])[-2:]
            if (best[1] - best[0]) / scale <= TIE:
                ties += 1
            else:
                parted.append(row)
    bound = LOGIT_BOUND[precision]
    report.add(
        f"logits equal Hugging Face, {name}", worst <= bound, f"{worst:.1e} of the largest", f"≤ {bound:.0e}"
    )
    text = f"{same} of {total} tokens"
    if ties:
        text += f", {ties} answer(s) parted at a tie"
    if parted:
        text += f", answer(s) {parted} parted without a tie"
    # Half precision moves every logit by more than a tie is wide, so tokens only count in fp32.
    report.add(
        f"greedy tokens equal Hugging Face, {name}", not parted or precision != "fp32", text, "all but ties"
    )


def _steered(model: Any, pack: Pack | None, policy: str) -> contextlib.AbstractContextManager[Any]:
    if pack is None:
        return contextlib.nullcontext()
    from daco_rt.steering import steer

    return steer(model, pack, policy=policy)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back transformers' advice on generation settings; errors still come."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
