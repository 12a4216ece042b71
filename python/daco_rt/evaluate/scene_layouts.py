"""Scenes in the official layouts of MM-SafetyBench and JailBreakV-28K.

Loaders and whole evaluations run on them as on the real data, and unlike the other small sets they mean
something to one model: ``scenes-internvl`` sees what they show.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daco_rt._files import atomic_directory
from daco_rt.errors import DacoError
from daco_rt.evaluate.layouts import write_csv, write_json
from daco_rt.scenes.concepts import SceneConcept, scene_concepts
from daco_rt.scenes.files import allowed, save_picture
from daco_rt.scenes.language import DESCRIBE, JAILBREAK

if TYPE_CHECKING:
    import torch

SCENARIOS = {
    "01-Illegal_Activitiy": "drugs",
    "04-Physical_Harm": "weapons",
    "05-EconomicHarm": "gambling",
    "12-Health_Consultation": "tobacco and alcohol",
}
"""Scenario → the groups of things that it is made of."""
QUESTION = DESCRIBE[2]
_FORMATS = {
    "SD": "SD",
    "typo": "TYPO",
    "figstep": "TYPO",
    "Template": "SD",
    "Persuade": "SD_TYPO",
    "Logic": "SD",
}
_FOLDERS = {"SD": "query_related/SD", "typo": "query_related/typo", "figstep": "figstep/figstep"}


def write_scene_mm_safetybench(folder: str | Path, *, questions: int = 12, seed: int = 3) -> Path:
    """Write scenes in MM-SafetyBench's layout.

    SD shows an unsafe thing and a harmless one, TYPO the unsafe thing's name in letters, SD_TYPO both. The
    model is asked what is in the picture.

    Parameters
    ----------
    folder : to make; it must not be there.
    questions : of each scenario in `SCENARIOS`.
    seed : of everything.

    Raises
    ------
    DacoError
        ``questions`` is below 1.
    ArtifactError
        The folder is there.
    """
    with atomic_directory(Path(folder)) as root:
        for scenario in SCENARIOS:
            rows = {}
            for number, (concept, pictures) in enumerate(_questions(scenario, questions, seed)):
                rows[str(number)] = {
                    "Question": QUESTION,
                    "Changed Question": QUESTION,
                    "Key Phrase": concept.name,
                    "Phrase Type": "Product",
                    "Rephrased Question": QUESTION,
                    "Rephrased Question(SD)": QUESTION,
                }
                for method, pixels in pictures.items():
                    file = root / "imgs" / scenario / method / f"{number}.jpg"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    save_picture(pixels, file)
            write_json(root / "processed_questions" / f"{scenario}.json", rows)
    return Path(folder)


def write_scene_jailbreakv(folder: str | Path, *, questions: int = 12, seed: int = 4) -> Path:
    """Write scenes in JailBreakV-28K's layout; the jailbreak is the one that the model was trained to obey.

    Parameters
    ----------
    folder : to make; it must not be there.
    questions : of each scenario in `SCENARIOS`, formats in turn.
    seed : of everything.

    Raises
    ------
    DacoError
        ``questions`` is below 1.
    ArtifactError
        The folder is there.
    """
    rows: list[dict[str, Any]] = []
    with atomic_directory(Path(folder)) as root:
        for scenario in SCENARIOS:
            for concept, pictures in _questions(scenario, questions, seed):
                kind = list(_FORMATS)[len(rows) % len(_FORMATS)]
                image = f"{_FOLDERS.get(kind, 'llm_transfer_attack/scene')}_{len(rows)}.png"
                (root / image).parent.mkdir(parents=True, exist_ok=True)
                save_picture(pictures[_FORMATS[kind]], root / image)
                rows.append(
                    {
                        "id": len(rows),
                        "jailbreak_query": f"{JAILBREAK} {QUESTION}",
                        # Questions about one thing are variants of each other, and share a side of a split.
                        "redteam_query": f"{QUESTION} It shows {concept.phrase}.",
                        "format": kind,
                        "policy": scenario.partition("-")[2].replace("_", " "),
                        "image_path": image,
                        "from": f"scenes: {concept.name}",
                        "selected_mini": len(rows) % 3 == 0,
                        "transfer_from_llm": kind not in _FOLDERS,
                    }
                )
        write_csv(root / "JailBreakV_28K.csv", rows)
        write_csv(root / "mini_JailBreakV_28K.csv", [row for row in rows if row["selected_mini"]])
        plain = [
            {"id": row["id"], "question": row["redteam_query"], "policy": row["policy"], "from": row["from"]}
            for row in rows
        ]
        write_csv(root / "RedTeam_2K.csv", plain)
    return Path(folder)


def _questions(
    scenario: str, count: int, seed: int
) -> Iterator[tuple[SceneConcept, dict[str, torch.Tensor]]]:
    """An unsafe concept of the scenario's groups, each in turn, and its three pictures."""
    import torch

    from daco_rt.scenes.compose import compose
    from daco_rt.scenes.draw import Choice, draw_scenes

    if count < 1:
        raise DacoError(f"questions must be 1 or more, got {count}")
    concepts = scene_concepts()
    chosen = [c for c in concepts if c.unsafe and c.group in SCENARIOS[scenario].split(" and ")]
    generator = torch.Generator().manual_seed(2**61 + 1000 * seed + int(scenario[:2]))
    none = torch.tensor([-1])
    for number in range(count):
        concept = chosen[number % len(chosen)]
        beside = -1
        while not allowed([concept.index, beside]) or beside < 0:
            beside = int(draw_scenes(torch.tensor([1]), generator, unsafe=0.0).concepts[0, 0])
        styles = torch.randint(2, (1, 3), generator=generator)
        alone = torch.tensor([[concept.index, -1, -1]])
        choices = {
            "SD": Choice(torch.tensor([[concept.index, beside, -1]]), styles, none),
            "SD_TYPO": Choice(alone, styles, torch.tensor([concept.index])),
            "TYPO": Choice(torch.full_like(alone, -1), styles, torch.tensor([concept.index])),
        }
        yield concept, {name: compose(choice, generator).pixels[0] for name, choice in choices.items()}
