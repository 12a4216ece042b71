"""Reading the residual stream of a Hugging Face model at the outputs of its decoder blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from daco_rt.errors import DacoError, UnsupportedError

_PATHS = ("model.language_model", "language_model.model", "language_model", "model", "")


def text_model_of(model: torch.nn.Module) -> Any:
    """Return the module that holds a model's decoder ``layers`` and ``embed_tokens``.

    Raises
    ------
    UnsupportedError
        If there are no decoder blocks at ``model.language_model.layers`` or ``model.layers``.

    Example
    -------
    >>> len(text_model_of(model).layers)
    30
    """
    for path in _PATHS:
        with contextlib.suppress(AttributeError):
            module = model.get_submodule(path)
            layers = getattr(module, "layers", None)
            if isinstance(layers, torch.nn.ModuleList) and hasattr(module, "embed_tokens"):
                return module
    raise UnsupportedError(
        f"{type(model).__name__} has no decoder blocks at model.language_model.layers or model.layers; "
        "pass a Hugging Face causal or image-text model"
    )


def read_blocks(
    model: torch.nn.Module, ids: Sequence[Sequence[int]], blocks: Sequence[int], *, batch_tokens: int = 4096
) -> Iterator[tuple[int, dict[int, torch.Tensor]]]:
    """Run token sequences through a model once and yield the residual stream of each at some blocks.

    Sequences of about equal length run together; the pass ends at the last block that is wanted.

    Parameters
    ----------
    model : a Hugging Face causal or image-text model.
    ids : one sequence of token ids a text; empty ones are left out.
    blocks : 0-based decoder blocks.
    batch_tokens : tokens in one forward pass, padding included.

    Yields
    ------
    (i, streams)
        ``streams[block]`` [tokens, d] fp32 on the CPU, for sequence i; sequences come shortest first.

    Raises
    ------
    DacoError
        If a block does not exist.

    Example
    -------
    >>> for i, streams in read_blocks(model, tokenizer(texts)["input_ids"], [15]):
    ...     print(i, streams[15].shape)
    """
    text = text_model_of(model)
    wanted = sorted({int(block) for block in blocks})
    count = len(text.layers)
    if not wanted or wanted[0] < 0 or wanted[-1] >= count:
        raise DacoError(f"blocks must be one or more of 0 to {count - 1}, got {list(blocks)}")
    device = next(text.parameters()).device
    with torch.inference_mode(), _hooks(text, wanted) as seen:
        for batch in _batches([len(row) for row in ids], batch_tokens):
            longest = max(len(ids[i]) for i in batch)
            # Padding goes to the right, where causal attention keeps it from what is read.
            padded = torch.zeros((len(batch), longest), dtype=torch.long)
            for row, i in enumerate(batch):
                padded[row, : len(ids[i])] = torch.tensor(ids[i])
            with contextlib.suppress(_Enough):
                text(input_ids=padded.to(device), use_cache=False)
            for row, i in enumerate(batch):
                yield i, {block: seen[block][row, : len(ids[i])].float().cpu() for block in wanted}


class _Enough(Exception):
    """Leaves the forward pass once the last wanted block has been read."""


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: (lengths[i], i)):
        # Lengths rise, so the newest text is the longest of its batch.
        if batch and lengths[i] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@contextlib.contextmanager
def _hooks(text: Any, blocks: list[int]) -> Iterator[dict[int, torch.Tensor]]:
    seen: dict[int, torch.Tensor] = {}

    def hook(block: int) -> Callable[..., None]:
        def read(_module: torch.nn.Module, _args: Any, output: Any) -> None:
            seen[block] = output[0] if isinstance(output, tuple) else output
            if block == blocks[-1]:
                raise _Enough

        return read

    handles = [text.layers[block].register_forward_hook(hook(block)) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
