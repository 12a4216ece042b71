"""Labels by a language model behind an OpenAI-compatible endpoint.

Concepts go out in batches; an answer that is not what was asked for is asked again in halves, down to single
concepts. Every label that comes back is appended to a cache file at once, so an interrupted run goes on where
it stopped and a repeated one asks nothing. Standard library only; the key is read from the environment.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daco_rt.concepts.chat import KEY_VARIABLES, ChatClient, LineCache, json_objects
from daco_rt.concepts.everyday import LABELS
from daco_rt.concepts.labels import Label
from daco_rt.concepts.table import WordConcept
from daco_rt.errors import ArtifactError
from daco_rt.progress import progress as show

__all__ = ["KEY_VARIABLES", "PROMPT", "EndpointLabeller", "parse_answer", "prompt_for"]

PROMPT = """\
You label concepts for a safety tool that removes harmful content from the answers of a vision-language model.
Each line is a concept: a number, a word, what it is a kind of, and its definition.

Give each concept one label, judging the concept itself in the sense of its definition:
- "undesirable": naming, showing or furthering it is harmful or belongs to a harmful topic: violence, weapons,
  explosives, poisons, drugs of abuse, self-harm, sexual content, hate, insults, crime, fraud, gambling,
  terrorism, slavery, malicious software;
- "desirable": it stands for safe, helpful, honest, kind or peaceful behaviour;
- "neutral": everything else. Medicine, kitchen tools, toys, sports, history and anatomy are neutral.

Answer with a JSON array only, one object for each concept, in the same order:
[{"id": 1, "label": "undesirable", "group": "weapons", "reason": "at most eight words"}]
"group" is one lower-case word or hyphenated term that names the topic, or "" for neutral concepts.

"""
"""The exact text that goes before the concepts' lines, as one user message."""
PROMPT_VERSION = 1


@dataclass
class EndpointLabeller:
    """A labeller that asks a chat-completions endpoint.

    Parameters
    ----------
    url : str
        The base address, with or without ``/chat/completions``: ``"http://localhost:8000/v1"``.
    model : str
        The model's name there.
    cache : path
        A file of JSON lines that labels are added to; made if absent. Entries hold for one model, prompt and
        definition.
    batch : int
        Concepts in one request.
    workers : int
        Requests at a time.
    timeout : float
        Seconds until a request counts as failed.
    tries : int
        Attempts at a request, with doubling pauses, before the run stops.
    pause : float
        Seconds before the second attempt.

    Raises
    ------
    ArtifactError
        If the address is no http address, a number is out of range, or the cache is no such file.

    Example
    -------
    >>> labeller = EndpointLabeller("http://localhost:8000/v1", "expert", "labels.cache.jsonl")
    >>> table = apply_labels(shipped_table(), [load_rules(), labeller])
    """

    url: str
    model: str
    cache: str | Path
    batch: int = 20
    workers: int = 4
    timeout: float = 120.0
    tries: int = 6
    pause: float = 1.0
    unanswered: list[str] = field(default_factory=list, init=False)
    """Keys of the concepts for which no attempt gave a usable answer, after ``label_all``."""

    def __post_init__(self) -> None:
        self._client = ChatClient(
            self.url,
            self.model,
            timeout=self.timeout,
            tries=self.tries,
            pause=self.pause,
            kept=f"what it labelled is kept in {self.cache}: run the same command again to go on",
        )
        for name in ("batch", "workers"):
            if getattr(self, name) < 1:
                raise ArtifactError(f"{name} must be 1 or more, got {getattr(self, name)}")
        self._cache = LineCache(Path(self.cache), _entry, "label")

    @property
    def asked(self) -> int:
        """Requests sent."""
        return self._client.asked

    def label_all(self, concepts: Sequence[WordConcept]) -> dict[str, Label]:
        """Return concept key → label for every concept that the model labelled, now or in the cache.

        Raises
        ------
        DacoError
            If the endpoint cannot be reached or refuses; what was labelled so far is in the cache.
        """
        self.unanswered = []
        waiting = [concept for concept in concepts if self._key(concept) not in self._cache.known]
        batches = [waiting[i : i + self.batch] for i in range(0, len(waiting), self.batch)]
        if batches:
            with show(f"labelling by {self.model}", total=len(waiting)) as advance:
                self._client.run_all(
                    batches, lambda part: self._label_batch(part, advance), workers=self.workers
                )
        source = f"endpoint {self.model}"
        return {
            concept.key: Label(row["label"], row["group"], source, row["reason"])
            for concept in concepts
            if (row := self._cache.known.get(self._key(concept))) is not None
        }

    def _label_batch(self, concepts: Sequence[WordConcept], advance: Any) -> None:
        answer = self._client.ask(prompt_for(concepts), max_tokens=60 * len(concepts) + 100)
        rows = parse_answer(answer, len(concepts))
        keys = {self._key(concepts[number]): number for number in rows}
        self._cache.add(
            {key: rows[number] for key, number in keys.items()},
            concept={key: concepts[number].key for key, number in keys.items()},
        )
        with self._client.lock:
            advance(len(rows))
        left = [concept for number, concept in enumerate(concepts) if number not in rows]
        if not left:
            return
        if len(concepts) == 1:
            with self._client.lock:
                self.unanswered.append(left[0].key)
                advance(1)
            return
        half = max(1, (len(left) + 1) // 2) if len(left) == len(concepts) else len(left)
        for start in range(0, len(left), half):
            self._label_batch(left[start : start + half], advance)

    def _key(self, concept: WordConcept) -> str:
        parts = (str(PROMPT_VERSION), self.model, _line(0, concept))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def prompt_for(concepts: Sequence[WordConcept]) -> str:
    """Return the message that asks for the labels of these concepts, numbered from 1."""
    return PROMPT + "\n".join(_line(number, concept) for number, concept in enumerate(concepts, 1))


def parse_answer(text: str, count: int) -> dict[int, dict[str, str]]:
    """Read what can be used of an answer: 0-based number of the concept → label, group, reason.

    Rows with another label, a number that was not asked for, or a number that comes twice with different
    labels are left out; text around the array, and a fence, do no harm.

    Example
    -------
    >>> parse_answer('Sure! [{"id": 1, "label": "neutral"}]', 1)
    {0: {'label': 'neutral', 'group': '', 'reason': ''}}
    """
    found: dict[int, dict[str, str]] = {}
    contradicted: set[int] = set()
    for row in _objects(text):
        number, label = row.get("id"), row.get("label")
        if isinstance(number, str) and number.isdecimal():
            number = int(number)
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= count:
            continue
        label = label.strip().lower() if isinstance(label, str) else ""
        if label not in LABELS:
            continue
        if number - 1 in found and found[number - 1]["label"] != label:
            contradicted.add(number - 1)
        group = _text(row.get("group")).lower().replace(" ", "-")
        found[number - 1] = {"label": label, "group": group, "reason": _text(row.get("reason"))}
    return {number: row for number, row in found.items() if number not in contradicted}


def _objects(text: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for value in json_objects(text):
        nested = value.get("labels") or value.get("concepts") or value.get("answer")
        found += [v for v in nested if isinstance(v, dict)] if isinstance(nested, list) else [value]
    return found


def _text(value: Any) -> str:
    return re.sub(r"\s+", " ", value).strip()[:120] if isinstance(value, str) else ""


def _line(number: int, concept: WordConcept) -> str:
    # The root of WordNet has a way up of no steps.
    above = concept.paths[0][0] if concept.paths and concept.paths[0] else concept.topic
    kind = above.partition(".")[0].replace("_", " ")
    kind = f" (a kind of {kind})" if kind else ""
    return f"{number}. {concept.name}{kind}: {concept.gloss}"


def _entry(row: dict[str, Any]) -> Mapping[str, str]:
    entry = {name: row[name] for name in ("label", "group", "reason")}
    if row["label"] not in LABELS or not all(isinstance(value, str) for value in entry.values()):
        raise ValueError("not a label")
    return entry
