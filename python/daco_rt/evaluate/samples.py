"""What every benchmark becomes: samples with a category, and a card that says which data they are.

A split is drawn before anything is tuned: whether a sample is for development or for the test depends on its
question and a seed alone, so it stays where it is when other samples come or go. Variants of one question
(the same text as picture, as typography, …) fall on one side together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from daco_rt._files import sha256_file
from daco_rt.errors import ArtifactError, DacoError

Part = Literal["dev", "test", "all"]
PARTS: tuple[Part, ...] = ("dev", "test", "all")


@dataclass(frozen=True)
class Sample:
    """One question of a benchmark.

    Attributes
    ----------
    id : str
        Unique within the benchmark.
    category : str
        The benchmark's own heading: scenario, policy, semantic category.
    prompt : str
        What the model is asked.
    image : Path or None
        A picture that goes before the text.
    form : str
        How the question is put: "SD", "figstep", "text", …
    reference : str
        The plain wish behind the question, for judges; the prompt where the benchmark has none.
    group : str
        Samples of one group are variants of one question and share a side of the split.
    harmful : bool
        Whether a good answer refuses or turns away. False for questions that deserve an answer.
    facts : mapping
        What is known to be true of the question, for judges that compare with it, such as the objects of a
        picture. Anything that JSON can hold; the keys are between a benchmark and its judge.
    """

    id: str
    category: str
    prompt: str
    image: Path | None = None
    form: str = "text"
    reference: str = ""
    group: str = ""
    harmful: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def question(self) -> str:
        """What variants of one question share: ``group``, or the id. Answers to it are not independent."""
        return self.group or self.id

    @property
    def wish(self) -> str:
        """The plain wish: ``reference``, or the prompt."""
        return self.reference or self.prompt


@dataclass(frozen=True)
class Card:
    """Which data a benchmark is made of.

    ``sha256`` covers the question files (pictures are covered by their count), ``licence`` and ``source`` are
    what the publishers state.
    """

    name: str
    version: str
    licence: str
    source: str
    sha256: str
    counts: dict[str, int] = field(default_factory=dict)
    missing: int = 0
    """Samples left out because a file is not there, under ``allow_missing``."""

    def to_json(self) -> dict[str, Any]:
        """Return the card ready for ``json.dumps``."""
        return dict(vars(self))


@dataclass(frozen=True)
class Benchmark:
    """A card and its samples, in a fixed order."""

    card: Card
    samples: tuple[Sample, ...]

    def part(
        self, part: Part, *, dev: float = 0.3, seed: int = 0, limit: int | None = None, skip: int = 0
    ) -> Benchmark:
        """Return one side of the split, or some of its samples in an order drawn by the seed.

        Parameters
        ----------
        part : "dev", "test" or "all".
        dev : share of the groups that are for development.
        seed : of the split and of the order in which ``limit`` takes samples.
        limit : most samples, spread over the categories.
        skip : samples of that order to pass over: those that a limit of this number takes elsewhere.

        Raises
        ------
        DacoError
            The part is unknown, the share is not within 0 and 1, or nothing is left.

        Example
        -------
        >>> load_benchmark("benign").part("test", limit=20).samples[0].category     # doctest: +SKIP
        'kitchen'
        """
        if part not in PARTS:
            raise DacoError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
        if not 0 <= dev <= 1:
            raise DacoError(f"the share for development must be within 0 and 1, got {dev}")
        chosen = [s for s in self.samples if part == "all" or (_draw(s, seed) < dev) == (part == "dev")]
        if limit is not None and limit < 1:
            raise DacoError(f"limit must be 1 or more, got {limit}")
        if skip < 0:
            raise DacoError(f"skip must be 0 or more, got {skip}")
        held = len(chosen)
        if limit is not None or skip:
            chosen = _spread(chosen, seed, skip, limit)
        if not chosen:
            less = f" after the first {skip}" if held else ""
            raise DacoError(
                f"benchmark {self.card.name}: part '{part}' with a share of {dev:g} for development holds "
                f"none of the {len(self.samples)} samples{less}; choose another part or share"
                + (", or skip fewer" if held else "")
            )
        return Benchmark(self.card, tuple(chosen))


def make_card(
    name: str, version: str, licence: str, source: str, files: Iterable[Path], samples: Sequence[Sample],
    *, root: Path, missing: int = 0,
) -> Card:  # fmt: skip
    """Return the card of samples read from these question files, hashed in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(root).as_posix()}\0{sha256_file(file)}\n".encode())
    counts: dict[str, int] = {}
    for sample in samples:
        counts[sample.category] = counts.get(sample.category, 0) + 1
    return Card(name, version, licence, source, digest.hexdigest(), counts, missing)


def keep_present(
    samples: Sequence[Sample], name: str, *, allow_missing: bool
) -> tuple[tuple[Sample, ...], int]:
    """Return the samples whose picture is there, and how many are not.

    Raises
    ------
    ArtifactError
        Pictures are missing and ``allow_missing`` is off; the sentence counts them and names the first.
    """
    present = _existing(sample.image for sample in samples if sample.image is not None)
    gone = [sample.image for sample in samples if sample.image is not None and sample.image not in present]
    if gone and not allow_missing:
        first = ", ".join(map(str, gone[:3])) + (", …" if len(gone) > 3 else "")
        raise ArtifactError(
            f"{name}: {len(gone)} of {len(samples)} samples have no picture on disk ({first}); complete the "
            "folder, or run the rest with allow_missing: true"
        )
    kept = tuple(s for s in samples if s.image is None or s.image in present)
    if not kept:
        raise ArtifactError(f"{name}: none of the {len(samples)} samples has its picture; check the folder")
    return kept, len(gone)


def unique_ids(samples: Sequence[Sample], name: str) -> None:
    """Raise ``ArtifactError`` if an id comes twice or a prompt is empty."""
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise ArtifactError(f"{name}: id '{sample.id}' comes twice; the files are mixed up")
        if not sample.prompt.strip():
            raise ArtifactError(f"{name}: sample '{sample.id}' has an empty question; the files are damaged")
        seen.add(sample.id)


Reader = Callable[..., Benchmark]


def _existing(paths: Iterable[Path]) -> set[Path]:
    # One listing a folder: a stat for each of 28,000 pictures on a network disk takes minutes.
    listed: dict[Path, set[str]] = {}
    found = set()
    for path in paths:
        if path.parent not in listed:
            folder = path.parent
            listed[folder] = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
        if path.name in listed[path.parent]:
            found.add(path)
    return found


def _draw(sample: Sample, seed: int) -> float:
    """A number in [0, 1) that depends on the question and the seed alone."""
    key = f"{seed}\0{sample.question}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64


def _spread(samples: list[Sample], seed: int, skip: int, limit: int | None) -> list[Sample]:
    """``limit`` samples after the first ``skip`` when categories take turns, in the order of the file."""
    queues: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda s: hashlib.sha256(f"{seed}\1{s.id}".encode()).digest()):
        queues.setdefault(sample.category, []).append(sample)
    turns = [
        (turn, number, sample)
        for number, category in enumerate(sorted(queues))
        for turn, sample in enumerate(queues[category])
    ]
    drawn = sorted(turns, key=lambda item: item[:2])[skip:]
    taken = {sample.id for _, _, sample in drawn[:limit]}
    return [sample for sample in samples if sample.id in taken]
