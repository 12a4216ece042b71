"""Batched generation over a bundle: prompts in, steered answers out, text streamed as it becomes certain.

    requests ──► processor ──► embeddings, slots ──► prefill ──► choose a token a row ─┐
                                                       ▲                               │
                                                       └──────────── decode ◄──────────┘

Prompts of a batch may differ in length (right-padded), policy, sampling and stop strings, and rows finish
on their own. A finished row runs along under slot 0 until the batch ends or is compacted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from daco_rt.errors import DacoError, UnsupportedError
from daco_rt.runtime.cache import cache_length
from daco_rt.runtime.gate import gated_prefill
from daco_rt.runtime.onnx_session import Library
from daco_rt.runtime.open import open_session
from daco_rt.runtime.policies import Chosen, choose_policy
from daco_rt.runtime.positions import right_padded, token_slots
from daco_rt.runtime.processor import Prepared, Processor
from daco_rt.runtime.request import GenerateRequest, GenerateResult, TextEvent, Timings
from daco_rt.runtime.sampling import choose
from daco_rt.runtime.session import DecoderSession, Step
from daco_rt.runtime.telemetry import AnswerTelemetry, ConceptBook
from daco_rt.runtime.text import IncrementalText, StopStrings

if TYPE_CHECKING:
    from daco_rt.artifacts.bundle import Bundle

OnText = Callable[[int, str], None]
"""Called with (request index, piece of text)."""


class Generator:
    """Answers requests with one bundle.

    Safe to share between threads: each call has its own cache.

    Parameters
    ----------
    bundle : path, Bundle or DecoderSession
    library, threads :
        As for `open_session`; not with a session.
    batch_size : int
        Most requests run together.
    compact : bool
        Drop finished rows once they are half of the batch. Faster for answers of unequal length; the
        shapes then change within a batch, so logits may differ in the last bits from an uncompacted run.
    prefill_chunk : int
        Longest piece of a prompt run at once; bounds the memory of long prompts.

    Example
    -------
    >>> generator = Generator("bundle")                                                # doctest: +SKIP
    >>> answer, = generator.generate([GenerateRequest("How do I sharpen a dagger?")])  # doctest: +SKIP
    >>> answer.telemetry.sentence()                                                    # doctest: +SKIP
    'removed: dagger ×7'
    """

    def __init__(
        self,
        bundle: str | Path | Bundle | DecoderSession,
        *,
        library: Library = "auto",
        threads: int | None = None,
        batch_size: int = 8,
        compact: bool = False,
        prefill_chunk: int = 1024,
    ) -> None:
        if batch_size < 1 or prefill_chunk < 1:
            raise DacoError(
                f"batch_size and prefill_chunk must be 1 or greater, got {batch_size}, {prefill_chunk}"
            )
        self.session: DecoderSession = (
            bundle
            if isinstance(bundle, DecoderSession)
            else open_session(bundle, library=library, threads=threads)
        )
        self.bundle = self.session.bundle
        self.processor = Processor(self.bundle.processor_path, image_token_id=_image_token_id(self.bundle))
        self.batch_size, self.compact, self.prefill_chunk = batch_size, compact, prefill_chunk
        self._book = ConceptBook(self.session.pack) if self.session.pack is not None else None

    def generate(
        self, requests: Sequence[GenerateRequest], *, on_text: OnText | None = None
    ) -> list[GenerateResult]:
        """Answer all requests, in their order; ``on_text`` gets the text as it comes.

        Raises
        ------
        PolicyError
            A policy is unknown; nothing is run then.
        DacoError
            A prompt is too long, an image cannot be read, placeholders do not match.
        """
        results: list[GenerateResult | None] = [None] * len(requests)
        for event in self.stream(requests):
            if on_text is not None and event.text:
                on_text(event.index, event.text)
            if event.result is not None:
                results[event.index] = event.result
        return [r for r in results if r is not None]

    def stream(self, requests: Sequence[GenerateRequest]) -> Iterator[TextEvent]:
        """Yield text as it becomes certain, and each request's result with its last event."""
        for request in requests:
            self.policy(request.policy)
        for start in range(0, len(requests), self.batch_size):
            for event in self._run(requests[start : start + self.batch_size]):
                yield replace(event, index=event.index + start)

    def policy(self, name: str | None) -> Chosen:
        """Return the slot and positions of a policy of this bundle; None is the default policy."""
        return choose_policy(self.session.pack, name)

    def prepare_batch(self, requests: Sequence[GenerateRequest]) -> PreparedBatch:
        """Render, tokenise and embed requests, and give every token its slot; nothing is decoded.

        Raises
        ------
        DacoError
            As `generate`.
        """
        policies = [self.policy(r.policy) for r in requests]
        began = time.perf_counter()
        prompts = [
            self.processor.prepare(r.prompt, r.images, max_tiles=r.max_tiles, raw=r.raw) for r in requests
        ]
        # Each row on its own first, so that the sentence names that row's lengths.
        cache = max(
            cache_length(p.length, r.max_new_tokens, self.session.max_length)
            for p, r in zip(prompts, requests, strict=True)
        )
        tokenised = time.perf_counter()
        features = self._encode(prompts)
        encoded = time.perf_counter()

        rows = self.session.config.vocab_size
        if (largest := max(int(p.input_ids.max()) for p in prompts)) >= rows:
            raise DacoError(
                f"{self.bundle.processor_path} gives token {largest}, but the model's tokens end at "
                f"{rows - 1}; the tokenizer belongs to another model"
            )
        lengths = np.array([p.length for p in prompts], np.int64)
        width = int(lengths.max())
        embeds = np.zeros((len(prompts), width, self.session.config.hidden_size), self.session.dtype)
        images = np.zeros((len(prompts), width), np.bool_)
        for row, (prompt, feature) in enumerate(zip(prompts, features, strict=True)):
            embeds[row, : prompt.length] = self.session.embed(prompt.input_ids)
            if feature is not None:
                images[row, : prompt.length] = prompt.image_mask
                embeds[row, images[row]] = feature
        slots = token_slots(
            [p.slot for p in policies],
            [p.positions for p in policies],
            right_padded(lengths, width),
            image_mask=images,
        )
        seconds = (tokenised - began, encoded - tokenised)
        return PreparedBatch(embeds, slots, lengths, cache, prompts, policies, seconds)

    def _run(self, requests: Sequence[GenerateRequest]) -> Iterator[TextEvent]:
        batch = self.prepare_batch(requests)
        session, cache = self.session, self.session.new_cache(len(requests), batch.cache_length)
        began = time.perf_counter()
        if any(policy.condition for policy in batch.policies):
            step = gated_prefill(session, cache, batch, self.prefill_chunk)
        else:
            step = session.prefill(cache, batch.embeds, batch.slots, batch.lengths, chunk=self.prefill_chunk)
        prefilled = time.perf_counter()
        answers = []
        for row, request in enumerate(requests):
            timings = Timings(*batch.seconds, prefill=prefilled - began, batch=len(requests))
            answer = _Answer(row, request, batch.prompts[row], batch.policies[row], self, timings)
            answer.note(step, row, 0, answer.prompt.input_ids, batch.slots[row])
            answers.append(answer)
        del batch
        while True:
            for answer in answers:
                if answer.finish_reason is None:
                    text = answer.take(step.logits[answer.row, -1])
                    answer.timings.decode = time.perf_counter() - prefilled
                    result = answer.result() if answer.finish_reason is not None else None
                    if text or result is not None:
                        yield TextEvent(answer.index, text, result)
            going = [a for a in answers if a.finish_reason is None]
            if not going:
                return
            if self.compact and 2 * len(going) <= cache.batch:
                cache = cache.keep(np.array([a.row for a in going]))
                answers = going
                for row, answer in enumerate(answers):
                    answer.row = row
            tokens, slots, active = _next_inputs(answers, cache.batch)
            step = session.decode(cache, tokens, slots, active=active)
            for answer in going:
                position = int(cache.lengths[answer.row]) - 1
                answer.note(step, answer.row, position, tokens[answer.row, None], slots[answer.row, None])

    def _encode(self, prompts: Sequence[Prepared]) -> list[np.ndarray | None]:
        """Return the image features [image tokens, d] of each request, or None."""
        features: list[np.ndarray | None] = []
        for p in prompts:
            if p.pixel_values is None:
                features.append(None)
                continue
            if self.session.config.position_axes != 1:
                raise UnsupportedError(
                    f"{self.bundle.path}: pictures in a model with {self.session.config.position_axes} "
                    "position axes are not supported by this version; ask it about text"
                )
            found = self.session.encode_images(p.pixel_values)
            found = found.reshape(-1, found.shape[-1])
            if len(found) != int(p.image_mask.sum()):
                raise DacoError(
                    f"{self.bundle.path}: the prompt holds {int(p.image_mask.sum())} image tokens but the "
                    f"vision tower gave {len(found)} features; processor and tower do not belong together"
                )
            features.append(found)
        return features


class PreparedBatch(NamedTuple):
    """Requests as the decoder takes them, right-padded."""

    embeds: np.ndarray
    """Token and image embeddings [B, S, d] in the activation dtype, zero on padding."""
    slots: NDArray[np.int32]
    """Policy slot of every token [B, S]."""
    lengths: NDArray[np.int64]
    """Tokens of each prompt [B]."""
    cache_length: int
    """Positions that the longest prompt plus answer needs."""
    prompts: list[Prepared]
    policies: list[Chosen]
    seconds: tuple[float, float]
    """Spent on tokenising and tiling, and on the vision tower."""


class _Answer:
    """One row on its way: its tokens, its text, what steering reported."""

    def __init__(
        self,
        index: int,
        request: GenerateRequest,
        prompt: Prepared,
        policy: Chosen,
        generator: Generator,
        timings: Timings,
    ) -> None:
        self.index = self.row = index
        self.prompt, self.policy, self.timings = prompt, policy, timings
        self.finish_reason: str | None = None
        self.token_ids: list[int] = []
        self._request = request
        self._rng = np.random.default_rng(request.seed)
        self._eos = frozenset[int]() if request.ignore_eos else generator.processor.eos_token_ids
        self._text = IncrementalText(generator.processor.decode)
        self._stop = StopStrings(request.stop)
        self._pieces: list[str] = []
        # No rule tells decoded tokens apart, so one look-up serves them all.
        decoded = token_slots(
            [policy.slot],
            [policy.positions],
            [[True]],
            prompt_lengths=[prompt.length],
            past_lengths=[prompt.length],
        )
        self.decoded_slot = int(decoded[0, 0])
        self._telemetry: AnswerTelemetry | None = None
        if policy.slot != 0 and generator._book is not None:
            self._telemetry = AnswerTelemetry(policy.name, policy.slot, prompt.length, generator._book)

    def take(self, logits: NDArray[np.float32]) -> str:
        """Choose the next token from its logits [V] and return the text that became certain."""
        sampling = self._request.sampling
        seen = [*self.prompt.input_ids.tolist(), *self.token_ids] if sampling.needs_history else []
        token = choose(logits, sampling, self._rng, seen)
        self.token_ids.append(token)
        piece = self._stop.push(self._text.push(token))
        if self._stop.found is not None:
            self.finish_reason = "stop"
        elif token in self._eos:
            self.finish_reason = "eos"
        elif len(self.token_ids) >= self._request.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            piece += self._stop.push(self._text.flush()) + self._stop.flush()
        self._pieces.append(piece)
        return piece

    def note(
        self,
        step: Step,
        row: int,
        first_position: int,
        token_ids: NDArray[np.integer],
        slots: NDArray[np.integer],
    ) -> None:
        """Keep what the steered blocks reported for this row's tokens that ran under a slot."""
        steered = np.flatnonzero(slots)
        if self._telemetry is None or steered.size == 0:
            return
        reported = {block: rows.pick(row) for block, rows in step.reports.items()}
        self._telemetry.record(steered, first_position, token_ids, reported)

    def result(self) -> GenerateResult:
        return GenerateResult(
            text="".join(self._pieces),
            token_ids=self.token_ids,
            finish_reason=str(self.finish_reason),
            policy=self.policy.name,
            prompt_tokens=self.prompt.length,
            image_tokens=int(self.prompt.image_mask.sum()),
            telemetry=self._telemetry,
            timings=self.timings,
        )


def _next_inputs(
    answers: Sequence[_Answer], batch: int
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.bool_]]:
    """Return (tokens, slots, active), each [B], for the next decode step."""
    tokens, slots = np.zeros(batch, np.int64), np.zeros(batch, np.int32)
    active = np.zeros(batch, np.bool_)
    for answer in answers:
        if answer.finish_reason is None:
            tokens[answer.row] = answer.token_ids[-1]
            slots[answer.row] = answer.decoded_slot
            active[answer.row] = True
    return tokens, slots, active


def _image_token_id(bundle: Bundle) -> int | None:
    found = bundle.image.get("token_id") if bundle.image else None
    return None if found is None else int(found)


def run_generate(
    bundle: str | Path | Bundle | DecoderSession | Generator,
    prompt: str | Sequence[dict],
    *,
    images: Sequence[str | Path] = (),
    policy: str | None = None,
    on_text: Callable[[str], None] | None = None,
    library: Library = "auto",
    threads: int | None = None,
    **options: object,
) -> GenerateResult:
    """Answer one prompt: the whole of ``daco-rt generate`` but the printing.

    Parameters
    ----------
    bundle : path, Bundle, DecoderSession or Generator
    prompt, images, policy, **options :
        Fields of `GenerateRequest`.
    on_text : callable, optional
        Gets the text as it becomes certain.

    Example
    -------
    >>> answer = run_generate("bundle", "What is this?", images=["dagger.png"],
    ...                       on_text=lambda text: print(text, end=""))        # doctest: +SKIP
    """
    request = GenerateRequest(prompt, images=images, policy=policy, **options)  # type: ignore[arg-type]
    if isinstance(bundle, Generator):
        generator = bundle
    else:
        generator = Generator(bundle, library=library, threads=threads, batch_size=1)
    forward = None if on_text is None else (lambda _, text: on_text(text))
    (answer,) = generator.generate([request], on_text=forward)
    return answer
