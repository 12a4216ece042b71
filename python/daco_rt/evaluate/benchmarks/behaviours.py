"""StrongREJECT and HarmBench: plain harmful requests in one table each, without pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from daco_rt.errors import DacoError, did_you_mean
from daco_rt.evaluate.benchmarks.tables import find_table, read_table
from daco_rt.evaluate.samples import Benchmark, Sample, make_card, unique_ids

_STRONGREJECT = {"full": "strongreject_dataset.csv", "small": "strongreject_small_dataset.csv"}
_HARMBENCH = {"test": "harmbench_behaviors_text_test.csv", "val": "harmbench_behaviors_text_val.csv"}
_GET = "run python scripts/fetch_harm_prompts.py, which writes build/deps/harm-prompts"
FUNCTIONAL = ("standard", "contextual", "copyright")


def read_strongreject(path: Path, *, table: str = "full") -> Benchmark:
    """Read StrongREJECT: 313 requests in six categories, or 60 with ``table="small"``.

    Parameters
    ----------
    path : a CSV file with category, source, forbidden_prompt, or the folder that holds it.
    table : "full" or "small", where path is a folder.

    Raises
    ------
    ArtifactError
        The table is not there or lacks a column.

    Example
    -------
    >>> read_strongreject(Path("build/deps/harm-prompts")).card.version              # doctest: +SKIP
    '1'
    """
    if table not in _STRONGREJECT:
        raise DacoError(f"strongreject: table '{table}' is unknown{did_you_mean(table, _STRONGREJECT)}")
    file = find_table(path, [_STRONGREJECT[table]], "StrongREJECT", get=_GET)
    rows = read_table(file, ["category", "source", "forbidden_prompt"])
    samples = tuple(
        # The tables spell one category in two ways.
        Sample(f"{i:03d}", row["category"].capitalize(), row["forbidden_prompt"], form=row["source"])
        for i, row in enumerate(rows)
    )
    unique_ids(samples, f"strongreject in {file}")
    card = make_card(
        "strongreject",
        "1",
        "MIT; parts of other data sets under their own terms",
        "https://github.com/alexandrasouly/strongreject",
        [file],
        samples,
        root=file.parent,
    )
    return Benchmark(card, samples)


def read_harmbench(
    path: Path, *, table: str = "test", functional: Sequence[str] = ("standard", "contextual")
) -> Benchmark:
    """Read HarmBench's text behaviours: 320 for the test, 80 for validation.

    A contextual behaviour is asked with its context in front. Behaviours on copyright are left out unless
    asked for: whether they were met is decided by comparing texts, which no judge here does.

    Parameters
    ----------
    path : a CSV file, or the folder that holds it.
    table : "test" or "val", where path is a folder.
    functional : which kinds: "standard", "contextual", "copyright".

    Raises
    ------
    ArtifactError
        The table is not there or lacks a column.

    Example
    -------
    >>> len(read_harmbench(Path("build/deps/harm-prompts")).samples)                 # doctest: +SKIP
    240
    """
    if table not in _HARMBENCH:
        raise DacoError(f"harmbench: table '{table}' is unknown{did_you_mean(table, _HARMBENCH)}")
    functional = [functional] if isinstance(functional, str) else functional
    for kind in functional:
        if kind not in FUNCTIONAL:
            raise DacoError(
                f"harmbench: functional category '{kind}' is unknown{did_you_mean(kind, FUNCTIONAL)}"
            )
    file = find_table(path, [_HARMBENCH[table]], "HarmBench", get=_GET)
    columns = ["Behavior", "FunctionalCategory", "SemanticCategory", "ContextString", "BehaviorID"]
    samples = tuple(
        Sample(
            row["BehaviorID"],
            row["SemanticCategory"],
            f"{row['ContextString']}\n\n---\n\n{row['Behavior']}"
            if row["ContextString"]
            else row["Behavior"],
            form=row["FunctionalCategory"],
            reference=row["Behavior"],
        )
        for row in read_table(file, columns)
        if row["FunctionalCategory"] in functional
    )
    unique_ids(samples, f"harmbench in {file}")
    card = make_card(
        "harmbench",
        f"1.0 {table}",
        "MIT; some contexts quote texts of others",
        "https://github.com/centerforaisafety/HarmBench",
        [file],
        samples,
        root=file.parent,
    )
    return Benchmark(card, samples)
