"""A Hugging Face checkpoint in torch as subject, steered by hooks.

The loop is ours and not ``generate``: tokens are chosen by the runtime's own sampler, so that a seed gives
the same draws here and in a bundle, and every pass is reported token by token.

A policy for generated tokens edits the last token of a prompt and what follows. All before it is the same
under every such policy, so it is read once and held: a sweep over strengths asks the same prompts again.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from daco_rt.artifacts import Pack, load_pack
from daco_rt.errors import CheckpointError, DacoError, PolicyError
from daco_rt.evaluate.subject import Answer, Subject, right_filled, told_by
from daco_rt.models import resolve_checkpoint
from daco_rt.runtime.policies import Chosen, choose_policy
from daco_rt.runtime.positions import token_slots
from daco_rt.runtime.processor import Prepared, Processor
from daco_rt.runtime.request import GenerateRequest
from daco_rt.runtime.sampling import choose
from daco_rt.runtime.telemetry import AnswerTelemetry, BlockRows, ConceptBook
from daco_rt.runtime.text import IncrementalText, StopStrings
from daco_rt.steering import steer

PROMPTS_HELD = 2**29
"""Most bytes of keys and values that are held of prompts read before."""


class TorchSubject(Subject):
    """A checkpoint under the policies of a pack.

    Parameters
    ----------
    family, checkpoint : as for an export: a folder, hub id or built-in name.
    pack : a pack or its folder; without one only "off" can be asked for.
    batch_size : most requests run together.
    device, dtype : where and in what the model runs.

    Raises
    ------
    CheckpointError
        The checkpoint cannot be loaded by transformers.

    Example
    -------
    >>> subject = TorchSubject("internvl", "pocket-internvl", pack="packs/mine")    # doctest: +SKIP
    >>> subject.answer([Ask("What is a dagger?")], policy="default")[0].rows        # doctest: +SKIP
    71
    """

    def __init__(
        self,
        family: str,
        checkpoint: str | Path | None = None,
        *,
        pack: str | Path | Pack | None = None,
        batch_size: int = 8,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        from transformers import AutoModelForImageTextToText

        if batch_size < 1:
            raise DacoError(f"batch_size must be 1 or greater, got {batch_size}")
        found = resolve_checkpoint(family, checkpoint)
        try:
            model: Any = AutoModelForImageTextToText.from_pretrained(
                found.path, dtype=dtype, trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{found.path} cannot be loaded by transformers: {reason}") from error
        self.model: Any = model.to(device).eval()
        self.processor = Processor(found.path)
        self.batch_size, self.device = batch_size, device
        self.max_length = self.model.config.get_text_config().max_position_embeddings
        self.held: dict[bytes, Any] = {}
        """Digest of a batch of prompts → the cache after all but their last tokens, unsteered."""
        self.use(pack)

    def use(self, pack: str | Path | Pack | None) -> None:
        """Take another pack from now on; the model stays loaded."""
        self.pack = load_pack(pack) if isinstance(pack, str | Path) else pack
        self._book = None if self.pack is None else ConceptBook(self.pack)

    def _telemetry(self, requests: Sequence[GenerateRequest]) -> list[AnswerTelemetry]:
        return [row.telemetry for row in self._run(requests) if row.telemetry is not None]

    def _answer(self, requests: Sequence[GenerateRequest]) -> list[Answer]:
        return [
            Answer(
                "".join(row.pieces),
                row.tokens,
                row.reason,
                row.prompt.length,
                row.policy.name,
                row.seconds,
                **told_by(row.telemetry),
            )
            for row in self._run(requests)
        ]

    def _forced(
        self, requests: Sequence[GenerateRequest], token_ids: Sequence[Sequence[int]], width: int
    ) -> Iterator[NDArray[np.float32]]:
        rows = [_Row(self, request) for request in requests]
        tokens = right_filled(token_ids)
        passes = _Passes(self, rows)
        with torch.no_grad(), self._steered([row.policy for row in rows], telemetry=False):
            yield passes.run(passes.first)
            fed = tokens[:, :-1]
            for start in range(0, fed.shape[1], width):
                part = fed[:, start : start + width]
                yield passes.run(part, keep=part.shape[1])

    def _run(self, requests: Sequence[GenerateRequest]) -> list[_Row]:
        rows = [_Row(self, request) for request in requests]
        passes = _Passes(self, rows)
        with torch.no_grad(), self._steered([row.policy for row in rows], telemetry=True) as steering:
            ids = passes.first
            while True:
                logits = passes.run(ids)[:, -1]
                passed = _reports(steering)
                for i, row in enumerate(rows):
                    if not row.finished:
                        row.note({b: r.pick(i) for b, r in passed.items()}, ids[i], passes.real[i])
                        row.take(logits[i])
                if all(row.finished for row in rows):
                    return rows
                ids = np.array([[row.tokens[-1] if not row.finished else 0] for row in rows], np.int64)

    @contextlib.contextmanager
    def _steered(self, policies: Sequence[Chosen], *, telemetry: bool) -> Iterator[Any]:
        if self.pack is None or all(policy.slot == 0 for policy in policies):
            yield None
            return
        names = [policy.name for policy in policies]
        with steer(self.model, self.pack, names, telemetry=telemetry) as steering:
            yield steering


class _Passes:
    """Forward passes over a batch of prompts, padded on the left, and over what follows them.

    Make it before steering begins: what of the prompts no policy edits is read then.
    """

    def __init__(self, subject: TorchSubject, rows: Sequence[_Row]) -> None:
        width = max(row.prompt.length for row in rows)
        self._subject = subject
        self.first = np.zeros((len(rows), width), np.int64)
        """Token ids of the first pass under steering, [B, S]."""
        self.real = np.zeros((len(rows), 0), np.int64)
        """1 where a token stands and 0 on padding, over all passes so far, [B, S]."""
        self._mask = np.zeros((len(rows), width), np.int64)
        for i, row in enumerate(rows):
            self.first[i, width - row.prompt.length :] = row.prompt.input_ids
            self._mask[i, width - row.prompt.length :] = 1
        pixels = [row.prompt.pixel_values for row in rows if row.prompt.pixel_values is not None]
        self._pixels = np.concatenate(pixels) if pixels else None
        self._extra: dict[str, Any] = {}
        if self._pixels is not None:
            stacked = torch.from_numpy(self._pixels)
            self._extra["pixel_values"] = stacked.to(subject.device, subject.model.dtype)
        self._cache: Any = None
        unedited = all(row.policy.slot == 0 or row.policy.positions == "generated" for row in rows)
        # The model takes pictures and all of their tokens in one pass.
        if unedited and width > 1 and not any(row.prompt.image_mask[-1] for row in rows):
            self._read_prompts()

    @torch.no_grad()
    def _read_prompts(self) -> None:
        """Read all but the last token of the prompts, or take what was held of them."""
        held = self._subject.held
        parts: list[NDArray[Any]] = [self.first, self._mask]
        if self._pixels is not None:
            parts.append(self._pixels)
        key = hashlib.sha256(b"".join(bytes(str(a.shape), "ascii") + a.tobytes() for a in parts)).digest()
        if key in held:
            self._cache, self._extra, self.real = held[key], {}, self._mask[:, :-1]
        else:
            self.run(self.first[:, :-1])
            sizes = [_bytes(cache) for cache in (self._cache, *held.values())]
            if sum(sizes) <= PROMPTS_HELD:
                held[key] = self._cache
        self.first = self.first[:, -1:]
        if key in held:  # later passes write into the cache
            self._cache = copy.deepcopy(self._cache)

    def run(self, ids: NDArray[np.int64], *, keep: int = 1) -> NDArray[np.float32]:
        """Run tokens [B, S], the prompts first, and return the logits [B, keep, V] after the last of them."""
        new = self._mask[:, self.real.shape[1] :][:, : ids.shape[1]]
        if not new.shape[1]:
            new = np.ones(ids.shape, np.int64)
        self.real = np.concatenate([self.real, new], axis=1)
        positions = np.maximum(self.real.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        subject = self._subject
        out = subject.model(
            input_ids=torch.from_numpy(np.ascontiguousarray(ids)).to(subject.device),
            attention_mask=torch.from_numpy(self.real).to(subject.device),
            position_ids=torch.from_numpy(positions).to(subject.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
            **self._extra,
        )
        self._cache, self._extra = out.past_key_values, {}
        return out.logits.float().cpu().numpy()


class _Row:
    """One request on its way."""

    def __init__(self, subject: TorchSubject, request: GenerateRequest) -> None:
        self.policy = choose_policy(subject.pack, request.policy)
        if self.policy.condition:
            raise PolicyError(
                f"policy '{self.policy.name}' has a condition, which only the runtime of exported bundles "
                "gives; evaluate with engine: bundle"
            )
        self.prompt: Prepared = subject.processor.prepare(
            request.prompt, request.images, max_tiles=request.max_tiles, raw=request.raw
        )
        if self.prompt.length + request.max_new_tokens > subject.max_length:
            raise DacoError(
                f"the prompt has {self.prompt.length} tokens and {request.max_new_tokens} new ones are asked "
                f"for, but this model was made for {subject.max_length}; shorten the prompt or the answer"
            )
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.reason = ""
        self.telemetry: AnswerTelemetry | None = None
        if self.policy.slot != 0 and subject._book is not None:
            self.telemetry = AnswerTelemetry(
                self.policy.name, self.policy.slot, self.prompt.length, subject._book
            )
        self._request = request
        self._text = IncrementalText(subject.processor.decode)
        self._stop = StopStrings(request.stop)
        self._rng = np.random.default_rng(request.seed)
        self._eos = frozenset[int]() if request.ignore_eos else subject.processor.eos_token_ids
        self.seconds = 0.0
        self._began = 0.0
        self.finished = False

    def take(self, logits: NDArray[np.float32]) -> None:
        """Choose the next token."""
        sampling = self._request.sampling
        seen = [*self.prompt.input_ids.tolist(), *self.tokens] if sampling.needs_history else []
        token = choose(logits, sampling, self._rng, seen)
        self.tokens.append(token)
        now = time.perf_counter()
        self._began = self._began or now
        self.seconds = now - self._began
        piece = self._stop.push(self._text.push(token))
        if self._stop.found is not None:
            self.reason = "stop"
        elif token in self._eos:
            self.reason = "eos"
        elif len(self.tokens) >= self._request.max_new_tokens:
            self.reason = "length"
        self.finished = bool(self.reason)
        if self.finished:
            piece += self._stop.push(self._text.flush()) + self._stop.flush()
        self.pieces.append(piece)

    def note(self, reported: dict[int, BlockRows], ids: NDArray[np.int64], real: NDArray[np.int64]) -> None:
        """Keep what the blocks reported for this row's covered tokens of one pass."""
        if self.telemetry is None or not reported:
            return
        here = real[-len(ids) :].astype(bool)
        past = int(real.sum() - here.sum())
        image = np.zeros(len(ids), bool)
        if not past:
            image[len(ids) - self.prompt.length :] = self.prompt.image_mask
        slots = token_slots(
            [self.policy.slot],
            [self.policy.positions],
            here[None],
            image_mask=image[None],
            prompt_lengths=[self.prompt.length],
            past_lengths=[past],
        )[0]
        covered = np.flatnonzero(slots)
        if covered.size:
            first = past - (len(ids) - int(here.sum()))
            self.telemetry.record(covered, first, ids, reported)


def _bytes(cache: Any) -> int:
    """What the keys and values of a cache take."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def _reports(steering: Any) -> dict[int, BlockRows]:
    """What the last pass reported, and forget it."""
    if steering is None:
        return {}
    found = {}
    for block, passes in steering.records.items():
        if passes:
            last = passes[-1]
            index, value = last.support_index.cpu().numpy(), last.support_value.cpu().numpy()
            there = index.shape[-1] > 0
            found[block] = BlockRows(
                last.doses.cpu().numpy(), index if there else None, value if there else None
            )
        passes.clear()
    return found
