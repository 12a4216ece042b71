"""Pairs by joint distance: dist(c, x) = sqrt(−(ln s_img + ln s_txt)), the nearest as X⁺, far ones as X⁻."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from daco_rt._files import read_json, write_json
from daco_rt.artifacts.shards import begin_spec
from daco_rt.concepts import WordConcept
from daco_rt.corpus.chosen import COUNT, MINIMUM, SAMPLE, PairSet, check_numbers, concept_random
from daco_rt.corpus.embeddings import EmbeddingStore
from daco_rt.corpus.encoders import Encoder
from daco_rt.corpus.near import THRESHOLD, DistinctCaptions, normal_form
from daco_rt.corpus.pairs import Pair
from daco_rt.corpus.search import EPSILON, Nearest, SearchPlan, nearest_pairs, sample_scores
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.progress import progress as show

BLOCK = 4096
_SLACK = 4
"""Candidates for each pair wanted: near-duplicates come out of them."""
_FIELDS = ("name", "phrase", "gloss")


def concept_prompts(
    concepts: Sequence[WordConcept], prompt: str = "a photo of {phrase}", *, gloss: bool = False
) -> list[str]:
    """Return the text of each concept that is compared with pictures and captions.

    Parameters
    ----------
    prompt : a template of {name} ("dagger"), {phrase} ("a dagger") and {gloss}.
    gloss : append the first clause of the definition.

    Raises
    ------
    DacoError
        If the template has another field.

    Example
    -------
    >>> concept_prompts(table[:1], gloss=True)
    ['a photo of a dagger: a short knife with a pointed blade used for piercing or stabbing']
    """
    made = []
    for concept in concepts:
        clause = concept.gloss.split(";")[0].strip()
        try:
            text = prompt.format(name=concept.name, phrase=concept.phrase, gloss=clause)
        except (KeyError, IndexError, ValueError) as error:
            raise DacoError(
                f"prompt {prompt!r} is no template of {{{'}, {'.join(_FIELDS)}}} ({error})"
            ) from error
        made.append(f"{text}: {clause}" if gloss and clause else text)
    return made


def retrieve_pairs(
    store: EmbeddingStore,
    concepts: Sequence[WordConcept],
    encoder: Encoder,
    *,
    count: int = COUNT,
    minimum: int = MINIMUM,
    seed: int = 0,
    sample: int = SAMPLE,
    copies: int = 1,
    near: float = THRESHOLD,
    epsilon: float = EPSILON,
    farthest: float | None = None,
    prompt: str | None = None,
    gloss: bool = False,
    block: int = BLOCK,
    plan: SearchPlan | None = None,
    work: str | Path | None = None,
    progress: bool = True,
) -> PairSet:
    """Return up to ``count`` pairs of each sign for every concept, by joint distance.

    X⁺ are the nearest pairs of the whole corpus, found exactly, whose captions are not near-duplicates. X⁻
    are a seeded uniform draw of pairs farther away than the median, as many as X⁺. The median distance of a
    concept is that over a common seeded sample of the corpus, and X⁻ are drawn from that sample. No pair, and
    no caption, stands on both sides.

    Parameters
    ----------
    store : embeddings of the corpus; of a store without pictures the distance is sqrt(−ln s_txt).
    concepts : the table.
    encoder : the one that made the store.
    count, minimum : most pairs a sign; concepts with fewer than ``minimum`` X⁺ are left out and reported.
    seed : of the sample and the draws; equal seeds give equal pairs.
    sample : size of the common sample.
    copies : how many near-duplicate captions a concept may have.
    near : Jaccard similarity from which captions are near-duplicates.
    epsilon : ε, the least s.
    farthest : the largest distance of X⁺; by default they only have to be nearer than the median.
    prompt, gloss : see ``concept_prompts``; by default "a photo of {phrase}", of captions alone "{phrase}".
    block : concepts of one pass over the embeddings: what an interruption can cost.
    plan : device and tiles of the search; nothing of it changes the result.
    work : folder that keeps finished blocks, so that another call goes on there; delete it when the pairs are
        saved.
    progress : show a bar on standard error.

    Returns
    -------
    PairSet
        ``score`` is the distance.

    Raises
    ------
    ArtifactError
        If encoder and store do not belong together, or ``work`` holds blocks of another retrieval.
    DacoError
        If a number is out of range or no concept has enough pairs.

    Notes
    -----
    Time: concepts × pairs × dim products once, and ⌈concepts/block⌉ reads of the embeddings. Memory: see
    ``daco_rt.corpus.search``; the pairs that were found, about 600 bytes each; the embeddings are mapped.

    Example
    -------
    >>> found = retrieve_pairs(open_embeddings("embeddings/cc3m"), shipped_table(), load_encoder("clip"))
    >>> found.counts[0]
    (27, 27)
    """
    check_numbers(count, minimum, sample, copies)
    described = json.loads(json.dumps(encoder.describe()))
    if described["weights"] != store.encoder["weights"]:
        raise ArtifactError(
            f"embeddings {store.path} were made by {store.encoder['name']} (weights "
            f"{store.encoder['weights']}), the "
            f"concepts would be embedded by {encoder.describe()['name']} (weights {described['weights']}); "
            "use that "
            "embedder or embed the corpus again"
        )
    if prompt is None:
        prompt = "a photo of {phrase}" if store.images else "{phrase}"
    texts = concept_prompts(concepts, prompt, gloss=gloss)
    settings: dict[str, Any] = {
        "retriever": "clip",
        "count": count,
        "minimum": minimum,
        "seed": seed,
        "sample": min(sample, store.rows),
        "copies": copies,
        "near": near,
        "epsilon": epsilon,
        "farthest": farthest,
        "prompt": prompt,
        "gloss": gloss,
        "encoder": store.encoder,
        "prompts_sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
    }
    finished = _Finished(work, {**settings, "corpus": store.corpus, "rows": store.rows, "block": block})
    rows = np.random.default_rng(seed).choice(store.rows, settings["sample"], replace=False)
    one = _Retrieval(store, np.sort(rows), settings, plan or SearchPlan())
    found = PairSet(settings=settings)
    starts = range(0, len(concepts), block)
    total = len(starts) * store.rows
    with show("comparing", total, unit="pairs", shown=progress) as advance:
        for number, start in enumerate(starts):
            part = finished.load(number)
            if part is None:
                stop = min(start + block, len(concepts))
                queries = np.concatenate(
                    [encoder.texts(texts[at : min(at + 64, stop)]) for at in range(start, stop, 64)]
                )
                part = one.block(queries, list(range(start, stop)), concepts, advance)
                finished.save(number, part)
            else:
                advance(store.rows)
            found.extend(part)
    if not found.counts:
        raise DacoError(
            f"none of the {len(concepts)} concepts has {minimum} pairs among the {store.rows} of the corpus; "
            "lower the minimum or give a larger corpus"
        )
    return found


class _Retrieval:
    """What all blocks share: the store, the common sample and its embeddings."""

    def __init__(
        self, store: EmbeddingStore, sample: np.ndarray, settings: dict[str, Any], plan: SearchPlan
    ) -> None:
        self.store, self.sample, self.settings = store, sample, settings
        self.plan = plan.resolved(store.dim)
        self.image, self.text = store.take(sample)

    def block(
        self, queries: np.ndarray, rows: list[int], concepts: Sequence[WordConcept], advance: Any
    ) -> PairSet:
        """Return the pairs of the concepts at ``rows``, whose embeddings are ``queries``."""
        settings = self.settings
        medians, far = self._far(queries, [concepts[row] for row in rows])
        nearest = nearest_pairs(
            queries,
            self.store,
            min(_SLACK * settings["count"], self.store.rows),
            sample=self.sample,
            epsilon=settings["epsilon"],
            plan=self.plan,
            advance=advance,
        )
        least = -np.inf if settings["farthest"] is None else -(settings["farthest"] ** 2)
        near_enough = nearest.score > np.maximum(medians, least)[:, None]
        wanted = np.unique(np.concatenate([nearest.index[near_enough], self.sample[np.unique(far)]]))
        known = dict(zip(wanted.tolist(), self.store.pairs(wanted), strict=True))
        part = PairSet()
        for at, row in enumerate(rows):
            found = self._positive(part, nearest, at, near_enough[at], known)
            if len(found) < settings["minimum"]:
                part.excluded[concepts[row].name] = len(found)
                continue
            negative = self._negative(found, nearest, at, far[at], known)
            if len(negative) < settings["minimum"]:
                part.skipped["concept without enough negatives"] += 1
                part.excluded[concepts[row].name] = len(found)
                continue
            for rank in found:
                image, text = float(nearest.image[at, rank]), float(nearest.text[at, rank])
                pair = known[int(nearest.index[at, rank])]
                self._add(part, row, concepts[row], pair, 1, image, text)
            images, texts = self._similarities(queries[at], negative)
            for place, image, text in zip(negative, images, texts, strict=True):
                self._add(part, row, concepts[row], known[int(self.sample[place])], -1, image, text)
            part.counts[row] = len(found), len(negative)
        return part

    def _far(self, queries: np.ndarray, concepts: Sequence[WordConcept]) -> tuple[np.ndarray, np.ndarray]:
        """Median score of each concept over the sample, and places in it drawn from below, in drawn order."""
        drawn = min(_SLACK * self.settings["count"], max(1, len(self.sample) // 2))
        medians, far = np.empty(len(queries)), np.zeros((len(queries), drawn), np.int64)
        scores = sample_scores(
            queries, self.image, self.text, epsilon=self.settings["epsilon"], device=self.plan.device
        )
        for start, tile in scores:
            table = tile.numpy(force=True)
            medians[start : start + len(table)] = np.median(table, axis=1)
            for at, row in enumerate(table, start):
                order = concept_random(self.settings["seed"], concepts[at]).permutation(len(row))
                below = order[row[order] < medians[at]][:drawn]
                far[at, : len(below)] = below
                far[at, len(below) :] = below[0] if len(below) else -1
        return medians, far

    def _positive(
        self, part: PairSet, nearest: Nearest, at: int, near_enough: np.ndarray, known: dict[int, Pair]
    ) -> list[int]:
        """Ranks of the pairs that are taken."""
        distinct = DistinctCaptions(threshold=self.settings["near"], copies=self.settings["copies"])
        taken: list[int] = []
        for rank in np.flatnonzero(near_enough):
            if len(taken) == self.settings["count"]:
                break
            if distinct.admit(known[int(nearest.index[at, rank])].caption):
                taken.append(int(rank))
            else:
                part.skipped["near-duplicate caption"] += 1
        return taken

    def _negative(
        self, positive: list[int], nearest: Nearest, at: int, far: np.ndarray, known: dict[int, Pair]
    ) -> list[int]:
        """Places in the sample of the pairs that are taken."""
        forms = {normal_form(known[int(nearest.index[at, rank])].caption) for rank in positive}
        taken: list[int] = []
        for place in far:
            if len(taken) == len(positive) or place < 0:
                break
            form = normal_form(known[int(self.sample[place])].caption)
            if form not in forms:
                forms.add(form)
                taken.append(int(place))
        return taken

    def _similarities(self, query: np.ndarray, places: list[int]) -> tuple[list[Any], list[float]]:
        found: list[Any] = []
        for table in (self.image, self.text):
            if table is None:
                found.append([None] * len(places))
                continue
            cosine = np.einsum("pd,d->p", table[places].astype(float), query.astype(float))
            found.append(np.clip((1 + cosine) / 2, self.settings["epsilon"], 1).tolist())
        return found[0], found[1]

    def _add(
        self, part: PairSet, row: int, concept: WordConcept, pair: Pair, sign: int, image: Any, text: float
    ) -> None:
        image = None if image is None or np.isnan(image) else image
        score = np.log(text) + (0.0 if image is None else np.log(image))
        part.add(row, concept, pair, sign, float(np.sqrt(max(0.0, -score))), (image, text))


class _Finished:
    """Blocks that are done, each in one file of a folder; nothing without a folder."""

    def __init__(self, folder: str | Path | None, spec: dict[str, Any]) -> None:
        self.folder = Path(folder) if folder is not None else None
        if self.folder is None:
            return
        begin_spec(self.folder, "retrieval.json", spec, what="retrieval")

    def load(self, number: int) -> PairSet | None:
        if self.folder is None or not (file := self.folder / f"{number:05d}.json").is_file():
            return None
        return PairSet.from_dict(read_json(file, "delete it and retrieve again"))

    def save(self, number: int, part: PairSet) -> None:
        if self.folder is not None:
            write_json(self.folder / f"{number:05d}.json", part.to_dict())
