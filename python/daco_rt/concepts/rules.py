"""Labels by rule: a file that names WordNet synsets, and what lies below them, group by group.

The format is explained at the head of ``label_rules.yaml``, the default set.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daco_rt._yaml import check_keys, load_yaml
from daco_rt.concepts.everyday import LABELS
from daco_rt.concepts.labels import Label
from daco_rt.concepts.table import WordConcept
from daco_rt.errors import ArtifactError, did_you_mean

DEFAULT_RULES = Path(__file__).with_name("label_rules.yaml")
SOURCE = "rules"
_KEYS = ("label", "under", "only", "gloss")


@dataclass(frozen=True)
class LabelRules:
    """Rules in the form in which they are applied.

    Attributes
    ----------
    labels : dict of str to str
        group → label, in the file's order.
    under, only : dict of str to str
        synset → group.
    glosses : tuple of (pattern, group)
        Patterns in the file's order.
    prefer : tuple of str
        Senses in which their first word is to be read, whatever WordNet counted.
    path : Path
        The file they came from.
    """

    labels: Mapping[str, str]
    under: Mapping[str, str]
    only: Mapping[str, str]
    glosses: tuple[tuple[re.Pattern[str], str], ...]
    prefer: tuple[str, ...]
    path: Path

    @property
    def synsets(self) -> tuple[str, ...]:
        """Every synset that the rules name."""
        return (*self.under, *self.only, *self.prefer)

    def label(self, synset: str, gloss: str, paths: Sequence[Sequence[str]]) -> Label | None:
        """Return the label of one concept, None where no rule speaks of it.

        Example
        -------
        >>> rules = load_rules()
        >>> rules.label("dagger.n.01", "a short knife", [["knife.n.02", "weapon.n.01"]]).reason
        'below weapon.n.01, 2 steps up'
        """
        named = self.under.get(synset) or self.only.get(synset)
        if named:
            return self._of(named, "named itself")
        for pattern, group in self.glosses:
            hit = pattern.search(gloss)
            if hit:
                return self._of(group, f"the definition says '{hit[0]}'")
        order = list(self.labels)
        near = min(
            (
                (steps, order.index(self.under[above]), above)
                for path in paths
                for steps, above in enumerate(path, 1)
                if above in self.under
            ),
            default=None,
        )
        if near is None:
            return None
        steps, _, above = near
        return self._of(self.under[above], f"below {above}, {steps} step{'s' * (steps > 1)} up")

    def label_all(self, concepts: Iterable[WordConcept]) -> dict[str, Label]:
        """Return concept key → label for the concepts of which a rule speaks."""
        found = {}
        for concept in concepts:
            label = self.label(concept.synset, concept.gloss, concept.paths)
            if label is not None:
                found[concept.key] = label
        return found

    def check_names(self, known: Collection[str]) -> None:
        """Refuse rules that name a synset which does not exist.

        Raises
        ------
        ArtifactError
            With the nearest name.
        """
        for name in self.synsets:
            if name not in known:
                word = name.partition(".")[0]
                near = [other for other in known if other.partition(".")[0] == word]
                hint = f"; senses of that word: {', '.join(sorted(near)[:9])}" if near else ""
                raise ArtifactError(f"{self.path}: synset '{name}' is in no WordNet{hint}; correct the name")

    def _of(self, group: str, reason: str) -> Label:
        return Label(self.labels[group], group, SOURCE, reason)


def load_rules(path: str | Path | None = None) -> LabelRules:
    """Read a rule file; without a path, the default set.

    Raises
    ------
    ArtifactError
        If the file is no such YAML; unknown keys are answered with the nearest known one.
    """
    path = Path(DEFAULT_RULES if path is None else path)
    tree = load_yaml(path, ArtifactError)
    check_keys(tree, ("version", "groups", "prefer"), f"{path}", ArtifactError)
    if tree.get("version") != 1:
        raise ArtifactError(f"{path}: version must be 1, got {tree.get('version')!r}")
    groups = tree.get("groups")
    if not isinstance(groups, dict) or not groups:
        raise ArtifactError(f"{path}: groups must map names of groups to their rules")
    labels: dict[str, str] = {}
    under: dict[str, str] = {}
    only: dict[str, str] = {}
    glosses: list[tuple[re.Pattern[str], str]] = []
    for group, rule in groups.items():
        where = f"{path}, group '{group}'"
        check_keys(rule, _KEYS, where, ArtifactError)
        label = rule.get("label")
        if label not in LABELS:
            raise ArtifactError(f"{where}: label {label!r} is unknown{did_you_mean(str(label), LABELS)}")
        labels[str(group)] = label
        for key, target in (("under", under), ("only", only)):
            for name in _names(rule, key, where):
                _synset(name, where)
                if name in under or name in only:
                    taken = under.get(name) or only.get(name)
                    raise ArtifactError(f"{where}: {name} is in group '{taken}' already; name it once")
                target[name] = str(group)
        for pattern in _names(rule, "gloss", where):
            try:
                glosses.append((re.compile(pattern, re.IGNORECASE), str(group)))
            except re.error as error:
                raise ArtifactError(f"{where}: {pattern!r} is no regular expression ({error})") from error
    prefer = tuple(_names(tree, "prefer", f"{path}"))
    for name in prefer:
        _synset(name, f"{path}, prefer")
    return LabelRules(labels, under, only, tuple(glosses), prefer, path)


def _synset(name: str, where: str) -> None:
    if not re.fullmatch(r"[^\s.]\S*\.n\.\d\d", name):
        raise ArtifactError(f"{where}: {name!r} is no synset; write word.n.NN, as in dagger.n.01")


def _names(rule: dict[str, Any], key: str, where: str) -> list[str]:
    names = rule.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ArtifactError(f"{where}: {key} must be a list of texts, got {names!r}")
    return names
