"""Judges: is an answer harmful, is it a refusal? Several, so that no single one is believed alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from daco_rt.errors import DacoError
from daco_rt.evaluate.judges.verdict import Judge, Verdict

__all__ = ["JUDGES", "SCORES", "Better", "Judge", "Verdict", "make_judge"]

Better = Literal["lower", "higher"]

JUDGES: dict[str, tuple[str, ...]] = {
    "refusal": ("count_rest_as_unsafe",),
    "lexicon": ("table",),
    "guard": (
        "path", "guard", "unsafe_labels", "threshold", "template", "strict", "max_new_tokens", "batch_size",
        "max_length", "device", "dtype",
    ),
    "scenes": (),
    "endpoint": ("url", "model", "cache", "workers", "asks", "timeout", "tries", "pause", "give_up"),
}  # fmt: skip
"""Kind → the options that it takes; ``guard`` is the kind of a guard model."""
SCORES: dict[str, dict[str, Better]] = {
    "scenes": {
        "mention": "lower",
        "recall": "higher",
        "exact": "higher",
        "kept": "higher",
        "invented": "lower",
        "neutral": "higher",
        "well-formed": "higher",
    }
}
"""Kind → the names of `Verdict.scores` that its verdicts hold, and which way each is better."""


def make_judge(kind: str, options: Mapping[str, Any]) -> Judge:
    """Return a judge by kind; options are those of `JUDGES`.

    Raises
    ------
    DacoError
        A needed option is missing, or what it names cannot be used.

    Example
    -------
    >>> make_judge("refusal", {}).source
    'refusal-patterns-1'
    """
    options = dict(options)
    needed = {"guard": ("path",), "endpoint": ("url", "model", "cache")}.get(kind, ())
    missing = [name for name in needed if name not in options]
    if missing:
        raise DacoError(f"a judge of kind {kind} needs {', '.join(missing)}")
    if kind == "refusal":
        from daco_rt.evaluate.judges.refusal import RefusalJudge

        return RefusalJudge(**options)
    if kind == "scenes":
        from daco_rt.evaluate.judges.scenes import SceneJudge

        return SceneJudge(**options)
    if kind == "guard":
        from daco_rt.evaluate.judges.guard import GuardJudge

        return GuardJudge(options.pop("path"), kind=options.pop("guard", "auto"), **options)
    if kind == "endpoint":
        from daco_rt.evaluate.judges.endpoint import EndpointJudge

        return EndpointJudge(options.pop("url"), options.pop("model"), options.pop("cache"), **options)
    from daco_rt.concepts.table import load_table, shipped_table
    from daco_rt.evaluate.judges.lexicon import Lexicon, LexiconJudge

    table = options.get("table")
    return LexiconJudge(Lexicon(shipped_table() if table is None else load_table(Path(table))))
