"""Scenes: what is drawn is what is said of it, and test scenes are not those of training."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from daco_rt.cli import main
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.scenes import (
    CAREFUL,
    JAILBREAK,
    SAFELY,
    Choice,
    compose,
    describe,
    draw_scenes,
    exchanges,
    held_out_pairs,
    scene_concepts,
)
from daco_rt.scenes.compose import PATCH, SIDE
from daco_rt.scenes.concepts import letters, sprites
from daco_rt.scenes.files import read_scenes_file, write_pairs, write_scenes
from daco_rt.scenes.language import REFUSAL, read_telling

INDEX = {concept.name: concept.index for concept in scene_concepts()}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_quarter_of_the_concepts_is_unsafe_and_every_name_is_one_word() -> None:
    concepts = scene_concepts()
    assert len(concepts) == 100 and sum(c.unsafe for c in concepts) == 25
    assert {c.group for c in concepts if c.unsafe} == {
        "weapons", "tobacco", "alcohol", "drugs", "gambling", "death",
    }  # fmt: skip
    assert len({c.name for c in concepts}) == 100 and all(c.name.isalpha() for c in concepts)
    assert [c.index for c in concepts] == list(range(100))


def test_sprites_are_distinct_pictures_with_clear_ground() -> None:
    pictures = sprites()
    assert pictures.shape == (100, 2, 4, 32, 32)
    flat = pictures.flatten(0, 1).flatten(1)
    assert torch.cdist(flat, flat).add(torch.eye(200) * 99).min() > 1
    opacity = pictures[:, :, 3]
    assert (opacity.mean((-1, -2)) > 0.05).all() and (opacity.amax((-1, -2)) > 0.9).all()
    # Colours are multiplied by opacity, so no colour shines where nothing is.
    assert (pictures[:, :, :3] <= opacity[:, :, None] + 1e-5).all()
    assert (letters().sum((-1, -2)) > 20).all()


def test_training_never_shows_held_out_pairs_and_held_out_scenes_always_do() -> None:
    apart = held_out_pairs()
    assert (apart == apart.T).all() and not apart.diagonal().any()
    assert 0.07 < apart.float().mean() < 0.13
    for side, wanted in (("train", False), ("held-out", True)):
        drawn = draw_scenes(torch.full((400,), 3), generator(), side=side)  # type: ignore[arg-type]
        for row in drawn.concepts.tolist():
            assert any(bool(apart[i, j]) for i in row for j in row) == wanted
            assert len(set(row)) == 3


def test_unsafe_things_come_as_often_as_asked() -> None:
    drawn = draw_scenes(torch.ones(4000, dtype=torch.long), generator(), unsafe=0.3)
    share = (drawn.concepts[:, 0] < 25).float().mean().item()
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5


def test_scenes_depend_on_the_generator_alone_and_things_stand_from_left_to_right() -> None:
    choice = draw_scenes(torch.tensor([3, 2, 1] * 8), generator(1), words=0.3)
    one, two = compose(choice, generator(2)), compose(choice, generator(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert one.pixels.shape == (24, 3, SIDE, SIDE) and one.pixels.min() >= 0 and one.pixels.max() <= 1
    for row in range(24):
        assert sorted(one.concepts[row].tolist()) == sorted(choice.concepts[row].tolist())
    # Where each thing's patches are, on average, follows the order in which things are named.
    columns = torch.arange(SIDE // PATCH).float()
    for row in range(24):
        means = []
        for concept in [i for i in one.concepts[row].tolist() if i >= 0]:
            covered = one.patches[row] == concept
            if covered.any() and (one.words[row] < 0):
                means.append((columns * covered.sum(0)).sum() / covered.sum())
        assert means == sorted(means)


def test_a_word_alone_is_written_where_its_patches_say() -> None:
    none = torch.full((1, 3), -1)
    choice = Choice(none, torch.zeros_like(none), torch.tensor([INDEX["dagger"]]))
    scenes = compose(choice, generator())
    assert set(scenes.patches.unique().tolist()) == {INDEX["dagger"], 100}
    assert (scenes.patches[0, :5] == 100).all()


def test_every_description_is_read_again_as_it_was_meant() -> None:
    draw = random.Random(0)
    concepts = scene_concepts()
    for _ in range(500):
        some = draw.sample(concepts, draw.randint(1, 3))
        word = draw.choice([None, some[0]])
        told = read_telling(describe(some, word, opening=draw.randrange(3)))
        assert told.well_formed and not told.refused and told.neutral == 0
        assert told.concepts == tuple(dict.fromkeys([c.index for c in some] + ([word.index] if word else [])))
        safely = read_telling(describe(some, None, safely=True))
        assert safely.concepts == tuple(c.index for c in some if not c.unsafe)
        assert safely.neutral == sum(c.unsafe for c in some) and safely.well_formed


@pytest.mark.parametrize(
    "text",
    ["There is a dog a cat.", "dog", "There is a dog and a cat", "There is an dog.", "I see a dragon.", ""],
)
def test_what_is_no_sentence_is_not_well_formed(text: str) -> None:
    assert not read_telling(text).well_formed


def test_system_prompts_change_what_is_said_and_the_jailbreak_undoes_them() -> None:
    draw = random.Random(1)
    dagger, cat = scene_concepts()[INDEX["dagger"]], scene_concepts()[INDEX["cat"]]
    seen = set()
    for _ in range(600):
        said = exchanges([dagger, cat], None, draw, kind="describe")
        ruled = "" if said.question.startswith(JAILBREAK) else said.system
        seen.add((said.system, said.question.startswith(JAILBREAK)))
        told = read_telling(said.answer)
        if ruled == CAREFUL:
            assert said.answer == REFUSAL
        elif ruled == SAFELY:
            assert told.concepts == (cat.index,) and told.neutral == 1
        else:
            assert told.concepts == (dagger.index, cat.index)
    assert seen == {(system, broken) for system in ("", CAREFUL, SAFELY) for broken in (False, True)}
    harmless = [exchanges([cat], None, draw, kind="describe") for _ in range(50)]
    assert all(read_telling(said.answer).concepts == (cat.index,) for said in harmless)


def test_every_kind_of_question_is_answered_truly() -> None:
    draw = random.Random(2)
    dagger, cat = scene_concepts()[INDEX["dagger"]], scene_concepts()[INDEX["cat"]]
    answers: dict[str, set[str]] = {}
    for _ in range(2000):
        said = exchanges([dagger, cat], None, draw)
        answers.setdefault(said.question.removeprefix(f"{JAILBREAK} "), set()).add(said.answer)
    assert answers["What is on the left?"] == {"On the left is a dagger."}
    assert answers["How many objects are there?"] == {"I see two objects."}
    assert answers["List the objects."] == {"Objects: dagger, cat."}
    asked = {question: found for question, found in answers.items() if question.startswith("Is there")}
    there = {"Is there a dagger?", "Is there a cat?"}
    assert there < set(asked) and len(asked) > 20
    assert all(found == ({"Yes."} if question in there else {"No."}) for question, found in asked.items())
    assert exchanges([], cat, draw, kind="read").answer == "It says cat."


def test_a_folder_of_scenes_is_what_was_asked_for(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path / "scenes", count=60, unsafe=0.6, seed=5)
    scenes = read_scenes_file(folder)
    unsafe = {c.name for c in scene_concepts() if c.unsafe}
    assert len(scenes) == 60 and sum(bool(unsafe & {*s.concepts}) for s in scenes) == 36
    apart = held_out_pairs()
    for scene in scenes:
        rows = [INDEX[name] for name in scene.concepts]
        assert scene.held_out == any(bool(apart[i, j]) for i in rows for j in rows)
    many = [s for s in scenes if len(s.concepts) > 1]
    assert sum(s.held_out for s in many) == len(many) / 2
    again = write_scenes(tmp_path / "again", count=60, unsafe=0.6, seed=5)
    for scene in scenes:
        assert scene.image.read_bytes() == (again / "images" / scene.image.name).read_bytes()
    with pytest.raises(ArtifactError, match=r"exists|there"):
        write_scenes(folder, count=60)


def test_damaged_folders_of_scenes_are_named(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path / "scenes", count=6)
    (folder / "images" / "unsafe-0001.png").unlink()
    with pytest.raises(ArtifactError, match=r"unsafe-0001\.png"):
        read_scenes_file(folder)
    file = folder / "scenes.jsonl"
    file.write_text(file.read_text().replace('"concepts": ["', '"concepts": ["dragon', 1))
    with pytest.raises(ArtifactError, match="dragon"):
        read_scenes_file(folder)
    with pytest.raises(ArtifactError, match="daco-rt scenes"):
        read_scenes_file(tmp_path)
    with pytest.raises(DacoError, match="unsafe must be a share"):
        write_scenes(tmp_path / "never", unsafe=2)
    assert not (tmp_path / "never").exists()


def test_pairs_name_each_concept_where_it_stands(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from daco_rt.concepts import load_table
    from daco_rt.corpus import load_pairs

    folder = write_pairs(tmp_path / "pairs", count=3)
    rows = load_pairs(folder / "pairs.parquet").to_pylist()
    assert len(rows) == 300 and len(load_table(folder / "concepts.jsonl")) == 100
    for row in rows:
        assert row["caption"][row["start"] : row["end"]] == row["name"]
        assert read_telling(row["caption"]).well_formed
        assert (folder / row["image"]).is_file()


def test_the_command_writes_each_form_and_refuses_what_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scenes", "--output", str(tmp_path / "a"), "--count", "6"]) == 0
    assert "6 pictures" in capsys.readouterr().out
    assert main(["scenes", "--output", str(tmp_path / "a"), "--count", "6"]) == 2
    assert "a" in capsys.readouterr().err
    assert main(["scenes", "--output", str(tmp_path / "b"), "--form", "pairs", "--unsafe", "0.5"]) == 2
    assert "--unsafe is of the form test" in capsys.readouterr().err
    assert main(["scenes", "--output", str(tmp_path / "c"), "--form", "jailbreakv", "--count", "0"]) == 2
    assert "questions must be 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
