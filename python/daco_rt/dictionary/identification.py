"""Concept identification in unseen texts: is the atom nearest to a reading that of the text's concept?

Each held-out text is read at its word (or, without the word, at its last token), centred, and compared with
all N atoms of the block; the rank of its own concept is what counts. This is the first step of pursuit, so it
says at which blocks a dictionary can tell concepts apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from daco_rt.artifacts import Concept, ConceptDictionary
from daco_rt.concepts.held_out import WITHOUT_WORD
from daco_rt.concepts.texts import TextStimulus
from daco_rt.dictionary.diagnostics import unit_rows
from daco_rt.dictionary.harvest import NORM_LIMIT
from daco_rt.dictionary.positions import Tokens, find_positions
from daco_rt.errors import DacoError
from daco_rt.models.residual import read_batches
from daco_rt.progress import progress as show

READING_CENTRES = ("ordinary", "readings")
CHUNK = 1024


@dataclass(frozen=True)
class Identification:
    """Ranks of the right concept.

    What is subtracted from a reading matters as much as the atoms, so every reading is ranked twice: centred
    on ``ordinary`` text, as the operator does it, and on the ``readings`` of its own kind of text, which also
    takes out what all texts of that kind share (their last token, their question mark).

    Attributes
    ----------
    size : int
        N, the number of atoms each reading was compared with; by chance top-1 is 1 / N.
    concepts : tuple of Concept
        The right concept of each text, [n].
    kinds : tuple of str
        The kind of each text, [n].
    ranks : dict of str to dict of int to numpy.ndarray
        "ordinary" or "readings" → block → [n] int32, 1 for the nearest atom; 0 where the reading was rejected
        for its norm or stood at position 0.
    skipped : dict of str to int
        Reason → number of texts that were not read.
    """

    size: int
    concepts: tuple[Concept, ...]
    kinds: tuple[str, ...]
    ranks: dict[str, dict[int, np.ndarray]] = field(repr=False)
    skipped: dict[str, int]

    def top(
        self, block: int, k: int = 1, *, kinds: Sequence[str] | None = None, centre: str = "ordinary"
    ) -> float:
        """Return the share of readings whose concept is among the k nearest atoms; NaN without readings."""
        of_kinds = np.array([kinds is None or kind in kinds for kind in self.kinds], bool)
        ranks = self.ranks[centre][block][of_kinds]
        ranks = ranks[ranks > 0]
        return float((ranks <= k).mean()) if ranks.size else float("nan")

    def best_block(self, *, kinds: Sequence[str] | None = None, centre: str = "ordinary") -> int:
        """Return the block of the best top-1; ties go to the earlier block."""
        blocks = sorted(self.ranks[centre])
        shares = [self.top(block, kinds=kinds, centre=centre) for block in blocks]
        return blocks[int(np.argmax(np.nan_to_num(shares, nan=-1.0)))]

    def to_dict(self) -> dict[str, Any]:
        """Return top-1 and top-5 by centre and block as JSON: by kind of text, and by group at the word."""
        groups = np.array([concept.group or concept.label for concept in self.concepts], dtype=object)
        kinds = np.array(self.kinds, dtype=object)
        said = ~np.isin(kinds, WITHOUT_WORD)
        present = sorted(set(groups[said]))
        centres = {
            centre: {
                str(block): {
                    "by_kind": {kind: _scores(ranks[kinds == kind]) for kind in sorted(set(kinds))},
                    "by_group": {group: _scores(ranks[said & (groups == group)]) for group in present},
                }
                for block, ranks in sorted(by_block.items())
            }
            for centre, by_block in self.ranks.items()
        }
        any_centre = next(iter(self.ranks.values()))
        rejected = {str(block): int((ranks == 0).sum()) for block, ranks in sorted(any_centre.items())}
        return {"atoms": self.size, "skipped": self.skipped, "rejected": rejected, "centres": centres}


def identify(
    dictionary: ConceptDictionary,
    model: torch.nn.Module,
    tokenizer: Any,
    stimuli: Sequence[TextStimulus],
    *,
    batch_tokens: int = 2048,
    progress: bool = True,
) -> Identification:
    """Rank the right concept for every held-out text at every block of a dictionary.

    Memory: the atoms of one block, 1,024 × N cosines, and the readings of 1,024 texts at all blocks. Texts
    are matched with atoms by name. The mean reading of a kind of text is that of its texts among the first
    1,024, which are drawn from all.

    Parameters
    ----------
    dictionary : the atoms.
    model : the model they were measured on, a Hugging Face causal or image-text model.
    tokenizer : its own.
    stimuli : held-out texts; each is read at the last token of its span.
    batch_tokens : tokens in one forward pass, padding included.
    progress : show a progress bar on standard error.

    Raises
    ------
    DacoError
        If no text belongs to a concept of the dictionary, or a block does not exist.

    Example
    -------
    >>> found = identify(dictionary, model, tokenizer, unseen)
    >>> found.top(16)
    0.97
    """
    kept, owners, skipped = match_concepts(dictionary, stimuli)
    # The first texts must hold every kind in its share, whatever the order they came in.
    order = np.random.default_rng(0).permutation(len(kept))
    shuffled = [kept[i] for i in order]
    silent = contextlib.nullcontext(lambda _: None)
    with show("identifying concepts", len(kept), unit="texts") if progress else silent as advance:
        readings = read_words(model, tokenizer, shuffled, dictionary.blocks, batch_tokens=batch_tokens)
        found = rank_readings(dictionary, shuffled, owners[order], readings, skipped=skipped, advance=advance)
    back = np.argsort(order)
    return replace(
        found,
        concepts=tuple(found.concepts[i] for i in back),
        kinds=tuple(found.kinds[i] for i in back),
        ranks={
            centre: {block: ranks[back] for block, ranks in by_block.items()}
            for centre, by_block in found.ranks.items()
        },
    )


def rank_readings(
    dictionary: ConceptDictionary,
    stimuli: Sequence[TextStimulus],
    owners: np.ndarray,
    readings: Iterable[tuple[int, Mapping[int, np.ndarray], np.ndarray]],
    *,
    skipped: Mapping[str, int] | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Identification:
    """Rank the right concepts of readings that are there, or come, in the order of their texts.

    Parameters
    ----------
    dictionary : the atoms.
    stimuli : the texts that were read, [n], of all kinds mixed.
    owners : [n], the atom of each text's concept.
    readings : chunks as ``read_words`` yields them, at all of the dictionary's blocks.
    skipped : reason → texts that were left out before.
    advance : called with the number of texts after each chunk.

    Example
    -------
    >>> chunks = list(read_words(model, tokenizer, unseen, dictionary.blocks))
    >>> rank_readings(dictionary, unseen, owners, chunks).top(16)
    0.97
    """
    limits = {block: NORM_LIMIT * dictionary.median_norm[block] for block in dictionary.blocks}
    ranks = {
        centre: {block: np.zeros(len(stimuli), np.int32) for block in dictionary.blocks}
        for centre in READING_CENTRES
    }
    kinds = np.array([stimulus.kind for stimulus in stimuli], dtype=object)
    middles: dict[int, dict[str, np.ndarray]] = {}
    for start, rows, good in readings:
        part = slice(start, start + len(good))
        for block in dictionary.blocks:
            read = rows[block]
            usable = good & (np.linalg.norm(read, axis=1) <= limits[block])
            known = middles.setdefault(block, {})
            for kind in set(kinds[part]) - known.keys():
                if (of_kind := usable & (kinds[part] == kind)).any():
                    known[kind] = read[of_kind].mean(axis=0)
            ordinary = dictionary.mean(block)
            own = np.stack([known.get(kind, ordinary) for kind in kinds[part]])
            atoms = dictionary.atoms(block)
            for centre, middle in (("ordinary", ordinary), ("readings", own)):
                found = rank_rows(read - middle, owners[part], atoms)
                ranks[centre][block][part] = np.where(usable, found, 0)
        advance(len(good))
    return Identification(
        dictionary.size,
        tuple(dictionary.concepts[i] for i in owners),
        tuple(kinds),
        ranks,
        dict(skipped or {}),
    )


def match_concepts(
    dictionary: ConceptDictionary, stimuli: Sequence[TextStimulus]
) -> tuple[list[TextStimulus], np.ndarray, dict[str, int]]:
    """Return the texts whose concept is an atom, the atoms' rows [n], and reason → texts left out.

    Raises
    ------
    DacoError
        If no text is left.

    Example
    -------
    >>> kept, owners, skipped = match_concepts(dictionary, unseen)
    """
    by_name: dict[str, list[int]] = {}
    for concept in dictionary.concepts:
        by_name.setdefault(concept.name, []).append(concept.index)
    kept, owners, skipped = [], [], {"concept is no atom": 0, "name of several atoms": 0}
    for stimulus in stimuli:
        found = by_name.get(stimulus.name, [])
        if len(found) == 1:
            kept.append(stimulus)
            owners.append(found[0])
        else:
            skipped["name of several atoms" if found else "concept is no atom"] += 1
    if not kept:
        raise DacoError(
            f"none of the {len(stimuli)} held-out texts is about a concept of {dictionary.path}; "
            "make them from the table that was harvested"
        )
    return kept, np.array(owners), {reason: count for reason, count in skipped.items() if count}


def read_words(
    model: torch.nn.Module,
    tokenizer: Any,
    stimuli: Sequence[TextStimulus],
    blocks: Sequence[int],
    *,
    batch_tokens: int = 2048,
    chunk: int = CHUNK,
) -> Iterator[tuple[int, dict[int, np.ndarray], np.ndarray]]:
    """Read texts at the last token of their span, in order, a chunk at a time.

    Yields
    ------
    (start, rows, good)
        Number of the chunk's first text; block → [n, d] fp32; [n] bool, False where the span's last token is
        position 0, which is never read (its row is zero).

    Example
    -------
    >>> for start, rows, good in read_words(model, tokenizer, unseen, [16]):
    ...     print(start, rows[16].shape)
    """
    rest = iter(stimuli)
    start = 0
    while part := list(islice(rest, chunk)):
        encoded = tokenizer(
            [stimulus.text for stimulus in part], add_special_tokens=False, return_offsets_mapping=True
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        found = [
            find_positions("word", Tokens(ids[i], offsets[i], (s.start, s.end)))[0]
            for i, s in enumerate(part)
        ]
        rows: dict[int, np.ndarray] = {}
        for batch, streams in read_batches(model, ids, blocks, batch_tokens=batch_tokens):
            places = [(row, i, found[i][0]) for row, i in enumerate(batch) if found[i]]
            at, which, tokens = ([place[k] for place in places] for k in range(3))
            for block, stream in streams.items():
                if block not in rows:
                    rows[block] = np.zeros((len(part), stream.shape[-1]), np.float32)
                rows[block][which] = stream[at, tokens].float().cpu().numpy()
        yield start, rows, np.array([bool(position) for position in found])
        start += len(part)


def rank_rows(rows: np.ndarray, owners: np.ndarray, atoms: np.ndarray) -> np.ndarray:
    """Return the rank [n] of each row's own atom among all atoms by cosine, 1 for the nearest.

    Parameters
    ----------
    rows : [n, d] centred readings.
    owners : [n], the right atom of each.
    atoms : [N, d]; rows need not have unit norm. An atom that ties with the right one counts as nearer.

    Example
    -------
    >>> rank_rows(np.eye(3)[:1], np.array([0]), np.eye(3))
    array([1])
    """
    cosines = rows.astype(np.float32) @ unit_rows(atoms).T
    own = cosines[np.arange(len(rows)), owners]
    return (cosines >= own[:, None]).sum(axis=1)


def _scores(ranks: np.ndarray) -> dict[str, Any]:
    read = ranks[ranks > 0]
    if not read.size:
        return {"texts": 0, "top1": None, "top5": None}
    return {
        "texts": int(read.size),
        "top1": round(float((read <= 1).mean()), 4),
        "top5": round(float((read <= 5).mean()), 4),
    }
