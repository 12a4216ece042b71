"""Which of WordNet's 82,115 noun synsets become concepts.

The rule, in order:

1. *Form.* Kinds, not instances: no cities, people, wars. The first word of the synset is a single word, or a
   compound of two whose second word is itself a noun of WordNet. Letters, hyphens; three letters at least,
   unless the sense was met in tagged text. No names of taxonomic groups.
2. *One concept a word.* Of all senses of a word the one wins that was met most often in tagged text; of
   equals one of which it is the first word, then the order of WordNet. If the winner is an instance (Adam)
   or another word stands first in it, the word makes no concept. The rules' list ``prefer`` overrides this
   where the tagged text says nothing of a harmful sense, or little ("rape" is a plant to WordNet first).
3. *Rank.* Frequency of the sense in tagged text; then, for that text is small and old (it knows no heroin),
   the number of other synsets whose definition or examples use the word; then depth, the general before the
   special; then the order of WordNet. Mentions count for nothing where the tagged text knows the word as
   another part of speech only ("oral", "till").
4. *Kept.* Concepts that the rules label undesirable or desirable are taken even where their rank is too
   low, for a dictionary can only remove what it has: up to a third of the table, by rank.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from daco_rt.concepts.everyday import everyday_concepts
from daco_rt.concepts.labels import apply_labels
from daco_rt.concepts.rules import LabelRules, load_rules
from daco_rt.concepts.table import WordConcept
from daco_rt.concepts.wordnet import Synset, WordNet
from daco_rt.errors import ArtifactError

SIZE = 15_000
KEPT_SHARE = 3
_WORD = r"[A-Za-z]+(?:-[A-Za-z]+)*"
_FORM = re.compile(rf"{_WORD}(?: {_WORD})?")
_TAXA = "taxonomic_group.n.01"


def select_concepts(
    wordnet: WordNet,
    *,
    size: int = SIZE,
    rules: LabelRules | None = None,
    rank: Literal["familiar", "depth"] = "familiar",
    keep_labelled: bool = True,
) -> tuple[WordConcept, ...]:
    """Choose concepts by the rule above and label them by rule.

    Parameters
    ----------
    wordnet : WordNet
    size : int
        How many concepts; fewer come out where WordNet has fewer.
    rules : LabelRules, optional
        By default the package's own.
    rank : {"familiar", "depth"}
        "depth" leaves mentions out of the rank.
    keep_labelled : bool
        Whether point 4 holds.

    Returns
    -------
    tuple of WordConcept
        In the order of rank, so that a prefix is the table of a smaller size but for the kept concepts.

    Raises
    ------
    ArtifactError
        If ``size`` is below 1, or a rule names a synset that this WordNet does not have.

    Example
    -------
    >>> table = select_concepts(WordNet(find_wordnet()), size=1000)
    >>> table[0].name
    'person'
    """
    if size < 1:
        raise ArtifactError(f"size must be 1 or more, got {size}")
    rules = load_rules() if rules is None else rules
    rules.check_names(wordnet.offsets)
    mentions = count_mentions(wordnet) if rank == "familiar" else Counter()
    preferred = {wordnet.offsets[name] for name in rules.prefer}
    candidates = [
        synset
        for synset in wordnet.synsets.values()
        if _has_form(synset, wordnet) and _reads(synset, wordnet, preferred)
    ]
    labelled = set()
    for synset in candidates:
        label = rules.label(wordnet.names[synset.offset], synset.gloss, wordnet.paths(synset.offset))
        if label is not None and label.label != "neutral":
            labelled.add(synset.offset)
    elsewhere = wordnet.tagged_elsewhere

    def standing(synset: Synset) -> tuple[int, ...]:
        word = synset.words[0].lower()
        known = 0 if not synset.count and word in elsewhere else mentions[word]
        return -synset.count, -known, wordnet.depth(synset.offset), synset.offset

    ranked = sorted(candidates, key=standing)
    kept = [synset for synset in ranked if synset.offset in labelled] if keep_labelled else []
    chosen = {synset.offset for synset in kept[: size // KEPT_SHARE]}
    for synset in ranked:
        if len(chosen) >= size:
            break
        chosen.add(synset.offset)
    rows = [
        _row(synset, wordnet, mentions[synset.words[0].lower()])
        for synset in ranked
        if synset.offset in chosen
    ]
    return apply_labels(rows, [rules])


def subset_concepts(table: Sequence[WordConcept], size: int) -> tuple[WordConcept, ...]:
    """Return a smaller table: labelled concepts up to a third, what they could be taken for, then by rank.

    What they could be taken for are everyday words (the package's hand-written list) and the last words of
    labelled compounds: a dictionary that knows poker and no chess finds poker in both, and one that knows
    smokeless powder and no powder finds it in ground coffee. Few of them would be there by rank, which at
    small sizes is that of newspapers: *state*, *group*, *act*.

    Example
    -------
    >>> small = subset_concepts(shipped_table(), 1500)
    >>> len(small), sum(concept.label != "neutral" for concept in small)
    (1500, 509)
    """
    if size < 1:
        raise ArtifactError(f"size must be 1 or more, got {size}")
    labelled = [row for row, concept in enumerate(table) if concept.label != "neutral"]
    first = labelled[: size // KEPT_SHARE]
    alike = {entry.name for entry in everyday_concepts()}
    alike |= {table[row].name.lower().rpartition(" ")[2] for row in first}
    known = [row for row, concept in enumerate(table) if concept.name.lower() in alike]
    chosen = dict.fromkeys([*first, *known, *range(len(table))])
    return tuple(table[row] for row in sorted(list(chosen)[:size]))


def count_mentions(wordnet: WordNet) -> Counter[str]:
    """Return word or two-word compound → number of synsets that use it in definition or examples.

    A synset's own words do not count.
    """
    mentions: Counter[str] = Counter()
    for synset in wordnet.synsets.values():
        seen: set[str] = set()
        for text in (synset.gloss, *synset.examples):
            words = re.findall(_WORD, text.lower())
            seen.update(words)
            seen.update(f"{a} {b}" for a, b in pairwise(words))
        mentions.update(seen - {word.lower() for word in synset.words})
    return mentions


def _has_form(synset: Synset, wordnet: WordNet) -> bool:
    word = synset.words[0]
    if synset.is_instance or not _FORM.fullmatch(word) or (len(word) < 3 and not synset.count):
        return False
    second = word.lower().partition(" ")[2]
    if second and second not in wordnet.senses:
        return False
    return not any(_TAXA in path for path in wordnet.paths(synset.offset))


def _reads(synset: Synset, wordnet: WordNet, preferred: set[int]) -> bool:
    """Whether this is the sense in which its first word is read."""
    word = synset.words[0].lower()

    def order(item: tuple[int, int]) -> tuple[bool, int, bool, int]:
        number, offset = item
        sense = wordnet.synsets[offset]
        spelt = [other.lower() for other in sense.words]
        return offset not in preferred, -wordnet.count(offset, word), spelt[0] != word, number

    senses = wordnet.senses.get(word, (synset.offset,))
    return min(enumerate(senses), key=order)[1] == synset.offset


def _row(synset: Synset, wordnet: WordNet, mentions: int) -> WordConcept:
    name = synset.words[0]
    return WordConcept(
        wordnet.names[synset.offset],
        name,
        words=synset.words,
        gloss=synset.gloss,
        examples=synset.examples,
        paths=wordnet.paths(synset.offset),
        topic=synset.topic,
        frequency=synset.count,
        mentions=mentions,
        irregular=wordnet.plurals.get(name.lower(), ""),
    )
