"""The configuration of an evaluation: which model, data, methods and judges; checked before anything runs.

The format is described in docs/evaluation.md. Paths in a file are relative to its folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from daco_rt._yaml import check_keys, load_yaml
from daco_rt.errors import DacoError, did_you_mean
from daco_rt.evaluate.benchmarks import READERS
from daco_rt.evaluate.judges import JUDGES
from daco_rt.evaluate.methods import Method
from daco_rt.evaluate.samples import PARTS, Part

_TOP = (
    "version", "model", "engine", "dictionary", "output", "generation", "seeds", "split", "benchmarks",
    "methods", "judges", "divergence", "perplexity", "timing",
)  # fmt: skip
_GENERATION = ("max_new_tokens", "temperature", "batch_size", "threads")
ENGINES = ("bundle", "torch")


@dataclass(frozen=True)
class Data:
    """One benchmark of a configuration: ``limit`` is the most samples, ``options`` are the reader's."""

    name: str
    kind: str
    path: Path | None
    limit: int | None
    options: Mapping[str, Any]


@dataclass(frozen=True)
class EvaluationConfig:
    """A checked configuration.

    Attributes
    ----------
    path : Path
    family, checkpoint : str
        The model.
    engine : str
        "bundle" (exported, in its runtime) or "torch" (hooks on the Hugging Face model).
    device, dtype : str
        Where and in what the torch engine runs.
    dictionary : Path, str or None
        Of the methods; "built-in" is the one that belongs to a built-in checkpoint.
    output : Path
    max_new_tokens, temperature, batch_size, threads
        How answers are made.
    seeds : tuple of int
        Repetitions; greedy answers need one.
    part, dev, split_seed
        Which side of the split runs.
    benchmarks : dict of str to Data
    methods : dict of str to Method
        "none" comes first, whether it was named or not.
    judges : dict of str to dict
        Name → kind and its options.
    divergence : tuple of str
        Benchmarks on whose unsteered answers the KL divergence is measured.
    perplexity : bool
        Whether it is measured on neutral text.
    timing : bool
        Whether the time of a token is measured in pairs with the unsteered model.
    """

    path: Path
    family: str
    checkpoint: str
    engine: Literal["bundle", "torch"]
    dictionary: Path | str | None
    output: Path
    benchmarks: Mapping[str, Data]
    methods: Mapping[str, Method]
    judges: Mapping[str, Mapping[str, Any]]
    device: str = "cpu"
    dtype: str = "float32"
    max_new_tokens: int = 64
    temperature: float = 0.0
    batch_size: int = 8
    threads: int | None = None
    seeds: tuple[int, ...] = (0,)
    part: Part = "test"
    dev: float = 0.3
    split_seed: int = 0
    divergence: tuple[str, ...] = ()
    perplexity: bool = True
    timing: bool = True
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)


def read_config(
    path: str | Path, *, output: str | Path | None = None, part: str | None = None
) -> EvaluationConfig:
    """Read and check a configuration; ``output`` and ``part`` replace what the file says.

    Raises
    ------
    DacoError
        The file is no YAML, or a key, a value or a name is wrong; the sentence says where.

    Example
    -------
    >>> read_config("configs/evaluate-pocket.yaml").engine
    'bundle'
    """
    path = Path(path)
    tree = check_keys(load_yaml(path), _TOP, str(path))
    if tree.get("version") != 1:
        raise DacoError(f"{path}: version must be 1, got {tree.get('version')!r}")
    model = check_keys(tree.get("model"), ("family", "checkpoint", "device", "dtype"), f"{path}, model")
    family = _text(model.get("family", "internvl"), f"{path}, model: family")
    checkpoint = _text(model.get("checkpoint", f"smol-{family}"), f"{path}, model: checkpoint")
    if (path.parent / checkpoint).is_dir():
        checkpoint = str(path.parent / checkpoint)
    engine = tree.get("engine", "bundle")
    if engine not in ENGINES:
        raise DacoError(f"{path}: engine '{engine}' is unknown{did_you_mean(str(engine), ENGINES)}")
    for key in ("device", "dtype"):
        if key in model and engine != "torch":
            raise DacoError(f"{path}, model: {key} is for engine: torch; a bundle runs as it was exported")
    generation = check_keys(tree.get("generation", {}), _GENERATION, f"{path}, generation")
    split = check_keys(tree.get("split", {}), ("part", "dev", "seed"), f"{path}, split")
    chosen = part or split.get("part", "test")
    if chosen not in PARTS:
        raise DacoError(f"{path}, split: part '{chosen}' is unknown{did_you_mean(str(chosen), PARTS)}")
    seeds = tree.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise DacoError(f"{path}: seeds must be a list of integers from 0, got {seeds!r}")
    temperature = _number(generation.get("temperature", 0.0), f"{path}, generation: temperature", 0)
    if len(seeds) > 1 and temperature == 0:
        raise DacoError(
            f"{path}: several seeds give the same greedy answers; name one, or raise generation: temperature"
        )
    benchmarks = _benchmarks(tree.get("benchmarks"), path)
    divergence = tree.get("divergence", [name for name, data in benchmarks.items() if data.kind == "benign"])
    for name in divergence:
        if name not in benchmarks:
            raise DacoError(f"{path}, divergence: no benchmark '{name}'{did_you_mean(str(name), benchmarks)}")
    threads = generation.get("threads")
    return EvaluationConfig(
        path,
        family,
        checkpoint,
        engine,
        _source(tree.get("dictionary"), path),
        Path(output) if output is not None else path.parent / _text(tree.get("output"), f"{path}: output"),
        benchmarks,
        _methods(tree.get("methods"), path),
        _judges(tree.get("judges"), path),
        device=_text(model.get("device", "cpu"), f"{path}, model: device"),
        dtype=_text(model.get("dtype", "float32"), f"{path}, model: dtype"),
        max_new_tokens=_count(generation.get("max_new_tokens", 64), f"{path}, generation: max_new_tokens"),
        temperature=temperature,
        batch_size=_count(generation.get("batch_size", 8), f"{path}, generation: batch_size"),
        threads=None if threads is None else _count(threads, f"{path}, generation: threads"),
        seeds=tuple(seeds),
        part=chosen,
        dev=_number(split.get("dev", 0.3), f"{path}, split: dev", 0),
        split_seed=int(split.get("seed", 0)),
        divergence=tuple(divergence),
        perplexity=_flag(tree.get("perplexity", True), f"{path}: perplexity"),
        timing=_flag(tree.get("timing", True), f"{path}: timing"),
        raw=tree,
    )


def _benchmarks(tree: Any, path: Path) -> dict[str, Data]:
    if not isinstance(tree, dict) or not tree:
        raise DacoError(f"{path}: benchmarks must map names to their data")
    found = {}
    for name, row in tree.items():
        where = f"{path}, benchmark '{name}'"
        row = {} if row is None else row
        if not isinstance(row, dict):
            raise DacoError(f"{where}: expected keys and values, got {type(row).__name__}")
        row = dict(row)
        kind = row.pop("kind", name)
        if kind not in READERS:
            raise DacoError(f"{where}: kind '{kind}' is unknown{did_you_mean(str(kind), READERS)}")
        place, limit = row.pop("path", None), row.pop("limit", None)
        found[_safe(name, where)] = Data(
            name,
            kind,
            None if place is None else path.parent / _text(place, f"{where}: path"),
            None if limit is None else _count(limit, f"{where}: limit"),
            row,
        )
    return found


def _methods(tree: Any, path: Path) -> dict[str, Method]:
    if not isinstance(tree, dict) or not tree:
        raise DacoError(f"{path}: methods must map names to kinds")
    found = {"none": Method("none", "none")}
    for name, row in tree.items():
        where = f"{path}, method '{name}'"
        row = dict(row or {})
        kind = row.pop("kind", name)
        strengths = row.pop("strengths", [])
        strengths = strengths if isinstance(strengths, list) else [strengths]
        values = tuple(_number(value, f"{where}: strengths") for value in strengths)
        if "path" in row:
            row["path"] = str(path.parent / _text(row["path"], f"{where}: path"))
        if isinstance(row.get("saes"), dict):
            row["saes"] = {block: str(path.parent / str(folder)) for block, folder in row["saes"].items()}
        found[_safe(name, where)] = Method(name, str(kind), values, row)
    if found["none"].kind != "none":
        raise DacoError(f"{path}: the method called none must be of kind none; give the other another name")
    return found


def _judges(tree: Any, path: Path) -> dict[str, dict[str, Any]]:
    if not isinstance(tree, dict) or not tree:
        raise DacoError(f"{path}: judges must map names to kinds; the cheapest are refusal and lexicon")
    found = {}
    for name, row in tree.items():
        where = f"{path}, judge '{name}'"
        row = {"kind": name} | dict(row or {})
        if row["kind"] not in JUDGES:
            raise DacoError(
                f"{where}: kind '{row['kind']}' is unknown{did_you_mean(str(row['kind']), JUDGES)}"
            )
        check_keys(row, ("kind", *JUDGES[row["kind"]]), where)
        for key in ("path", "table"):
            if key in row and (path.parent / str(row[key])).exists():
                row[key] = str(path.parent / str(row[key]))
        found[_safe(name, where)] = row
    return found


def _source(value: Any, path: Path) -> Path | str | None:
    if value is None or value == "built-in":
        return value
    return path.parent / _text(value, f"{path}: dictionary")


def _safe(name: Any, where: str) -> str:
    """A name that can stand in a file's path."""
    if not isinstance(name, str) or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise DacoError(f"{where}: a name must be of letters, digits, '-', '_' and '.'; rename it")
    return name


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise DacoError(f"{where} must be text, got {value!r}")
    return value


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise DacoError(f"{where} must be true or false, got {value!r}")
    return value


def _count(value: Any, where: str) -> int:
    if type(value) is not int or value < 1:
        raise DacoError(f"{where} must be an integer from 1, got {value!r}")
    return value


def _number(value: Any, where: str, least: float = -math.inf) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value < least
    ):
        at_least = "" if least == -math.inf else f" of {least:g} or more"
        raise DacoError(f"{where} must be a number{at_least}, got {value!r}")
    return float(value)
