"""Labels by a language model behind an OpenAI-compatible endpoint.

Concepts go out in batches; an answer that is not what was asked for is asked again in halves, down to single
concepts. Every label that comes back is appended to a cache file at once, so an interrupted run goes on where
it stopped and a repeated one asks nothing. Standard library only; the key is read from the environment.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib import error as url_error
from urllib import request as url_request
from urllib.parse import urlsplit

from daco_rt.concepts.everyday import LABELS
from daco_rt.concepts.labels import Label
from daco_rt.concepts.table import WordConcept
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.progress import progress as show

KEY_VARIABLES = ("DACO_RT_API_KEY", "OPENAI_API_KEY")
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
MAX_ANSWER = 16 << 20
_AGAIN = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 529))


class _Stopped(Exception):
    """Another worker failed, or the user interrupted."""


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
    asked: int = field(default=0, init=False)
    """Requests sent."""

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).netloc:
            raise ArtifactError(f"endpoint {self.url!r} is no http address; write http://host:port/v1")
        if not self.model:
            raise ArtifactError("the endpoint needs the name of a model; pass --endpoint-model")
        for name in ("batch", "workers", "tries"):
            if getattr(self, name) < 1:
                raise ArtifactError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not self.timeout > 0:
            raise ArtifactError(f"timeout must be above 0 seconds, got {self.timeout}")
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._known = _read_cache(Path(self.cache))

    def label_all(self, concepts: Sequence[WordConcept]) -> dict[str, Label]:
        """Return concept key → label for every concept that the model labelled, now or in the cache.

        Raises
        ------
        DacoError
            If the endpoint cannot be reached or refuses; what was labelled so far is in the cache.
        """
        self._stop.clear()
        self.unanswered = []
        waiting = [concept for concept in concepts if self._key(concept) not in self._known]
        batches = [waiting[i : i + self.batch] for i in range(0, len(waiting), self.batch)]
        if batches:
            Path(self.cache).parent.mkdir(parents=True, exist_ok=True)
            with (
                open(self.cache, "a", encoding="utf-8") as file,
                show(f"labelling by {self.model}", total=len(waiting)) as advance,
                ThreadPoolExecutor(self.workers) as pool,
            ):
                jobs = [pool.submit(self._work, part, file, advance) for part in batches]
                try:
                    wait(jobs)
                except BaseException:
                    self._stop.set()
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
            failures = [failure for job in jobs if (failure := job.result()) is not None]
            if failures:
                raise failures[0]
        source = f"endpoint {self.model}"
        return {
            concept.key: Label(row["label"], row["group"], source, row["reason"])
            for concept in concepts
            if (row := self._known.get(self._key(concept))) is not None
        }

    def _work(self, concepts: Sequence[WordConcept], file: Any, advance: Any) -> BaseException | None:
        """Label one batch; the first failure ends the others, also those that wait for another attempt."""
        if self._stop.is_set():
            return None
        try:
            self._label_batch(concepts, file, advance)
        except _Stopped:
            return None
        except Exception as error:
            self._stop.set()
            return error
        return None

    def _label_batch(self, concepts: Sequence[WordConcept], file: Any, advance: Any) -> None:
        rows = parse_answer(self._ask(concepts), len(concepts))
        with self._lock:
            for number, row in rows.items():
                key = self._key(concepts[number])
                if key not in self._known:
                    self._known[key] = row
                    entry = {"key": key, "concept": concepts[number].key, **row}
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            advance(len(rows))
        left = [concept for number, concept in enumerate(concepts) if number not in rows]
        if not left:
            return
        if len(concepts) == 1:
            with self._lock:
                self.unanswered.append(left[0].key)
                advance(1)
            return
        half = max(1, (len(left) + 1) // 2) if len(left) == len(concepts) else len(left)
        for start in range(0, len(left), half):
            self._label_batch(left[start : start + half], file, advance)

    def _ask(self, concepts: Sequence[WordConcept]) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt_for(concepts)}],
            "temperature": 0,
            "max_tokens": 60 * len(concepts) + 100,
        }
        headers = {"Content-Type": "application/json"}
        key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        base = self.url.rstrip("/")
        address = base if base.endswith("/chat/completions") else f"{base}/chat/completions"
        request = url_request.Request(address, json.dumps(body).encode(), headers)
        trouble, after = "", None
        for attempt in range(self.tries):
            if attempt:
                self._stop.wait(self._pause(attempt, after))
            if self._stop.is_set():
                raise _Stopped
            with self._lock:
                self.asked += 1
            try:
                with url_request.urlopen(request, timeout=self.timeout) as response:
                    return _content(response.read(MAX_ANSWER))
            except url_error.HTTPError as error:
                said = error.read(300).decode(errors="replace").strip()
                if error.code not in _AGAIN:
                    raise DacoError(
                        f"endpoint {address} refused with status {error.code}: {' '.join(said.split())}; "
                        f"check the address, the model's name and {KEY_VARIABLES[0]}"
                    ) from error
                trouble = f"status {error.code}"
                after = error.headers.get("Retry-After")
            except (OSError, HTTPException) as error:
                late = isinstance(getattr(error, "reason", error), TimeoutError)
                trouble = f"no answer within {self.timeout:g} s" if late else str(error)
                after = None
        raise DacoError(
            f"endpoint {address} did not answer in {self.tries} tries ({trouble}); what it labelled is kept "
            f"in {self.cache}: run the same command again to go on"
        )

    def _pause(self, attempt: int, after: str | None) -> float:
        asked = _seconds(after)
        if asked is not None:
            return min(asked, 300.0)
        # Spread out, so that workers that failed together do not return together.
        return min(self.pause * 2 ** (attempt - 1), 60.0) * (0.75 + 0.5 * random.random())

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
    # Read object by object, for an answer that was cut off is right up to there.
    decoder, found = json.JSONDecoder(), []
    at = text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            nested = value.get("labels") or value.get("concepts") or value.get("answer")
            found += [v for v in nested if isinstance(v, dict)] if isinstance(nested, list) else [value]
        at = text.find("{", end)
    return found


def _text(value: Any) -> str:
    return re.sub(r"\s+", " ", value).strip()[:120] if isinstance(value, str) else ""


def _line(number: int, concept: WordConcept) -> str:
    # The root of WordNet has a way up of no steps.
    above = concept.paths[0][0] if concept.paths and concept.paths[0] else concept.topic
    kind = above.partition(".")[0].replace("_", " ")
    kind = f" (a kind of {kind})" if kind else ""
    return f"{number}. {concept.name}{kind}: {concept.gloss}"


def _content(data: bytes) -> str:
    """The text of a chat completion; anything else is a nonsense answer, which is an empty one."""
    try:
        content = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    return content if isinstance(content, str) else ""


def _seconds(after: str | None) -> float | None:
    """A Retry-After header: seconds or a date."""
    if not after:
        return None
    try:
        return max(0.0, float(after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _read_cache(path: Path) -> dict[str, Mapping[str, str]]:
    if not path.exists():
        return {}
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read as a cache of labels: {error}") from error
    known: dict[str, Mapping[str, str]] = {}
    lines = data.split(b"\n")
    # A run that was killed while it wrote leaves a last line without its end; the next must not join it.
    if lines[-1]:
        _cut(path, len(data) - len(lines[-1]))
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            entry = {name: row[name] for name in ("label", "group", "reason")}
            if row["label"] not in LABELS or not all(isinstance(value, str) for value in entry.values()):
                raise ValueError("not a label")
            known[row["key"]] = entry
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path}, line {number}: no cached label ({error}); remove the line or name another cache"
            ) from error
    return known


def _cut(path: Path, size: int) -> None:
    with open(path, "rb+") as file:
        file.truncate(size)
