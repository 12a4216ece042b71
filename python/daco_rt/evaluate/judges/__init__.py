"""Judges: is an answer harmful, is it a refusal? Several, so that no single one is believed alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from daco_rt.evaluate.judges.verdict import Judge, Verdict

__all__ = ["JUDGES", "Judge", "Verdict", "make_judge"]

JUDGES: dict[str, tuple[str, ...]] = {
    "refusal": ("count_rest_as_unsafe",),
    "lexicon": ("table",),
}
"""Kind → the options that it takes."""


def make_judge(kind: str, options: Mapping[str, Any]) -> Judge:
    """Return a judge by kind; options are those of `JUDGES`.

    Example
    -------
    >>> make_judge("refusal", {}).source
    'refusal-patterns-1'
    """
    if kind == "refusal":
        from daco_rt.evaluate.judges.refusal import RefusalJudge

        return RefusalJudge(**options)
    from daco_rt.concepts.table import load_table, shipped_table
    from daco_rt.evaluate.judges.lexicon import Lexicon, LexiconJudge

    table = options.get("table")
    return LexiconJudge(Lexicon(shipped_table() if table is None else load_table(Path(table))))
