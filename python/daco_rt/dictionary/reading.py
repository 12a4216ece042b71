"""Reading one shard: the needed rows are gathered where the model runs, and only they leave it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from daco_rt.concepts import ORDINARY_TEXTS
from daco_rt.dictionary.encode import Encoder, Losses, Stimulus
from daco_rt.dictionary.items import HarvestItem
from daco_rt.dictionary.means import ConceptMeans, Ordinary, ShardMeans
from daco_rt.errors import DacoError
from daco_rt.models.residual import read_batches, read_blocks, text_model_of
from daco_rt.sae.harvest import Reading

Advance = Callable[[int], None]


@dataclass(eq=False)
class ShardReader:
    """Makes the means of any shard of a harvest: a function of the shard's items and of its settings.

    Parameters
    ----------
    model : a Hugging Face causal or image-text model.
    encoder : makes token sequences of items.
    blocks : whose outputs are read.
    norm_limit : block → norm above which a text position is rejected.
    image_limit : the same for image tokens.
    batch_tokens : tokens in one forward pass, padding included.
    """

    model: torch.nn.Module
    encoder: Encoder
    blocks: tuple[int, ...]
    norm_limit: Mapping[int, float]
    image_limit: Mapping[int, float]
    batch_tokens: int

    @classmethod
    def of(cls, means: ConceptMeans, model: torch.nn.Module, encoder: Encoder) -> ShardReader:
        """Return the reader that fills ``means``."""
        limit = float(means.recipe["norm_limit"])
        text = {block: limit * norm for block, norm in means.median_norm.items()}
        image = {block: limit * norm for block, norm in means.image_norm.items()}
        return cls(model, encoder, means.blocks, text, image or text, int(means.recipe["batch_tokens"]))

    def read(
        self,
        items: list[HarvestItem],
        rows: range,
        signs: Sequence[int],
        *,
        first: int = 0,
        keep: bool = False,
        advance: Advance = lambda _: None,
    ) -> tuple[ShardMeans, Reading | None]:
        """Run a shard's items through the model.

        Parameters
        ----------
        items : all items of the shard's concepts.
        rows : the concepts of the shard.
        signs : (1,) or (1, -1).
        first : place of the first item in the table, which numbers the kept rows.
        keep : also return the stream at every position, for an activation store.
        advance : called with the number of items that were just read.

        Raises
        ------
        DacoError
            If the model gives NaN or Inf for an item.
        """
        losses, width = Losses(), self._width()
        sums = MeanSums(rows, signs, self.blocks, width)
        kept: dict[int, dict[int, np.ndarray]] = {}
        read = 0
        for stimuli in self.encoder.encode(items, first, losses):
            # What is only kept runs apart: means must not depend on whether a store is filled.
            parts = [[s for s in stimuli if s.positions], [s for s in stimuli if keep and not s.positions]]
            for batch in (b for part in parts for b in self._batches(part, kept if keep else None)):
                found = batch.fetch()
                for row, stimulus in enumerate(batch.stimuli):
                    sums.take(found[:, row], stimulus.item)
                read += len(batch.stimuli)
                advance(len(batch.stimuli))
        advance(len(items) - read)
        return sums.finish(len(items), losses), _reading(kept, self.blocks, width) if keep else None

    def _width(self) -> int:
        return int(text_model_of(self.model).embed_tokens.weight.shape[1])

    def _batches(
        self, stimuli: list[Stimulus], kept: dict[int, dict[int, np.ndarray]] | None
    ) -> Iterator[_Batch]:
        ids = [stimulus.tokens.ids for stimulus in stimuli]
        extras = [stimulus.extras for stimulus in stimuli] if any(s.extras for s in stimuli) else None
        last: _Batch | None = None
        for members, streams in read_batches(
            self.model, ids, self.blocks, batch_tokens=self.batch_tokens, extras=extras
        ):
            chosen = [stimuli[i] for i in members]
            if kept is not None:
                for row, stimulus in enumerate(chosen):
                    length = len(stimulus.tokens.ids)
                    kept[stimulus.place] = {
                        block: stream[row, :length].float().cpu().numpy() for block, stream in streams.items()
                    }
                    for block, table in kept[stimulus.place].items():
                        if not np.isfinite(table).all():
                            raise _not_finite(stimulus.item, block)
            batch = _Batch(chosen, _to_host(self._gather(chosen, streams)))
            # The batch before is summed only now, while the device runs this one.
            if last is not None:
                yield last
            last = batch
        if last is not None:
            yield last

    def _gather(self, stimuli: list[Stimulus], streams: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Return [blocks, batch, d + 3] fp32: each stimulus' reading, then how many positions were kept, how
        many rejected, and how many are not finite."""
        longest = max(1, *(len(stimulus.positions) for stimulus in stimuli))
        index = torch.zeros((len(stimuli), longest), dtype=torch.long)
        valid = torch.zeros((len(stimuli), longest), dtype=torch.bool)
        picture = torch.zeros((len(stimuli), longest), dtype=torch.bool)
        for row, stimulus in enumerate(stimuli):
            count = len(stimulus.positions)
            index[row, :count] = torch.tensor(stimulus.positions, dtype=torch.long)
            valid[row, :count] = True
            if stimulus.tokens.image is not None:
                picture[row, :count] = torch.from_numpy(stimulus.tokens.image[stimulus.positions])
        home = streams[self.blocks[0]].device
        # A model may be spread over devices. A copy that blocked would wait for the whole forward pass.
        there_on = {
            device: [t.to(device, non_blocking=True) for t in (index, valid, picture)]
            for device in {stream.device for stream in streams.values()}
        }
        parts = []
        for block in self.blocks:
            stream = streams[block]
            place, there, image = there_on[stream.device]
            member = torch.arange(len(stimuli), device=stream.device)[:, None]
            found = stream[member, place].float()
            bad = there & ~torch.isfinite(found).all(dim=-1)
            limit = torch.where(image, self.image_limit[block], self.norm_limit[block])
            kept = there & (torch.linalg.vector_norm(found, dim=-1) <= limit)
            count = kept.sum(dim=1, keepdim=True)
            # One position a stimulus leaves its row bit for bit as it was.
            mean = torch.where(kept[..., None], found, 0).sum(dim=1) / count.clamp(min=1)
            facts = [count, (there & ~kept).sum(dim=1, keepdim=True), bad.sum(dim=1, keepdim=True)]
            parts.append(torch.cat([mean, *(fact.float() for fact in facts)], dim=1).to(home))
        return torch.stack(parts)


@dataclass(eq=False)
class _Batch:
    stimuli: list[Stimulus]
    fetch: Callable[[], np.ndarray]


def _to_host(tensor: torch.Tensor) -> Callable[[], np.ndarray]:
    """Start copying a tensor to the host; the function that is returned waits for it."""
    if not tensor.is_cuda:
        return lambda: tensor.cpu().numpy()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))

    def fetch() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return fetch


class MeanSums:
    """Welford's running mean and squared distance, float64, of each concept, sign and block of a shard."""

    def __init__(self, rows: range, signs: Sequence[int], blocks: tuple[int, ...], width: int) -> None:
        self.rows, self.signs, self.blocks = rows, tuple(signs), blocks
        shape = (len(self.signs), len(rows), len(blocks))
        self.count = np.zeros(shape, np.int64)
        self.mean = np.zeros((*shape, width))
        self.square = np.zeros(shape)
        self.rejected = np.zeros(len(blocks), np.int64)

    def take(self, found: np.ndarray, item: HarvestItem) -> None:
        """Take in one stimulus.

        Parameters
        ----------
        found : [blocks, d + 3]: readings, then positions kept, rejected, and not finite.
        item : the stimulus.

        Raises
        ------
        DacoError
            If a value is not finite.
        """
        readings, (kept, rejected, bad) = found[:, :-3], found[:, -3:].T
        if bad.any():
            raise _not_finite(item, self.blocks[int(np.flatnonzero(bad)[0])])
        self.rejected += rejected.astype(np.int64)
        inside = kept > 0
        if not inside.any():
            return
        at = self.signs.index(item.sign), item.concept - self.rows.start
        self.count[at] += inside
        # Where nothing was kept the step is zero, so neither mean nor square moves.
        step = (readings - self.mean[at]) * inside[:, None]
        self.mean[at] += step / np.maximum(self.count[at], 1)[:, None]
        self.square[at] += np.einsum("bd,bd->b", step, readings - self.mean[at])

    def finish(self, stimuli: int, losses: Losses) -> ShardMeans:
        """Return the shard's result."""
        spread = self.square / np.maximum(self.count, 1)
        keys = [(b, s) for b in range(len(self.blocks)) for s in range(len(self.signs))]

        def split(table: np.ndarray, dtype: type) -> dict[tuple[int, int], np.ndarray]:
            return {(self.blocks[b], self.signs[s]): table[s, :, b].astype(dtype) for b, s in keys}

        return ShardMeans(
            split(self.mean, np.float32),
            split(self.count, np.int64),
            split(spread, np.float32),
            stimuli,
            {block: int(n) for block, n in zip(self.blocks, self.rejected, strict=True)},
            dict(losses.skipped),
            losses.problems,
        )


def _not_finite(item: HarvestItem, block: int) -> DacoError:
    return DacoError(
        f"stimulus {item.id!r} of concept {item.concept} gives NaN or Inf at block {block}; leave it out, or "
        "run the model in fp32"
    )


def _reading(kept: dict[int, dict[int, np.ndarray]], blocks: tuple[int, ...], width: int) -> Reading:
    order = sorted(kept)
    lengths = [len(kept[place][blocks[0]]) for place in order]
    nothing = [np.zeros((0, width), np.float32)]
    return Reading(
        {b: np.concatenate([kept[place][b] for place in order] or nothing) for b in blocks},
        np.repeat(np.asarray(order, np.int32), lengths),
        np.concatenate([np.arange(n, dtype=np.int32) for n in lengths] or [np.zeros(0, np.int32)]),
    )


def measure_ordinary(
    model: torch.nn.Module,
    tokenizer: Any,
    blocks: Sequence[int],
    *,
    norm_limit: float,
    batch_tokens: int = 4096,
    pictures: Iterable[list[Stimulus]] = (),
) -> Ordinary:
    """Measure the stream over ordinary text: all positions but the first of ``ORDINARY_TEXTS``.

    The mean leaves out positions whose norm exceeds ``norm_limit`` times the median. Image tokens may have
    norms of another size: their median is taken over ``pictures``.

    Example
    -------
    >>> measure_ordinary(model, tokenizer, [16], norm_limit=4.0).mean[16].shape
    (576,)
    """
    ids = tokenizer(list(ORDINARY_TEXTS), add_special_tokens=False)["input_ids"]
    rows: dict[int, list[np.ndarray]] = {int(block): [] for block in blocks}
    for _, streams in read_blocks(model, ids, blocks, batch_tokens=batch_tokens):
        for block, stream in streams.items():
            rows[block].append(stream[1:].numpy())
    means, norms = {}, {}
    for block, parts in rows.items():
        table = np.concatenate(parts).astype(np.float64)
        norm = np.linalg.norm(table, axis=1)
        norms[block] = _median(norm, block, "ordinary text")
        means[block] = table[norm <= norm_limit * norms[block]].mean(axis=0).astype(np.float32)
    found: dict[int, list[np.ndarray]] = {int(block): [] for block in blocks}
    for window in pictures:
        ids = [stimulus.tokens.ids for stimulus in window]
        extras = [stimulus.extras for stimulus in window]
        for batch, on_device in read_batches(model, ids, blocks, batch_tokens=batch_tokens, extras=extras):
            for row, i in enumerate(batch):
                place = torch.tensor(window[i].positions, dtype=torch.long)
                for block, all_rows in on_device.items():
                    chosen = all_rows[row, place.to(all_rows.device)].float()
                    found[block].append(torch.linalg.vector_norm(chosen, dim=-1).cpu().numpy())
    image = {b: _median(np.concatenate(parts), b, "a picture") for b, parts in found.items() if parts}
    return Ordinary(means, norms, image)


def _median(norms: np.ndarray, block: int, what: str) -> float:
    median = float(np.median(norms))
    if not np.isfinite(median):
        raise DacoError(f"{what} gives NaN or Inf at block {block}; run the model in fp32")
    return median
