"""The configuration of a build, checked key by key. The format is described in docs/build.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from daco_rt._yaml import check_keys, load_yaml
from daco_rt.concepts.texts import COUNT, KINDS, MINIMUM
from daco_rt.dictionary.positions import rule
from daco_rt.errors import DacoError, did_you_mean
from daco_rt.sae.settings import SaeTraining
from daco_rt.steering.policy_file import parse_blocks

_TOP = (
    "version",
    "model",
    "precision",
    "blocks",
    "concepts",
    "stimuli",
    "harvest",
    "dictionary",
    "sae",
    "annotate",
    "packs",
)
_PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class ConceptsSection:
    """Which concepts: a table, "built-in" for the package's own, and how many of it (all by default)."""

    table: str = "built-in"
    size: int | None = None


@dataclass(frozen=True)
class StimuliSection:
    """Texts for each concept; arguments of ``make_stimuli``."""

    count: int = COUNT
    minimum: int = MINIMUM
    kinds: tuple[str, ...] = KINDS
    format: str = "chatml"


@dataclass(frozen=True)
class HarvestSection:
    """What is read, and how; arguments of ``harvest_means``. ``pairs`` is a table of captioned pictures, read
    besides the texts, or with ``texts: false`` in their place."""

    texts: bool = True
    pairs: str | None = None
    position: str = "word"
    batch_tokens: int | None = None
    concepts_per_shard: int | None = None

    def __post_init__(self) -> None:
        rule(self.position)


@dataclass(frozen=True)
class DictionarySection:
    """How directions are made of means; arguments of ``build_dictionary``. A concept that ordinary text holds
    at ``heard`` of the median norm or more loses its label (``find_heard``); 0 leaves all labels."""

    centre: str | None = None
    remove_shared: int = 0
    minimum: int = MINIMUM
    heard: float = 0.4


@dataclass(frozen=True)
class SaeSection:
    """SAEs of some blocks (all by default). ``texts`` is a file of what they are trained on, one text a line
    or JSON lines; by default it is the stimuli. ``position`` says which tokens' rows they give
    (``dictionary.positions``); but for "all" the file must be one of stimuli. ``training`` holds the fields
    of ``SaeTraining``."""

    blocks: tuple[int, ...] | None = None
    texts: str | None = None
    position: str = "all"
    training: SaeTraining = field(default_factory=SaeTraining)

    def __post_init__(self) -> None:
        rule(self.position)


@dataclass(frozen=True)
class AnnotateSection:
    """How latents are labelled; arguments of ``annotate_sae``."""

    eta: float = 0.3
    rule: Literal["centroid", "nearest"] = "centroid"


@dataclass(frozen=True)
class PackSection:
    """One pack: a policy file, and what it is compiled with: "dictionary" or "sae"."""

    policies: str
    source: Literal["dictionary", "sae"] = "dictionary"


@dataclass(frozen=True)
class BuildConfig:
    """A build, checked. Paths are relative to the folder of ``path``; ``precision`` is what the model runs in
    while it is read, "auto" for the checkpoint's own.

    Example
    -------
    >>> config = read_config("configs/smol-small.yaml")
    >>> config.model, config.blocks
    ('smol-internvl', (15, 16, 17, 18, 19))
    """

    path: Path
    model: str
    precision: str
    blocks: tuple[int, ...]
    concepts: ConceptsSection
    stimuli: StimuliSection
    harvest: HarvestSection
    dictionary: DictionarySection
    sae: SaeSection | None
    annotate: AnnotateSection
    packs: Mapping[str, PackSection]

    def file(self, name: str) -> Path:
        """Return the path of a file that the configuration names."""
        return self.path.parent / Path(name).expanduser()


def read_config(path: str | Path) -> BuildConfig:
    """Read and check the configuration of a build.

    Raises
    ------
    DacoError
        If it is no YAML, or a key or value is wrong; the sentence names the place and, for an unknown key,
        the nearest known one. Whether files, groups and blocks exist is checked by the step that needs them.
    """
    path = Path(path)
    tree = check_keys(load_yaml(path), _TOP, str(path))
    if tree.get("version") != 1:
        raise DacoError(f"{path}: version must be 1, got {tree.get('version')!r}")
    for key in ("model", "blocks", "packs"):
        if key not in tree:
            raise DacoError(f"{path}: {key} is missing; name {_WANTED[key]}")
    if not isinstance(tree["model"], str):
        raise DacoError(f"{path}: model must be a folder, a hub id or a built-in name, got {tree['model']!r}")
    precision = tree.get("precision", "auto")
    if precision not in _PRECISIONS:
        hint = did_you_mean(str(precision), _PRECISIONS)
        raise DacoError(f"{path}: precision '{precision}' is unknown{hint}")
    blocks = parse_blocks(tree["blocks"], str(path))
    sae = _sae(tree["sae"], f"{path}, sae", blocks) if tree.get("sae") is not None else None
    if sae is None and tree.get("annotate") is not None:
        raise DacoError(f"{path}: annotate labels SAEs, but there is no section sae; remove it or add one")
    harvest = _section(HarvestSection, tree.get("harvest"), f"{path}, harvest")
    if not harvest.texts and harvest.pairs is None:
        raise DacoError(f"{path}, harvest: texts is false and there are no pairs; name a table of pairs")
    return BuildConfig(
        path,
        tree["model"],
        precision,
        blocks,
        _section(ConceptsSection, tree.get("concepts"), f"{path}, concepts"),
        _section(StimuliSection, tree.get("stimuli"), f"{path}, stimuli"),
        harvest,
        _section(DictionarySection, tree.get("dictionary"), f"{path}, dictionary"),
        sae,
        _section(AnnotateSection, tree.get("annotate"), f"{path}, annotate"),
        _packs(tree["packs"], path, sae is not None),
    )


_WANTED = {
    "model": "a checkpoint, for example smol-internvl",
    "blocks": "the decoder blocks to steer, for example 15-19",
    "packs": "what is to be made, for example {default: {policies: policies.yaml}}",
}


def _sae(tree: Any, where: str, known: tuple[int, ...]) -> SaeSection:
    own = {"blocks", "texts", "position"}
    names = (*own, *(item.name for item in fields(SaeTraining)))
    tree = check_keys(tree, names, where)
    blocks = parse_blocks(tree["blocks"], where) if "blocks" in tree else None
    alien = sorted(set(blocks or ()) - set(known))
    if alien:
        raise DacoError(
            f"{where}: block {alien[0]} is not among the build's blocks {list(known)}; add it there"
        )
    training = {key: value for key, value in tree.items() if key not in own}
    read = _section(SaeSection, {key: tree[key] for key in ("texts", "position") if key in tree}, where)
    return replace(read, blocks=blocks, training=_section(SaeTraining, training, where))


def _packs(tree: Any, path: Path, has_sae: bool) -> dict[str, PackSection]:
    if not isinstance(tree, dict) or not tree:
        raise DacoError(f"{path}: packs must map names of packs to their policies, got {tree!r}")
    packs = {}
    for name, row in tree.items():
        where = f"{path}, pack '{name}'"
        if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
            raise DacoError(f"{where}: a pack's name must be a plain word, for it becomes a folder")
        pack = packs[name] = _section(PackSection, row, where)
        if pack.source == "sae" and not has_sae:
            raise DacoError(f"{where}: its source is sae, but there is no section sae; add one")
    return packs


def _section(kind: Any, tree: Any, where: str) -> Any:
    """Make a section of a mapping: keys are the fields of its class, types are theirs."""
    tree = check_keys({} if tree is None else tree, [item.name for item in fields(kind)], where)
    hints = get_type_hints(kind)
    values = {}
    for key, value in tree.items():
        allowed = _types(hints[key])
        if isinstance(value, list) and tuple in allowed and all(isinstance(item, str) for item in value):
            value = tuple(value)
        if float in allowed and type(value) is int:
            value = float(value)
        # Exact types: true is an int to isinstance.
        if type(value) not in allowed:
            raise DacoError(f"{where}: {key} must be {_said(allowed)}, got {value!r}")
        if get_origin(hints[key]) is Literal and value not in get_args(hints[key]):
            hint = did_you_mean(str(value), map(str, get_args(hints[key])))
            raise DacoError(f"{where}: {key} '{value}' is unknown{hint}")
        values[key] = value
    for item in fields(kind):
        if item.default is MISSING and item.default_factory is MISSING and item.name not in values:
            raise DacoError(f"{where}: {item.name} is missing")
    try:
        return kind(**values)
    except DacoError as error:
        raise DacoError(f"{where}: {error}") from error


def _types(hint: Any) -> tuple[type, ...]:
    """The classes a value may have: ``int | None`` gives int and NoneType, literals the classes of theirs."""
    parts = get_args(hint)
    if get_origin(hint) is tuple:
        return (tuple,)
    if not parts:
        return (hint,)
    return tuple(part if isinstance(part, type) else type(part) for part in parts)


_SAID = {int: "an integer", float: "a number", str: "text", bool: "true or false", tuple: "a list of texts"}


def _said(allowed: tuple[type, ...]) -> str:
    return " or ".join(sorted({_SAID[kind] for kind in allowed if kind in _SAID}))
