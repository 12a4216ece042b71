"""The configuration of an evaluation: which model, data, methods and judges; checked before anything runs.

The format is described in docs/evaluation.md. Paths in a file are relative to its folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from daco_rt._yaml import check_keys, load_yaml
from daco_rt.errors import DacoError, did_you_mean
from daco_rt.evaluate.benchmarks import READERS
from daco_rt.evaluate.judges import JUDGES
from daco_rt.evaluate.methods import CONTROLLED, Method
from daco_rt.evaluate.protocol import Protocol, read_protocol
from daco_rt.evaluate.samples import PARTS, Part
from daco_rt.evaluate.values import count, flag, number, safe_name, text

_TOP = (
    "version", "model", "engine", "dictionary", "output", "generation", "seeds", "split", "benchmarks",
    "methods", "judges", "divergence", "perplexity", "timing", "protocol", "prepare",
)  # fmt: skip
_GENERATION = ("max_new_tokens", "temperature", "batch_size", "threads")
ENGINES = ("bundle", "torch")


@dataclass(frozen=True)
class Data:
    """One benchmark: ``limits`` is the most samples of each part, ``skips`` how many of its order come before
    them, ``options`` are the reader's.
    """

    name: str
    kind: str
    path: Path | None
    limits: Mapping[Part, int | None]
    skips: Mapping[Part, int | None]
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
        Whether it, and the divergence, are measured on neutral text.
    timing : bool
        Whether the time of a token is measured in pairs with the unsteered model.
    protocol : Protocol or None
        How strengths are chosen on the development part; None where nothing is claimed.
    prepare : tuple of str
        Commands that must have run before, which the report shows; they are never run.
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
    protocol: Protocol | None = None
    prepare: tuple[str, ...] = ()
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
    >>> read_config("configs/evaluate.yaml").engine
    'bundle'
    """
    path = Path(path)
    tree = check_keys(load_yaml(path), _TOP, str(path))
    if tree.get("version") != 1:
        raise DacoError(f"{path}: version must be 1, got {tree.get('version')!r}")
    model = check_keys(tree.get("model"), ("family", "checkpoint", "device", "dtype"), f"{path}, model")
    family = text(model.get("family", "internvl"), f"{path}, model: family")
    checkpoint = text(model.get("checkpoint", f"smol-{family}"), f"{path}, model: checkpoint")
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
    temperature = number(generation.get("temperature", 0.0), f"{path}, generation: temperature", 0)
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
    methods, judges = _methods(tree.get("methods"), path), _judges(tree.get("judges"), path)
    share = number(split.get("dev", 0.3), f"{path}, split: dev", 0)
    protocol = None
    if "protocol" in tree:
        protocol = read_protocol(
            tree["protocol"],
            f"{path}, protocol",
            divergence=divergence,
            benchmarks=benchmarks,
            methods=methods,
            judges=judges,
        )
        if not 0 < share < 1:
            raise DacoError(f"{path}, split: a protocol needs both parts, dev within 0 and 1; got {share:g}")
        if temperature > 0 and len(seeds) < 3:
            raise DacoError(
                f"{path}: sampled answers under a protocol need three seeds or more, got {seeds}; add seeds, "
                "or set generation: temperature to 0"
            )
        if part in ("test", "all"):
            raise DacoError(
                f"{path} has a protocol: the test part is run by it, once, after the strengths are chosen; "
                "leave --part out, or give --part dev to stop before the test"
            )
    return EvaluationConfig(
        path,
        family,
        checkpoint,
        engine,
        _source(tree.get("dictionary"), path),
        Path(output) if output is not None else path.parent / text(tree.get("output"), f"{path}: output"),
        benchmarks,
        methods,
        judges,
        device=text(model.get("device", "cpu"), f"{path}, model: device"),
        dtype=text(model.get("dtype", "float32"), f"{path}, model: dtype"),
        max_new_tokens=count(generation.get("max_new_tokens", 64), f"{path}, generation: max_new_tokens"),
        temperature=temperature,
        batch_size=count(generation.get("batch_size", 8), f"{path}, generation: batch_size"),
        threads=None if threads is None else count(threads, f"{path}, generation: threads"),
        seeds=tuple(seeds),
        part=chosen,
        dev=share,
        split_seed=int(split.get("seed", 0)),
        divergence=tuple(divergence),
        perplexity=flag(tree.get("perplexity", True), f"{path}: perplexity"),
        timing=flag(tree.get("timing", True), f"{path}: timing"),
        protocol=protocol,
        prepare=_prepare(tree.get("prepare", []), f"{path}: prepare"),
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
        place, limit, skip = row.pop("path", None), row.pop("limit", None), row.pop("skip", None)
        found[safe_name(name, where)] = Data(
            name,
            kind,
            None if place is None else path.parent / text(place, f"{where}: path"),
            _by_part(limit, f"{where}: limit"),
            _by_part(skip, f"{where}: skip"),
            row,
        )
    return found


def _by_part(given: Any, where: str) -> dict[Part, int | None]:
    """One number for every part, or a number each of some parts."""
    if given is None or isinstance(given, int):
        return dict.fromkeys(PARTS, None if given is None else count(given, where))
    row = check_keys(given, PARTS, where)
    return {part: count(row[part], f"{where}, {part}") if part in row else None for part in PARTS}


def _methods(tree: Any, path: Path) -> dict[str, Method]:
    if not isinstance(tree, dict) or not tree:
        raise DacoError(f"{path}: methods must map names to kinds")
    found = {"none": Method("none", "none")}
    controls = {}
    for name, row in tree.items():
        where = f"{path}, method '{name}'"
        row = {"kind": name} | dict(row or {})
        if "of" in row:
            controls[safe_name(name, where)] = row
            found[name] = Method(name, "none")  # keeps its place until what it controls is known
        else:
            found[safe_name(name, where)] = _method(name, row, path, where)
    for name, row in controls.items():
        found[name] = _control(name, row, found, controls, f"{path}, method '{name}'")
    named = next((m.pool for m in found.values() if m.pool in found), None)
    if named is not None:
        raise DacoError(f"{path}: pool '{named}' has the name of a method; rename one")
    if found["none"].kind != "none":
        raise DacoError(f"{path}: the method called none must be of kind none; give the other another name")
    return found


def _method(name: str, row: dict[str, Any], path: Path, where: str) -> Method:
    kind, strengths, pool = row.pop("kind"), row.pop("strengths", []), row.pop("pool", "")
    strengths = strengths if isinstance(strengths, list) else [strengths]
    values = tuple(number(value, f"{where}: strengths") for value in strengths)
    if "path" in row:
        row["path"] = str(path.parent / text(row["path"], f"{where}: path"))
    if isinstance(row.get("saes"), dict):
        row["saes"] = {block: str(path.parent / str(folder)) for block, folder in row["saes"].items()}
    if pool:
        safe_name(pool, f"{where}: pool")
    return Method(name, str(kind), values, row, pool=pool)


def _control(
    name: str, row: dict[str, Any], found: Mapping[str, Method], controls: Mapping[str, Any], where: str
) -> Method:
    """A random control: strengths and everything else are those of the method that it controls."""
    row = dict(row)
    kind, of = row.pop("kind"), str(row.pop("of"))
    if kind != "random":
        raise DacoError(f"{where}: only methods of kind random take of:, got kind {kind}")
    check_keys(row, ("match", "seed", "seeds"), f"{where} (a control takes the rest from '{of}')")
    if of not in found or of in controls:
        raise DacoError(f"{where}: no method '{of}' to control{did_you_mean(of, set(found) - set(controls))}")
    if found[of].kind not in CONTROLLED:
        raise DacoError(
            f"{where}: '{of}' is of kind {found[of].kind}; only {', '.join(CONTROLLED)} take atoms out that "
            "random ones can replace"
        )
    return Method(name, "random", found[of].strengths, row, controls=found[of])


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
        found[safe_name(name, where)] = row
    return found


def _prepare(lines: Any, where: str) -> tuple[str, ...]:
    if not isinstance(lines, list):
        raise DacoError(f"{where} must be a list of commands, got {lines!r}")
    return tuple(text(line, f"{where}: a command") for line in lines)


def _source(value: Any, path: Path) -> Path | str | None:
    if value is None or value == "built-in":
        return value
    return path.parent / text(value, f"{path}: dictionary")
