"""Reading the residual stream of a Hugging Face model at the outputs of its decoder blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    for batch, streams in read_batches(model, ids, blocks, batch_tokens=batch_tokens):
        for row, i in enumerate(batch):
            yield i, {block: stream[row, : len(ids[i])].float().cpu() for block, stream in streams.items()}


def read_batches(
    model: torch.nn.Module,
    ids: Sequence[Sequence[int]],
    blocks: Sequence[int],
    *,
    batch_tokens: int = 4096,
    extras: Sequence[Mapping[str, torch.Tensor] | None] | None = None,
) -> Iterator[tuple[list[int], dict[int, torch.Tensor]]]:
    """Run token sequences through a model once and yield the residual stream batch by batch, where it is.

    What is needed of it can be gathered before anything leaves the device; `read_blocks` moves everything.

    Parameters
    ----------
    model, ids, blocks, batch_tokens : as for ``read_blocks``.
    extras : further inputs of each sequence, for example ``{"pixel_values": [tiles, 3, H, W]}``; those of a
        batch are concatenated along their first dimension. A batch that has some goes through the whole
        model, which puts pictures where their tokens stand, the others through the text model alone.

    Yields
    ------
    (batch, streams)
        Numbers of the sequences in the batch, shortest first, and ``streams[block]`` [batch, longest, d] in
        the model's dtype and on its device; beyond a sequence's length its values mean nothing.

    Raises
    ------
    DacoError
        If a block does not exist.

    Example
    -------
    >>> for batch, streams in read_batches(model, ids, [15]):
    ...     last = streams[15][range(len(batch)), [len(ids[i]) - 1 for i in batch]]
    """
    text = text_model_of(model)
    wanted = sorted({int(block) for block in blocks})
    count = len(text.layers)
    if not wanted or wanted[0] < 0 or wanted[-1] >= count:
        raise DacoError(f"blocks must be one or more of 0 to {count - 1}, got {list(blocks)}")
    weight = text.embed_tokens.weight
    with _hooks(text, wanted) as seen:
        for batch in length_batches([len(row) for row in ids], batch_tokens):
            longest = max(len(ids[i]) for i in batch)
            # Padding goes to the right, where causal attention keeps it from what is read.
            padded = torch.zeros((len(batch), longest), dtype=torch.long)
            for row, i in enumerate(batch):
                padded[row, : len(ids[i])] = torch.tensor(ids[i])
            inputs = {"input_ids": padded.to(weight.device, non_blocking=True)}
            further = _joined([extras[i] for i in batch], weight) if extras is not None else {}
            with torch.inference_mode(), contextlib.suppress(_Enough):
                (model if further else text)(**inputs, **further, use_cache=False)
            yield batch, dict(seen)
            seen.clear()


def _joined(
    extras: Sequence[Mapping[str, torch.Tensor] | None], like: torch.Tensor
) -> dict[str, torch.Tensor]:
    names = sorted({name for extra in extras for name in extra or ()})
    found = {}
    for name in names:
        whole = torch.cat([extra[name] for extra in extras if extra and name in extra])
        dtype = like.dtype if whole.is_floating_point() else None
        found[name] = whole.to(like.device, dtype, non_blocking=True)
    return found


class _Enough(Exception):
    """Leaves the forward pass once the last wanted block has been read."""


def length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the sequences that run together, the shortest first; those without a token are left out.

    A batch has at most ``batch_tokens`` tokens, padding included, unless one sequence alone is longer.

    Example
    -------
    >>> list(length_batches([3, 9, 4], 8))
    [[0, 2], [1]]
    """
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
