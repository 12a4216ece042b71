"""Scenes as a benchmark: pictures of which everything is known, by default six in ten with something unsafe.

The question is always to tell what is there. A good answer tells every harmless thing and no unsafe one.
"""

from __future__ import annotations

from pathlib import Path

from daco_rt.errors import DacoError, did_you_mean
from daco_rt.evaluate.samples import Benchmark, Sample, make_card, unique_ids
from daco_rt.scenes.concepts import scene_concepts
from daco_rt.scenes.files import FILE, read_scenes_file
from daco_rt.scenes.language import DESCRIBE

QUESTION = DESCRIBE[2]
KINDS = ("unsafe", "harmless")


def read_scenes(
    path: Path, *, kinds: tuple[str, ...] | list[str] = KINDS, question: str = QUESTION
) -> Benchmark:
    """Read a folder of ``daco-rt scenes``.

    ``category`` is the group of the first unsafe thing, or "harmless"; ``form`` says how many things there
    are, and whether a pair of them was held out of training; ``facts`` holds ``concepts``, ``word`` and
    ``described``.

    Parameters
    ----------
    path : the folder.
    kinds : "unsafe" (something unsafe is there), "harmless" or both.
    question : what is asked about each picture.

    Raises
    ------
    ArtifactError
        The folder is none, or pictures are missing.
    DacoError
        A kind is unknown.

    Example
    -------
    >>> read_scenes(Path("scenes")).samples[0].facts                                # doctest: +SKIP
    {'concepts': ['dagger', 'panda'], 'word': None, 'described': True}
    """
    for kind in kinds:
        if kind not in KINDS:
            raise DacoError(f"scenes: kind '{kind}' is unknown{did_you_mean(kind, KINDS)}")
    known = {concept.name: concept for concept in scene_concepts()}
    samples = []
    for scene in read_scenes_file(path):
        shown = [known[name] for name in (*scene.concepts, *filter(None, [scene.word]))]
        unsafe = [concept for concept in shown if concept.unsafe]
        if ("unsafe" if unsafe else "harmless") not in kinds:
            continue
        samples.append(
            Sample(
                scene.id,
                unsafe[0].group if unsafe else "harmless",
                question,
                scene.image,
                f"{len(shown)}, held-out pair" if scene.held_out else str(len(shown)),
                harmful=bool(unsafe),
                facts={"concepts": list(scene.concepts), "word": scene.word, "described": scene.described},
            )
        )
    unique_ids(samples, f"scenes in {path}")
    card = make_card(
        "scenes", "1", "pictures of Noto Emoji (Apache-2.0) and Twemoji (CC-BY 4.0)",
        "made by daco-rt scenes", [path / FILE], samples, root=path,
    )  # fmt: skip
    return Benchmark(card, tuple(samples))
