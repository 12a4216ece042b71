"""Readers of safety benchmarks: official files in, `Sample` out. Nothing is downloaded and nothing is shipped
but our own questions: harmless ones, and ones about a concept.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from daco_rt.errors import DacoError, did_you_mean
from daco_rt.evaluate.samples import Benchmark

READERS = {
    "benign": "daco_rt.evaluate.benchmarks.benign:read_benign",
    "concepts": "daco_rt.evaluate.benchmarks.concepts:read_concepts",
    "harmbench": "daco_rt.evaluate.benchmarks.behaviours:read_harmbench",
    "jailbreakv": "daco_rt.evaluate.benchmarks.jailbreakv:read_jailbreakv",
    "mm_safetybench": "daco_rt.evaluate.benchmarks.mm_safetybench:read_mm_safetybench",
    "redteam_2k": "daco_rt.evaluate.benchmarks.jailbreakv:read_redteam",
    "scenes": "daco_rt.evaluate.benchmarks.scenes:read_scenes",
    "strongreject": "daco_rt.evaluate.benchmarks.behaviours:read_strongreject",
}
"""Name → where its reader is."""
OURS = ("benign", "concepts")
"""Those that come with the package and take no path."""


def load_benchmark(name: str, path: str | Path | None = None, **options: Any) -> Benchmark:
    """Read a benchmark.

    Parameters
    ----------
    name : one of ``READERS``.
    path : the folder or file of its data; not for those of ``OURS``.
    options : of the reader, such as ``methods`` of MM-SafetyBench; every reader that has pictures takes
        ``allow_missing``.

    Raises
    ------
    DacoError
        The name or an option is unknown, or a path is missing or not wanted.
    ArtifactError
        The data are not what the benchmark's publishers distribute.

    Example
    -------
    >>> load_benchmark("benign").card.version
    '2'
    """
    if name not in READERS:
        raise DacoError(f"benchmark '{name}' is unknown{did_you_mean(name, READERS)}")
    module, _, function = READERS[name].partition(":")
    reader = getattr(importlib.import_module(module), function)
    taken = reader.__kwdefaults__ or {}
    for option in options:
        if option not in taken:
            raise DacoError(f"benchmark {name}: option '{option}' is unknown{did_you_mean(option, taken)}")
    if name in OURS:
        if path is not None:
            raise DacoError(f"benchmark {name} comes with the package; leave its path out")
        return reader(**options)
    if path is None:
        raise DacoError(f"benchmark {name} needs the path of its data; see docs/evaluation.md for its layout")
    return reader(Path(path), **options)
