"""Rows on disk that survive an interrupt: a partial file grows line by line and gets its name when complete.

The first line is a header that says what the rows are of. A file whose header differs is refused, so that
answers of two settings never mix.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from daco_rt._files import atomic_file, fsync_path
from daco_rt.errors import ArtifactError


class RowFile:
    """JSON lines keyed by ``id``, appended batch by batch.

    Parameters
    ----------
    path : the complete file; while rows are missing they lie beside it, with ``.partial`` appended.
    header : what the rows are of; any JSON.

    Raises
    ------
    ArtifactError
        A file of that name has another header or damaged rows.

    Example
    -------
    >>> rows = RowFile(Path("answers.jsonl"), {"policy": "off"})
    >>> rows.append([{"id": "1", "text": "Hello"}])
    >>> rows.finish()
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self._partial = _partial(path)
        self._header = json.loads(json.dumps({"header": dict(header)}))
        self.rows: dict[str, dict[str, Any]] = {}
        self.complete = path.is_file()
        there = path if self.complete else self._partial
        if there.is_file():
            self._read(there)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows and flush them to the device."""
        path = self._partial
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not path.is_file()
        with open(path, "a", encoding="utf-8") as file:
            if fresh:
                file.write(_line(self._header))
            for row in rows:
                file.write(_line(row))
                self.rows[str(row["id"])] = dict(row)
            file.flush()
            os.fsync(file.fileno())

    def drop(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Forget the rows of an unfinished file for which ``wanted`` holds."""
        kept = {key: row for key, row in self.rows.items() if not wanted(row)}
        if self.complete or len(kept) == len(self.rows):
            return
        with atomic_file(self._partial) as file:
            file.write("".join(map(_line, (self._header, *kept.values()))).encode())
        self.rows = kept

    def finish(self) -> None:
        """Give the file its name; further calls do nothing."""
        if self.complete:
            return
        if not self._partial.is_file():
            self.append([])
        os.replace(self._partial, self.path)
        fsync_path(self.path.parent)
        self.complete = True

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        lines = data.split(b"\n")
        if lines[-1]:
            # A run that was killed while it wrote; the next row must not join the torn one.
            if self.complete:
                raise ArtifactError(f"{path} ends within a row; delete it and run again")
            with open(path, "rb+") as file:
                file.truncate(len(data) - len(lines[-1]))
        if len(lines) < 2:
            path.unlink()
            return
        try:
            header, *rows = [json.loads(line) for line in lines[:-1]]
            found = {str(row["id"]): row for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path} holds a damaged row ({error}); delete it and run again") from error
        if header != self._header:
            changed = _difference(header.get("header", {}), self._header["header"])
            raise ArtifactError(
                f"{path} was made under other settings ({changed}); choose another output "
                "folder, or delete it"
            )
        self.rows = found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, without its header and whatever it says.

    Of an unfinished file these are the rows so far, without a file there are none.

    Example
    -------
    >>> read_rows(Path("answers.jsonl"))                                             # doctest: +SKIP
    [{'id': '1', 'text': 'Hello'}]
    """
    there = next((file for file in (path, _partial(path)) if file.is_file()), None)
    if there is None:
        return []
    # Not splitlines: texts may hold other separators, which JSON leaves as they are. The last may be torn.
    return [json.loads(line) for line in there.read_text(encoding="utf-8").split("\n")[1:-1]]


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _difference(old: Any, new: Any) -> str:
    if not isinstance(old, dict):
        return "no header"
    keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return ", ".join(
        f"{key}: {str(old.get(key))[:60]} there, {str(new.get(key))[:60]} now" for key in keys[:3]
    )
