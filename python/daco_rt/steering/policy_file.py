"""Policies in YAML: what a person writes, checked key by key, and compiled into a pack.

The format is described in docs/concepts.md. Paths in a file are relative to its folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from daco_rt._yaml import known_keys, load_yaml
from daco_rt.artifacts import Concept, ConceptDictionary, Pack, Sae, load_dictionary, load_sae
from daco_rt.concepts.table import load_table, shipped_table
from daco_rt.errors import PolicyError, did_you_mean
from daco_rt.steering.compile import compile_pursuit_pack
from daco_rt.steering.compile_sae import compile_sae_pack
from daco_rt.steering.policy import PolicySpec

_TOP = ("version", "source", "pack", "defaults", "default", "policies")
_SOURCE = ("dictionary", "saes", "norms", "concepts")
_NUMBERS = ("gain", "boost", "gamma", "deadband", "max_dose", "condition")
_TEXTS = ("labels", "groups", "concepts")
_POLICY = ("description", "positions", "blocks", *_TEXTS, "latents", *_NUMBERS, "keep_norm")
_SHARED = ("blocks", "positions", *_NUMBERS, "keep_norm")
# Options of the compilers: name → type, and whether SAEs take them too.
_PACK: dict[str, tuple[type, bool]] = {
    "k": (int, False),
    "sign": (str, False),
    "tol": (float, False),
    "centre": (bool, False),
    "gram": (str, False),
    "dtype": (str, True),
    "k_out": (int, True),
}


@dataclass(frozen=True)
class PolicyFile:
    """A policy file, checked.

    Attributes
    ----------
    path : Path
    policies : tuple of PolicySpec
    default : str
        The policy of requests that name none.
    options : dict
        What the file says under ``pack``.
    dictionary, norms, concepts : str, Path or None
        Sources; ``concepts`` is a concept table whose labels replace the dictionary's, "built-in" for ours.
    saes : dict of int to Path
        Block → SAE folder.
    """

    path: Path
    policies: tuple[PolicySpec, ...]
    default: str
    options: Mapping[str, Any] = field(default_factory=dict)
    dictionary: Path | None = None
    saes: Mapping[int, Path] = field(default_factory=dict)
    norms: Path | None = None
    concepts: Path | str | None = None


def read_policies(path: str | Path) -> PolicyFile:
    """Read and check a policy file.

    Raises
    ------
    PolicyError
        If the file is no YAML, or a key, a value or a combination is wrong; the sentence names the place
        and, for an unknown key, the nearest known one. Groups, concepts and blocks are checked when it is
        compiled.

    Example
    -------
    >>> read_policies("configs/policies.yaml").default
    'default'
    """
    path = Path(path)
    tree = _mapping(load_yaml(path, PolicyError), _TOP, str(path))
    if tree.get("version") != 1:
        raise PolicyError(f"{path}: version must be 1, got {tree.get('version')!r}")
    shared = _fields(tree.get("defaults"), _SHARED, f"{path}, defaults")
    rows = tree.get("policies")
    if not isinstance(rows, dict) or not rows:
        raise PolicyError(f"{path}: policies must map names of policies to what they edit")
    specs = []
    for name, row in rows.items():
        where = f"{path}, policy '{name}'"
        if not isinstance(name, str) or name in ("off", "observe"):
            raise PolicyError(f"{where}: a policy's name must be text other than off and observe; rename it")
        specs.append(PolicySpec(name, **{**shared, **_fields(row, _POLICY, where)}))
    # A bare off is a boolean to YAML.
    default = tree.get("default", specs[0].name)
    default = "off" if default is False else default
    names = ("off", "observe", *(spec.name for spec in specs))
    if default not in names:
        raise PolicyError(
            f"{path}: default policy '{default}' does not exist{did_you_mean(str(default), names)}"
        )
    return PolicyFile(path, tuple(specs), default, _options(tree.get("pack"), path), **_sources(tree, path))


def build_pack(
    policies: PolicyFile | str | Path,
    output: str | Path,
    *,
    dictionary: str | Path | None = None,
    saes: Mapping[int, str | Path] | None = None,
    norms: str | Path | None = None,
    concepts: str | Path | None = None,
    overwrite: bool = False,
) -> Pack:
    """Compile a policy file with a dictionary, or with SAEs, into a pack.

    Parameters
    ----------
    policies : a file, or what `read_policies` gave.
    output : the folder to make.
    dictionary, saes, norms, concepts : in place of the file's own sources. ``norms`` is a dictionary of the
        same model, which knows the median norms that SAEs do not.
    overwrite : replace an existing folder.

    Raises
    ------
    PolicyError
        A policy does not fit the dictionary or the SAEs, or there is not exactly one kind of source.
    ArtifactError
        A source cannot be read or the folder may not be written.

    Example
    -------
    >>> build_pack("configs/policies.yaml", "packs/mine", dictionary="dictionaries/smol").default_policy
    'default'
    """
    file = policies if isinstance(policies, PolicyFile) else read_policies(policies)
    # A source given by argument replaces the other kind that the file names.
    if dictionary is not None or saes:
        if dictionary is not None and saes:
            raise PolicyError("give a dictionary or SAEs, not both; for median norms of SAEs there is norms")
        file = replace(file, dictionary=None if dictionary is None else Path(dictionary), saes={})
        file = replace(file, saes={block: Path(folder) for block, folder in (saes or {}).items()})
    if norms is not None:
        file = replace(file, norms=Path(norms))
    if concepts is not None:
        file = replace(file, concepts=concepts)
    if file.dictionary is not None:
        return _from_dictionary(file, output, overwrite)
    if file.saes:
        return _from_saes(file, output, overwrite)
    raise PolicyError(
        f"{file.path} names no dictionary and no SAEs; write one under source, or pass --dictionary or --sae"
    )


def parse_blocks(value: Any, where: str) -> tuple[int, ...]:
    """Read a block list: a number, a list of numbers, or text such as ``"15-19, 22"``.

    Example
    -------
    >>> parse_blocks("15-17, 20", "here")
    (15, 16, 17, 20)
    """
    found: list[int] = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, int) and not isinstance(item, bool) and item >= 0:
            found.append(item)
            continue
        for part in str(item).split(","):
            span = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
            last = int(span[2] or span[1]) if span else -1
            if span is None or last < int(span[1]):
                raise PolicyError(f"{where}: blocks must be numbers such as [15, 16] or 15-19, got {value!r}")
            found.extend(range(int(span[1]), last + 1))
    if not found:
        raise PolicyError(f"{where}: blocks are empty; leave the key out for all blocks")
    return tuple(sorted(set(found)))


def _from_dictionary(file: PolicyFile, output: str | Path, overwrite: bool) -> Pack:
    assert file.dictionary is not None
    dictionary = load_dictionary(file.dictionary)
    if file.concepts is not None:
        dictionary = _relabelled(dictionary, file.concepts)
    return compile_pursuit_pack(
        dictionary,
        output,
        policies=file.policies,
        default_policy=file.default,
        blocks=_used(file.policies, dictionary.blocks),
        overwrite=overwrite,
        **file.options,
    )


def _from_saes(file: PolicyFile, output: str | Path, overwrite: bool) -> Pack:
    alien = next((name for name in file.options if not _PACK[name][1]), None)
    if alien is not None:
        raise PolicyError(
            f"{file.path}, pack: '{alien}' is an option of dictionaries, the source is SAEs; remove it"
        )
    if file.norms is None:
        raise PolicyError(
            f"{file.path}: SAEs do not know the median norms of their blocks; name a dictionary of the same "
            "model by source: norms, or --norms"
        )
    norms = load_dictionary(file.norms)
    saes = {block: load_sae(folder) for block, folder in sorted(file.saes.items())}
    missing = [block for block in saes if block not in norms.median_norm]
    if missing:
        raise PolicyError(f"{file.norms} has no median norm of block {missing[0]}; measure it there too")
    return compile_sae_pack(
        saes,
        output,
        median_norm=norms.median_norm,
        policies=file.policies,
        default_policy=file.default,
        concepts={block: _named(sae, block, file.policies) for block, sae in saes.items()},
        model=norms.model if all(sae.model is None for sae in saes.values()) else None,
        overwrite=overwrite,
        **file.options,
    )


def _named(sae: Sae, block: int, specs: Iterable[PolicySpec]) -> tuple[Concept, ...]:
    """The SAE's annotation, and a number as name for every other latent that a policy edits."""
    known = {concept.index for concept in sae.annotation}
    edited = {index for spec in specs for index in spec.latents_at(block) if index < len(sae.decoder)}
    return (*sae.annotation, *(Concept(index, f"latent {index}") for index in sorted(edited - known)))


def _relabelled(dictionary: ConceptDictionary, table: str | Path) -> ConceptDictionary:
    """The same directions under the labels of a concept table, matched by synset, else by word."""
    rows = shipped_table() if table == "built-in" else load_table(table)
    known = {row.name: row for row in rows} | {row.synset: row for row in rows if row.synset}
    concepts = []
    for concept in dictionary.concepts:
        row = known.get(concept.synset) or known.get(concept.name)
        if row is not None:
            concept = replace(concept, label=row.label, group=row.group, source=row.source)
        concepts.append(concept)
    return replace(dictionary, concepts=tuple(concepts))


def _used(specs: Iterable[PolicySpec], there: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks that some policy edits: the others would only be carried along."""
    named = [spec.blocks for spec in specs]
    if any(blocks is None for blocks in named):
        return there
    return tuple(sorted({block for blocks in named for block in blocks or ()}))


def _sources(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    source = _mapping(tree.get("source", {}), _SOURCE, f"{path}, source")
    if "dictionary" in source and "saes" in source:
        raise PolicyError(f"{path}, source: name a dictionary or saes, not both")
    found: dict[str, Any] = {}
    for key in ("dictionary", "norms", "concepts"):
        if key in source:
            value = _text(source[key], f"{path}, source: {key}")
            found[key] = value if value == "built-in" and key == "concepts" else path.parent / value
    saes = source.get("saes", {})
    if not isinstance(saes, dict) or not all(type(block) is int for block in saes):
        raise PolicyError(f"{path}, source: saes must map block numbers to folders, got {saes!r}")
    found["saes"] = {
        block: path.parent / _text(folder, f"{path}, source: saes {block}") for block, folder in saes.items()
    }
    return found


def _options(tree: Any, path: Path) -> dict[str, Any]:
    found = _mapping({} if tree is None else tree, tuple(_PACK), f"{path}, pack")
    for name, value in found.items():
        kind = _PACK[name][0]
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise PolicyError(f"{path}, pack: {name} must be {_KINDS[kind]}, got {value!r}")
    return found


_KINDS = {int: "an integer", str: "text", float: "a number", bool: "true or false"}


def _fields(row: Any, keys: tuple[str, ...], where: str) -> dict[str, Any]:
    """The fields of a PolicySpec that a mapping sets."""
    row = _mapping({} if row is None else row, keys, where)
    found: dict[str, Any] = {}
    for key, value in row.items():
        what = f"{where}: {key}"
        if key in _NUMBERS:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise PolicyError(f"{what} must be a number such as 0.5, got {value!r}")
            found[key] = float(value)
        elif key in _TEXTS:
            items = value if isinstance(value, list) else [value]
            found[key] = tuple(_text(item, what) for item in items)
        elif key == "blocks":
            found[key] = parse_blocks(value, where)
        elif key == "latents":
            found[key] = _latents(value, what)
        elif key == "keep_norm":
            if not isinstance(value, bool):
                raise PolicyError(f"{what} must be true or false, got {value!r}")
            found[key] = value
        else:
            found[key] = _text(value, what)
    return found


def _latents(value: Any, what: str) -> tuple[int, ...] | dict[int, tuple[int, ...]]:
    if isinstance(value, dict):
        if not all(type(block) is int for block in value):
            raise PolicyError(f"{what} must map block numbers to lists of latents, got {value!r}")
        return {block: tuple(_indices(items, what)) for block, items in value.items()}
    return tuple(_indices(value, what))


def _indices(value: Any, what: str) -> list[int]:
    items: list[Any] = value if isinstance(value, list) else [value]
    if not all(type(item) is int and item >= 0 for item in items):
        raise PolicyError(f"{what} must be a list of indices from 0, got {value!r}")
    return items


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise PolicyError(
            f"{what} must be text, got {value!r}; put quotes around it if YAML reads it otherwise"
        )
    return value


def _mapping(tree: Any, keys: tuple[str, ...], where: str) -> dict[str, Any]:
    return known_keys(tree, keys, where, PolicyError)
