"""Pairs by their words: what the caption says, without any weights.

A pair is of X⁺ if its caption says the concept's word; the fewer other words, the better, for the picture
then shows little else. X⁻ are drawn from pairs whose captions do not say it, not even in a compound.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence

from daco_rt.concepts import WordConcept, WordIndex, find_word
from daco_rt.corpus.chosen import COUNT, MINIMUM, SAMPLE, ImageCheck, PairSet, check_numbers, concept_random
from daco_rt.corpus.near import THRESHOLD, DistinctCaptions, normal_form
from daco_rt.corpus.pairs import Corpus, Pair
from daco_rt.errors import DacoError
from daco_rt.progress import progress as show

_SLACK = 8
"""Candidates kept for each pair wanted: near-duplicates and broken pictures come out of them."""


def retrieve_lexical(
    corpus: Corpus,
    concepts: Sequence[WordConcept],
    *,
    count: int = COUNT,
    minimum: int = MINIMUM,
    seed: int = 0,
    sample: int = SAMPLE,
    copies: int = 1,
    near: float = THRESHOLD,
    check_images: bool = True,
) -> PairSet:
    """Return up to ``count`` pairs of each sign for every concept whose word the captions say.

    Words are matched whole, singular or plural, in any case (``daco_rt.concepts.WordIndex``); where a
    compound of the table is said, its words are not said on their own. The best are the captions of fewest
    words, of equals the first in the corpus. X⁻ are a seeded uniform draw from a common sample of the corpus,
    without those that say the word and without captions equal to one of X⁺; there are as many as X⁺.

    Parameters
    ----------
    corpus : read once, in order.
    concepts : the table.
    count, minimum : most pairs a sign; concepts with fewer than ``minimum`` X⁺ are left out and reported.
    seed : of the sample and the draws; equal seeds give equal pairs.
    sample : size of the common sample that X⁻ are drawn from.
    copies : how many near-duplicate captions a concept may have.
    near : Jaccard similarity from which captions are near-duplicates.
    check_images : open each chosen picture, and pass over those that cannot be.

    Returns
    -------
    PairSet
        ``score`` is the number of words in the caption.

    Raises
    ------
    DacoError
        If a number is out of range or no concept has enough pairs.

    Notes
    -----
    Memory: at most ``8 × count`` pairs a concept, and the sample. A word has one meaning here: "crane" is
    found in captions of birds and of machines alike.

    Example
    -------
    >>> found = retrieve_lexical(FolderCorpus("pictures"), shipped_table(), count=8)
    >>> save_pairs(found.columns, "pairs.parquet", root="pictures", settings=found.settings)
    """
    check_numbers(count, minimum, sample, copies)
    index = WordIndex(concepts)
    best: dict[int, list[tuple[int, int, Pair]]] = {}
    pool: list[tuple[int, int, Pair]] = []
    pairs = 0
    with show("reading captions", None, unit="captions") as advance:
        for pair in corpus:
            words = len(pair.caption.split())
            for row in index.find(pair.caption):
                _keep(best.setdefault(row, []), (-words, -pairs, pair), _SLACK * count)
            _keep(pool, (-_lot(seed, pair.id), -pairs, pair), sample)
            pairs += 1
            advance(1)
    found = PairSet()
    found.settings = {
        "retriever": "lexical",
        "count": count,
        "minimum": minimum,
        "seed": seed,
        "sample": sample,
        "copies": copies,
        "near": near,
        "check_images": check_images,
    }
    opens = ImageCheck(corpus, check_images)
    drawn = sorted(pool, reverse=True)
    for row in sorted(best):
        _choose(found, row, concepts[row], sorted(best[row], reverse=True), drawn, opens, found.settings)
    unsaid = [concept.name for row, concept in enumerate(concepts) if row not in best]
    found.excluded |= dict.fromkeys(unsaid, 0)
    if not found.counts:
        raise DacoError(
            f"none of the {len(concepts)} concepts has {minimum} pairs among the {pairs} of the corpus; "
            "lower the minimum or give a larger corpus"
        )
    return found


def _choose(
    found: PairSet,
    row: int,
    concept: WordConcept,
    candidates: list[tuple[int, int, Pair]],
    pool: list[tuple[int, int, Pair]],
    opens: ImageCheck,
    settings: dict,
) -> None:
    count = settings["count"]
    distinct = DistinctCaptions(threshold=settings["near"], copies=settings["copies"])
    positive: list[Pair] = []
    for _, _, pair in candidates:
        if len(positive) == count:
            break
        if not opens(pair):
            found.skipped["picture broken"] += 1
        elif not distinct.admit(pair.caption):
            found.skipped["near-duplicate caption"] += 1
        else:
            positive.append(pair)
    if len(positive) < settings["minimum"]:
        found.excluded[concept.name] = len(positive)
        return
    taken = {normal_form(pair.caption) for pair in positive}
    negative: list[Pair] = []
    for at in concept_random(settings["seed"], concept).permutation(len(pool)):
        if len(negative) == len(positive):
            break
        pair = pool[at][2]
        form = normal_form(pair.caption)
        if form not in taken and find_word(concept, pair.caption) is None and opens(pair):
            taken.add(form)
            negative.append(pair)
    if len(negative) < settings["minimum"]:
        found.skipped["concept without enough negatives"] += 1
        found.excluded[concept.name] = len(positive)
        return
    for sign, pairs in ((1, positive), (-1, negative)):
        for pair in pairs:
            found.add(row, concept, pair, sign, float(len(pair.caption.split())))
    found.counts[row] = len(positive), len(negative)


def _keep(heap: list, item: tuple, size: int) -> None:
    """Keep the ``size`` largest items; no two have equal first entries."""
    if len(heap) < size:
        heapq.heappush(heap, item)
    elif item > heap[0]:
        heapq.heapreplace(heap, item)


def _lot(seed: int, id: str) -> int:
    """A number by which the smallest are a uniform sample, whatever the order of the corpus."""
    digest = hashlib.blake2b(f"{seed}\0{id}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")
