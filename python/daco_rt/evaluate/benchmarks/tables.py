"""Reading the CSV tables in which benchmarks are published."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from daco_rt.errors import ArtifactError

# Jailbreak prompts are long; the module's own limit is 128 KB.
csv.field_size_limit(16 << 20)


def read_table(file: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of a CSV file that has at least these columns.

    Raises
    ------
    ArtifactError
        The file cannot be read, lacks a column (all that are missing are named), or is empty.

    Example
    -------
    >>> read_table(Path("RedTeam_2K.csv"), ["id", "question"])[0]["id"]              # doctest: +SKIP
    '0'
    """
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            there = reader.fieldnames or []
            missing = [name for name in columns if name not in there]
            if missing:
                raise ArtifactError(
                    f"{file} lacks the columns {', '.join(missing)}; it has {', '.join(there) or 'none'}"
                )
            rows = [dict(row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ArtifactError(f"{file} cannot be read as a table: {error}") from error
    if not rows:
        raise ArtifactError(f"{file} has no rows; fetch it again")
    for number, row in enumerate(rows, 2):
        if any(row[name] is None for name in columns):
            raise ArtifactError(f"{file}: row {number} is cut off; fetch it again")
    return rows


def find_table(path: Path, names: Sequence[str], what: str, *, get: str) -> Path:
    """Return ``path`` if it is a file, else the first of these names in the folder or one level below.

    Parameters
    ----------
    path : a table, or the folder of some.
    names : of files, the best first.
    what, get : the benchmark, and how to come by it, for the error.

    Raises
    ------
    ArtifactError
        None is there.
    """
    if path.is_file():
        return path
    for name in names:
        found = [path / name, *sorted(path.glob(f"*/{name}"))]
        for file in found:
            if file.is_file():
                return file
    raise ArtifactError(
        f"{path} holds no {' and no '.join(names)}: {what} was not found there; {get}, or name its folder by "
        "path"
    )
