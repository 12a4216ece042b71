"""What is evaluated: a model under a policy, in a bundle or in torch, behind one interface.

Both answer the same requests with the same tokens (a test compares them), so a method can be tried in torch
without an export, and what is shipped can be evaluated as it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from daco_rt.errors import DacoError
from daco_rt.evaluate.metrics import token_nats
from daco_rt.runtime.request import GenerateRequest
from daco_rt.runtime.sampling import Sampling
from daco_rt.runtime.telemetry import BlockRows

if TYPE_CHECKING:
    from daco_rt.runtime.generate import Generator
    from daco_rt.runtime.processor import Processor
    from daco_rt.runtime.telemetry import AnswerTelemetry

PIECE = 2**26
"""Most logits that are held at once while given answers are scored (a quarter of a gigabyte)."""


@dataclass(frozen=True)
class Ask:
    """One question as a model gets it: text, perhaps a picture, perhaps a system prompt."""

    prompt: str
    image: Path | None = None
    system: str | None = None
    raw: bool = False
    """Whether the prompt is taken as it stands, without the chat template."""

    def request(
        self, policy: str | None, max_new_tokens: int, sampling: Sampling, seed: int
    ) -> GenerateRequest:
        """Return the runtime's request."""
        if self.raw and self.system is not None:
            raise DacoError("a raw question has no system prompt: the chat template is left out")
        images: tuple[Path, ...] = () if self.image is None else (self.image,)
        prompt: Any = self.prompt
        if self.system is not None:
            content = [{"type": "image"} for _ in images] + [{"type": "text", "text": self.prompt}]
            prompt = [
                {"role": "system", "content": self.system},
                {"role": "user", "content": content if images else self.prompt},
            ]
        return GenerateRequest(
            prompt,
            images=images,
            policy=policy,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            raw=self.raw,
        )


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes
    ----------
    text, token_ids, finish_reason : as the runtime gives them; ``finish_reason`` is "refused by the runtime"
        with the sentence in ``error`` where a request could not run (a prompt longer than the cache).
    prompt_tokens : int
    policy : str
        What was in force: "observe" for a gated policy that did not act.
    decode_seconds : float
        From the first token to the last; shared by the batch.
    rows, edited_rows : int
        Rows evaluated under a slot other than "off", and those that an edit changed, largest over blocks.
    removed_dose, applied_dose : float
        Means over rows, largest over blocks.
    removed : dict of str to int
        Concept → rows in which it was removed.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int = 0
    policy: str = "off"
    decode_seconds: float = 0.0
    rows: int = 0
    edited_rows: int = 0
    removed_dose: float = 0.0
    applied_dose: float = 0.0
    removed: dict[str, int] = field(default_factory=dict)
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the answer ready for ``json.dumps``."""
        return asdict(self)


class Score(NamedTuple):
    """How likely a given answer is, token by token."""

    nats: NDArray[np.float64]
    """−ln p of each token, [n]."""
    greedy: NDArray[np.bool_]
    """Whether each is the most likely one, [n]."""
    last: NDArray[np.float32]
    """Logits [V] from which the last one would be chosen; a copy."""


class Subject(ABC):
    """A model that answers under a policy and scores given answers.

    ``batch_size`` is the most requests run together, ``processor`` tokenises and renders prompts,
    ``max_length`` is the longest prompt plus answer in tokens.
    """

    batch_size: int
    processor: Processor
    max_length: int

    @abstractmethod
    def _answer(self, requests: Sequence[GenerateRequest]) -> list[Answer]:
        """Answer one batch."""

    @abstractmethod
    def _telemetry(self, requests: Sequence[GenerateRequest]) -> list[AnswerTelemetry]:
        """Answer one batch under a policy other than "off" and return what was reported."""

    @abstractmethod
    def _forced(
        self, requests: Sequence[GenerateRequest], token_ids: Sequence[Sequence[int]], width: int
    ) -> Iterator[NDArray[np.float32]]:
        """Yield, for one batch, the logits from which the given tokens would be chosen, in pieces of up to
        ``width`` tokens [B, w, V], which a later piece may overwrite; rows after a row's own tokens mean
        nothing. The requests leave room for the longest."""

    def run(self, requests: Sequence[GenerateRequest]) -> list[Answer]:
        """Answer the runtime's own requests, in batches; one that cannot run is an answer with its error.

        Raises
        ------
        PolicyError
            A policy is unknown.
        """
        answers: list[Answer] = []
        for start in range(0, len(requests), self.batch_size):
            answers += self._answer_or_say(list(requests[start : start + self.batch_size]))
        return answers

    def answer(
        self,
        asks: Sequence[Ask],
        *,
        policy: str | None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seeds: Sequence[int] | None = None,
        on_batch: Callable[[int, list[Answer]], None] | None = None,
    ) -> list[Answer]:
        """Answer all questions in their order.

        Parameters
        ----------
        asks : the questions.
        policy : name, "off" or "observe".
        temperature : 0 is greedy.
        seeds : of the draws, one a question; by default 0, 1, 2, …
        on_batch : called with (index of the batch's first answer, answers) as batches finish.

        Raises
        ------
        PolicyError
            The policy is unknown; nothing is run then.
        """
        sampling = Sampling(temperature=temperature)
        drawn = range(len(asks)) if seeds is None else seeds
        if len(drawn) != len(asks):
            raise DacoError(f"answer: {len(asks)} questions need as many seeds, got {len(drawn)}")
        answers: list[Answer] = []
        for start in range(0, len(asks), self.batch_size):
            batch = [
                ask.request(policy, max_new_tokens, sampling, drawn[start + i])
                for i, ask in enumerate(asks[start : start + self.batch_size])
            ]
            found = self._answer_or_say(batch)
            if on_batch is not None:
                on_batch(start, found)
            answers += found
        return answers

    def _answer_or_say(self, batch: list[GenerateRequest]) -> list[Answer]:
        """Answer a batch; where one request cannot run, run each alone and keep the sentence of that one."""
        try:
            return self._answer(batch)
        except DacoError as error:
            if isinstance(error, ValueError):  # an unknown policy fails them all
                raise
            if len(batch) == 1:
                return [Answer("", [], "refused by the runtime", error=str(error))]
            return [self._answer_or_say([request])[0] for request in batch]

    def observe(
        self, asks: Sequence[Ask], *, max_new_tokens: int
    ) -> dict[int, tuple[NDArray[np.int32], NDArray[np.float32]]]:
        """Answer under "observe" and return block → (support indices, values), each [rows, k_out], over all
        covered rows of all questions; questions that cannot run are left out.

        Raises
        ------
        DacoError
            The pack reports no concepts, or no question can run.
        """
        found: dict[int, list[BlockRows]] = {}
        trouble = "there are no questions"
        for ask in asks:
            try:
                reported = self._telemetry([ask.request("observe", max_new_tokens, Sampling(), 0)])
            except DacoError as error:
                if isinstance(error, ValueError):
                    raise
                trouble = str(error)
                continue
            for telemetry in reported:
                for block in telemetry.blocks:
                    found.setdefault(block, []).append(telemetry.rows(block))
        if not found:
            raise DacoError(f"nothing could be observed: {trouble}")
        codes = {}
        for block, parts in found.items():
            rows = BlockRows.join(parts)
            if rows.support_index is None or rows.support_value is None:
                raise DacoError("the pack reports no concepts; compile it with k_out of 1 or more")
            codes[block] = (rows.support_index, rows.support_value)
        return codes

    def logits(
        self, asks: Sequence[Ask], token_ids: Sequence[Sequence[int]], *, policy: str | None
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the logits [n, V] of each answer's n tokens, teacher-forced: token t sees the given ones
        before it.

        An answer without tokens yields an array of no rows. Memory: one batch of n · V floats.
        """
        for start in range(0, len(asks), self.batch_size):
            tokens = token_ids[start : start + self.batch_size]
            longest = max(1, max(map(len, tokens)))
            batch = [
                ask.request(policy, longest, Sampling(), 0) for ask in asks[start : start + self.batch_size]
            ]
            whole = np.concatenate([piece.copy() for piece in self._forced(batch, tokens, longest)], axis=1)
            yield from (whole[row, : len(ids)] for row, ids in enumerate(tokens))

    def score(
        self, requests: Sequence[GenerateRequest], token_ids: Sequence[Sequence[int]]
    ) -> Iterator[Score]:
        """Yield how likely each request's given answer is, teacher-forced, under the request's own policy.

        Unlike `logits` this holds few logits at a time, whatever the length of the answers. A policy sees
        the given tokens as generated ones.

        Raises
        ------
        DacoError
            An answer has no tokens, or prompt and answer together are longer than ``max_length``.

        Example
        -------
        >>> subject = BundleSubject("bundles/smol-internvl")                        # doctest: +SKIP
        >>> request = GenerateRequest("The capital of France is", raw=True, policy="off")
        >>> ids = subject.processor.raw_ids(" Paris")                               # doctest: +SKIP
        >>> -float(next(subject.score([request], [ids])).nats.sum())                # doctest: +SKIP
        -0.41
        """
        if not all(len(ids) for ids in token_ids):
            raise DacoError("an answer without tokens cannot be scored")
        for start in range(0, len(requests), self.batch_size):
            tokens = token_ids[start : start + self.batch_size]
            longest = max(map(len, tokens))
            batch = [replace(r, max_new_tokens=longest) for r in requests[start : start + self.batch_size]]
            yield from self._score(batch, tokens)

    def _score(self, batch: Sequence[GenerateRequest], token_ids: Sequence[Sequence[int]]) -> list[Score]:
        nats: list[list[NDArray[np.float64]]] = [[] for _ in batch]
        greedy: list[list[NDArray[np.bool_]]] = [[] for _ in batch]
        last: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(batch)
        vocabulary = len(self.processor.tokenizer)
        at = 0
        for piece in self._forced(batch, token_ids, max(1, PIECE // (len(batch) * vocabulary))):
            for row, ids in enumerate(token_ids):
                here = np.asarray(ids[at : at + piece.shape[1]], np.int64)
                if here.size == 0:
                    continue
                rows = piece[row, : here.size]
                nats[row].append(token_nats(rows, here.tolist()))
                greedy[row].append(rows.argmax(axis=-1) == here)
                last[row] = rows[-1].copy()
            at += piece.shape[1]
        return [
            Score(np.concatenate(nats[row]), np.concatenate(greedy[row]), last[row])
            for row in range(len(batch))
        ]


class BundleSubject(Subject):
    """A bundle in its runtime, as it is served.

    Parameters
    ----------
    bundle : path of a bundle, or a `Generator`.
    threads, batch_size : of the generator that is made.

    Example
    -------
    >>> subject = BundleSubject("bundles/smol-internvl")                            # doctest: +SKIP
    >>> subject.answer([Ask("What is a dagger?")], policy="default")[0].removed     # doctest: +SKIP
    {'dagger': 1}
    """

    def __init__(
        self, bundle: str | Path | Generator, *, threads: int | None = None, batch_size: int = 8
    ) -> None:
        from daco_rt.runtime.generate import Generator

        self.generator = (
            bundle
            if isinstance(bundle, Generator)
            else Generator(bundle, threads=threads, batch_size=batch_size)
        )
        self.batch_size, self.processor = self.generator.batch_size, self.generator.processor
        self.max_length = self.generator.session.max_length

    def _answer(self, requests: Sequence[GenerateRequest]) -> list[Answer]:
        answers = []
        for result in self.generator.generate(requests):
            answers.append(
                Answer(
                    result.text,
                    result.token_ids,
                    result.finish_reason,
                    result.prompt_tokens,
                    result.policy,
                    result.timings.decode,
                    **told_by(result.telemetry),
                )
            )
        return answers

    def _telemetry(self, requests: Sequence[GenerateRequest]) -> list[AnswerTelemetry]:
        found = [result.telemetry for result in self.generator.generate(requests)]
        return [telemetry for telemetry in found if telemetry is not None]

    def _forced(
        self, requests: Sequence[GenerateRequest], token_ids: Sequence[Sequence[int]], width: int
    ) -> Iterator[NDArray[np.float32]]:
        from daco_rt.runtime.gate import gated_prefill
        from daco_rt.runtime.positions import token_slots

        generator, session = self.generator, self.generator.session
        batch = generator.prepare_batch(requests)
        cache = session.new_cache(len(requests), batch.cache_length)
        if any(policy.condition for policy in batch.policies):
            step = gated_prefill(session, cache, batch, generator.prefill_chunk)
        else:
            step = session.prefill(
                cache, batch.embeds, batch.slots, batch.lengths, chunk=generator.prefill_chunk
            )
        yield step.logits[:, -1:]
        fed = right_filled(token_ids)[:, :-1]
        size = min(width, generator.prefill_chunk, session.widest or width)
        for start in range(0, fed.shape[1], size):
            part = fed[:, start : start + size]
            slots = token_slots(
                [policy.slot for policy in batch.policies],
                [policy.positions for policy in batch.policies],
                np.ones(part.shape, bool),
                prompt_lengths=batch.lengths,
                past_lengths=cache.lengths,
            )
            at = np.broadcast_to(np.arange(part.shape[1]), part.shape)
            yield session.forward(cache, session.embed(part), slots, logits_at=at).logits
            cache.lengths += part.shape[1]
            cache.next_position += part.shape[1]


def right_filled(token_ids: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Return rows of tokens [B, n], short ones filled up with 0; at least one column."""
    out = np.zeros((len(token_ids), max(1, max(map(len, token_ids)))), np.int64)
    for row, ids in enumerate(token_ids):
        out[row, : len(ids)] = ids
    return out


def told_by(telemetry: AnswerTelemetry | None) -> dict[str, Any]:
    """Return the fields of `Answer` that an answer's telemetry gives."""
    if telemetry is None or not telemetry.positions:
        return {}
    summary = telemetry.summary()
    blocks = [row for row in summary["blocks"].values() if row["removed_dose"] is not None]
    return {
        "rows": summary["rows"],
        "edited_rows": max((row["edited_rows"] for row in blocks), default=0),
        "removed_dose": max((row["removed_dose"]["mean"] for row in blocks), default=0.0),
        "applied_dose": max((row["applied_dose"]["mean"] for row in blocks), default=0.0),
        "removed": {concept["name"]: concept["rows"] for concept in summary["removed"]},
    }
