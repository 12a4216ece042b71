"""Asking a language model behind an OpenAI-compatible endpoint, and remembering what it said.

Standard library only. The key is read from the environment and sent to that endpoint alone.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib import error as url_error
from urllib import request as url_request
from urllib.parse import urlsplit

from daco_rt._files import append_file
from daco_rt.errors import ArtifactError, DacoError

KEY_VARIABLES = ("DACO_RT_API_KEY", "OPENAI_API_KEY")
MAX_ANSWER = 16 << 20
_AGAIN = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 529))
_THIS_MESSAGE = frozenset((400, 413, 422))
"""What a message can be refused with that is too long or does not pass a filter."""
_Job = TypeVar("_Job")


class Unanswered(DacoError):
    """One message got no answer: ``down`` says whether no attempt got through, else the endpoint takes others
    but not this one.
    """

    def __init__(self, sentence: str, *, down: bool) -> None:
        super().__init__(sentence)
        self.down = down


class _Stopped(Exception):
    """Another worker failed, or the user interrupted."""


class ChatClient:
    """A client of one model at one endpoint, for several threads.

    Parameters
    ----------
    url : the base address, with or without ``/chat/completions``.
    model : the model's name there.
    timeout : seconds until a request counts as failed.
    tries : attempts at a request, with doubling pauses (or as long as ``Retry-After`` says).
    pause : seconds before the second attempt.
    kept : what a failure says about work done so far.

    Raises
    ------
    ArtifactError
        The address is no http address, or a number is out of range.

    Example
    -------
    >>> client = ChatClient("http://localhost:8000/v1", "expert")
    >>> client.ask("Is a spoon a weapon?", max_tokens=20)                            # doctest: +SKIP
    'No.'
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout: float = 120.0,
        tries: int = 6,
        pause: float = 1.0,
        kept: str = "",
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise ArtifactError(f"endpoint {url!r} is no http address; write http://host:port/v1")
        if not model:
            raise ArtifactError("the endpoint needs the name of a model; pass --endpoint-model")
        if tries < 1:
            raise ArtifactError(f"tries must be 1 or more, got {tries}")
        if not timeout > 0:
            raise ArtifactError(f"timeout must be above 0 seconds, got {timeout}")
        base = url.rstrip("/")
        self.address = base if base.endswith("/chat/completions") else f"{base}/chat/completions"
        self.model, self.timeout, self.tries, self.pause, self.kept = model, timeout, tries, pause, kept
        self.asked = 0
        """Requests sent."""
        self.lock = threading.Lock()
        self._stop = threading.Event()

    def ask(self, message: str, *, max_tokens: int) -> str:
        """Send one user message at temperature 0; return the text of the answer, empty if it was no answer.

        Raises
        ------
        Unanswered
            The endpoint did not answer in ``tries`` attempts, or refuses this message.
        DacoError
            The endpoint refuses: the key, the address or the model is wrong.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": message}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = url_request.Request(self.address, json.dumps(body).encode(), headers)
        trouble, after = "", None
        for attempt in range(self.tries):
            if attempt:
                self._stop.wait(self._pause(attempt, after))
            if self._stop.is_set():
                raise _Stopped
            with self.lock:
                self.asked += 1
            try:
                with url_request.urlopen(request, timeout=self.timeout) as response:
                    return _content(response.read(MAX_ANSWER))
            except url_error.HTTPError as error:
                said = error.read(300).decode(errors="replace").strip()
                if error.code not in _AGAIN:
                    sentence = (
                        f"endpoint {self.address} refused with status {error.code}: {' '.join(said.split())}"
                        f"; check the address, the model's name and {KEY_VARIABLES[0]}"
                    )
                    if error.code in _THIS_MESSAGE:
                        raise Unanswered(sentence, down=False) from error
                    raise DacoError(sentence) from error
                trouble = f"status {error.code}"
                after = error.headers.get("Retry-After")
            except (OSError, HTTPException) as error:
                late = isinstance(getattr(error, "reason", error), TimeoutError)
                trouble = f"no answer within {self.timeout:g} s" if late else str(error)
                after = None
        raise Unanswered(
            f"endpoint {self.address} did not answer in {self.tries} tries ({trouble})"
            + (f"; {self.kept}" if self.kept else ""),
            down=True,
        )

    def run_all(self, jobs: Sequence[_Job], work: Callable[[_Job], None], *, workers: int) -> None:
        """Run ``work`` on every job in threads; the first failure ends the others, also those that wait for
        another attempt, and is raised.
        """
        self._stop.clear()

        def guarded(job: _Job) -> BaseException | None:
            if self._stop.is_set():
                return None
            try:
                work(job)
            except _Stopped:
                return None
            except Exception as error:
                self._stop.set()
                return error
            return None

        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(guarded, job) for job in jobs]
            try:
                wait(futures)
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        failures = [failure for future in futures if (failure := future.result()) is not None]
        if failures:
            raise failures[0]

    def _pause(self, attempt: int, after: str | None) -> float:
        asked = _seconds(after)
        if asked is not None:
            return min(asked, 300.0)
        # Spread out, so that workers that failed together do not return together.
        return min(self.pause * 2 ** (attempt - 1), 60.0) * (0.75 + 0.5 * random.random())


class LineCache:
    """What an endpoint said, a JSON line a key; grows as answers come and survives a kill.

    Parameters
    ----------
    path : the file; made with the first entry.
    check : returns the entry that a row holds, or raises ValueError, KeyError or TypeError.
    what : what a line is, for errors.

    Raises
    ------
    ArtifactError
        The file cannot be read, or a line is no such row.

    Example
    -------
    >>> cache = LineCache(Path("labels.jsonl"), lambda row: {"label": row["label"]}, "label")
    >>> cache.known
    {}
    """

    def __init__(self, path: Path, check: Callable[[dict[str, Any]], Mapping[str, Any]], what: str) -> None:
        self.path = path
        self.known: dict[str, Mapping[str, Any]] = {}
        self._lock = threading.Lock()
        if not path.exists():
            return
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read as a cache of {what}s: {error}") from error
        lines = data.split(b"\n")
        # A run that was killed while it wrote leaves a last line without its end; the next must not join it.
        if lines[-1]:
            with open(path, "rb+") as file:
                file.truncate(len(data) - len(lines[-1]))
        for number, line in enumerate(lines[:-1], 1):
            try:
                row = json.loads(line)
                self.known[row["key"]] = check(row)
            except (ValueError, KeyError, TypeError) as error:
                raise ArtifactError(
                    f"{path}, line {number}: no cached {what} ({error}); remove the line or name "
                    "another cache"
                ) from error

    def add(self, entries: Mapping[str, Mapping[str, Any]], **more: Mapping[str, Any]) -> None:
        """Keep entries by key and write them at once; keys that are known stay as they are.

        ``more`` maps a field's name to values by key that are written for people and not read back.

        Raises
        ------
        ArtifactError
            If the device refuses the lines; none of them stays.
        """
        with self._lock:
            fresh = {key: entry for key, entry in entries.items() if key not in self.known}
            if not fresh:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = [
                {"key": key, **{name: values[key] for name, values in more.items()}, **entry}
                for key, entry in fresh.items()
            ]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            append_file(self.path, lines.encode())
            self.known |= fresh


def json_objects(text: str) -> list[dict[str, Any]]:
    """Return the JSON objects in a text, in order, whatever stands around them; a torn one is left out.

    Example
    -------
    >>> json_objects('Sure! {"a": 1} and {"b": ')
    [{'a': 1}]
    """
    decoder, found = json.JSONDecoder(), []
    at = text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            found.append(value)
        at = text.find("{", end)
    return found


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
