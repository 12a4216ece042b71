"""scripts/train_smol_vision.py: names, questions, packed rows, batches, and a whole run of a few steps."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus_models import save_embedder
from safetensors.torch import load_file, save_file

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import train_smol_vision as script  # noqa: E402
from scene_training import rounded_up  # noqa: E402
from smol_vision import batches, exam, naming, pictures, sight, talk  # noqa: E402

from daco_rt.errors import ArtifactError, CheckpointError  # noqa: E402
from daco_rt.models import pocket  # noqa: E402
from daco_rt.models.seeded import vision_tensors  # noqa: E402
from daco_rt.models.smol import CHAT_TEMPLATE, SYSTEM  # noqa: E402
from daco_rt.scenes import compose, draw_scenes, scene_concepts  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures as fetch_pictures.sh lays them out: the scenes' concepts and a few more, clip art, stamps."""
    from PIL import Image

    root = tmp_path_factory.mktemp("pictures")
    draw = random.Random(0)
    labels = [(concept.emoji, "thing") for concept in scene_concepts()]
    labels += [(label, "animal") for label in ("yak", *held_labels())] + [("keycap: 3", "keycap")]
    rows: dict[str, list[dict[str, Any]]] = {
        maker: [{"label": label, "tags": ["t"], "subgroup": group} for label, group in labels]
        for maker in ("emoji-google", "emoji-twitter")
    }
    rows["openclipart"] = [
        {"title": "Old Teapot", "caption": "Old Teapot. a pot (beverages, food)", "author": "x"},
        {"title": "New tab", "caption": "New tab (action, icons, computer)", "author": "x"},
        {"title": "gramastar", "caption": "gramastar (toys, recreation)", "author": "x"},
    ]
    rows["tuxpaint"] = [
        {"caption": text} for text in ("A duck.", "A saw.", "Remember those who died.", "A duck.")
    ]
    for name, listed in rows.items():
        (root / name / "images").mkdir(parents=True)
        for i, row in enumerate(listed):
            row["image"] = f"images/{i:05d}-x_9.png"
            size = (draw.randint(30, 90), draw.randint(30, 90))
            colour = (draw.randrange(256), draw.randrange(256), draw.randrange(256), 255)
            Image.new("RGBA", size, colour).save(root / name / row["image"])
        text = "".join(json.dumps(row) + "\n" for row in listed)
        (root / name / "captions.jsonl").write_text(text, "utf-8")
    return root


def held_labels() -> list[str]:
    """Two words whose second style is held out."""
    words = (f"bird number {i}" for i in range(1000))
    return [word for word in words if pictures.held_out(word)][:2]


@pytest.fixture(scope="module")
def gallery(folder: Path) -> pictures.Gallery:
    return pictures.load_gallery(folder, folder / "cache.safetensors")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pocket-internvl: the same tower, a small text model."""
    context = pytest.MonkeyPatch()
    context.setenv("DACO_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
    folder = pocket.ensure(progress=False)
    context.undo()
    return folder


def test_names_of_clip_art() -> None:
    known = {"teapot", "head"}
    assert naming.clip_name("Stylized Wolf Head", "x", known) == "stylized wolf head"
    assert naming.clip_name("clipart by nicu - baloon1", "04087-teapot_2", known) == "teapot"
    assert naming.clip_name("gramastar", "04087-star_19pt05step", known) is None
    assert {"teapot", "dog", "button"} <= naming.known_nouns()


def test_phrases() -> None:
    said = {
        "apple": "an apple",
        "clinking beer mugs": "clinking beer mugs",
        "hand with fingers splayed": "a hand with fingers splayed",
        "bread": "bread",
        "dress": "a dress",
        "umbrella": "an umbrella",
        "unicorn": "a unicorn",
        "cactus": "a cactus",
        "Santa Claus": "Santa Claus",
        "Christmas tree": "a Christmas tree",
    }
    assert {name: naming.with_article(name) for name in said} == said
    assert naming.emoji_phrase("flag: Greece", "country flag") == "the flag of Greece"
    assert naming.emoji_phrase("keycap: 3", "keycap") is None
    assert naming.emoji_phrase("woman running", "person activity") == "a woman running"


def test_a_tenth_is_held_out_in_the_second_style_alone(gallery: pictures.Gallery) -> None:
    share = sum(pictures.held_out(str(i)) for i in range(5000)) / 5000
    assert 0.08 < share < 0.12
    things = {thing.name: thing for thing in gallery.things}
    first, second = (things[label] for label in held_labels())
    assert len(first.pictures) == len(first.held) == len(second.held) == 1
    assert len(things["yak"].pictures) == 2 and not things["yak"].held
    # Scenes show their concepts in both styles, so none of them can be held out.
    names = {concept.name for concept in scene_concepts()}
    assert all(len(things[name].pictures) >= 2 and not things[name].held for name in names)
    assert things["keycap: 3"].phrase is None
    assert things["old teapot"].phrase == "an old teapot" and not {"gramastar", "new tab"} & set(things)
    assert [gallery.things[i].name for i in gallery.scene_things()] == [c.name for c in scene_concepts()]


def test_pictures_are_read_once_and_missing_ones_named(
    folder: Path, gallery: pictures.Gallery, tmp_path: Path
) -> None:
    file = folder / "emoji-google/images/00000-x_9.png"
    hidden = file.rename(tmp_path / "x.png")
    try:
        again = pictures.load_gallery(folder, folder / "cache.safetensors")
        assert torch.equal(again.pixels, gallery.pixels)
        with pytest.raises(ArtifactError, match=r"00000-x_9.png cannot be read .*fetch_pictures.sh"):
            pictures.load_gallery(folder, tmp_path / "other.safetensors")
    finally:
        hidden.rename(file)
    with pytest.raises(
        ArtifactError, match=r"emoji-google/captions.jsonl cannot be read .*fetch_pictures.sh"
    ):
        pictures.load_gallery(tmp_path, tmp_path / "other.safetensors")


def test_placed_pictures(gallery: pictures.Gallery) -> None:
    some = gallery.pixels[:6]
    handed = torch.zeros(6, dtype=torch.bool)
    pixels, cover = pictures.place(some, handed, torch.Generator().manual_seed(1))
    assert pixels.shape == (6, 3, 64, 64) and pixels.min() >= 0 and pixels.max() <= 1
    assert ((cover > 0.5).float().mean((1, 2)) > 0.1).all()
    again, _ = pictures.place(some, handed, torch.Generator().manual_seed(1))
    other, _ = pictures.place(some, handed, torch.Generator().manual_seed(2))
    assert torch.equal(pixels, again) and not torch.equal(pixels, other)
    white = pictures.on_white(torch.zeros(1, 4, 64, 64, dtype=torch.uint8))
    assert (white == 1).all()


def test_every_answer_is_true() -> None:
    draw = random.Random(0)
    there, others = ["a dog", "a cup"], ["a cat", "a dog", "an owl"]
    kinds = set()
    for _ in range(200):
        said = talk.talk(there, None, others, 4, draw)
        assert len(said) == 4
        full = {question: answer.format("a dog and a cup") for question, answer in talk.DESCRIBE}
        assert said[0].question in full
        for question, answer in said:
            if question in full:
                assert answer in {
                    form.format("a dog and a cup") for asked, form in talk.DESCRIBE if asked == question
                }
            elif question.startswith("How many"):
                assert answer == "There are two things in the picture."
            elif question.startswith("What is on the "):
                side = question[15:-1]
                assert answer == f"On the {side} is {there[side == 'right']}."
            else:
                asked = question.removeprefix("Do you see ").removeprefix("Is there ")
                asked = asked.removesuffix("?").removesuffix(" in the picture")
                assert answer == (f"Yes, I see {asked}." if asked in there else "No, I see a dog and a cup.")
                kinds.add(answer[:2])
    assert kinds == {"Ye", "No"}
    said = talk.talk([], "dog", others, 6, draw)
    assert all("dog" in answer for _, answer in said)


@pytest.mark.parametrize("system", [SYSTEM, "", "Be brief."])
def test_rows_are_what_template_and_processor_write(checkpoint: Path, tmp_path: Path, system: str) -> None:
    import shutil

    from PIL import Image

    from daco_rt.runtime.processor import Processor

    own = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, own)
    (own / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    picture, question = Image.new("RGB", (64, 64)), talk.ASK
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    messages = [user] if system == SYSTEM else [{"role": "system", "content": system}, user]
    prepared = Processor(own).prepare(messages, images=[picture])
    text = talk.Text(own)
    row = text.row(system, [talk.Said(question, "A dog.")])
    told = [*text.ids("A dog."), text.end]
    assert row.ids == [*prepared.input_ids.tolist(), *told]
    assert [label for label in row.labels if label != talk.IGNORE] == told
    assert row.positions == [*range(len(row.ids))]


@pytest.fixture
def model(checkpoint: Path) -> sight.Sight:
    return sight.Sight(checkpoint, None, 32, 0, torch.device("cpu"))


def test_packed_questions_are_as_if_alone(model: sight.Sight) -> None:
    net = model.net
    net.model.language_model.float()
    text = model.text
    said = [
        talk.Said("What is it?", "A dog."),
        talk.Said("Why?", "No, I see a cup here."),
        talk.Said("Is it?", "Yes."),
    ]
    rows = [text.row("", said), text.row("Be brief.", said[:2])]
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.tokens(model.see(pixels))
        packed = talk.answer_loss(net, features, text.batch(rows), text.image)
        total, count = 0.0, 0
        for row, (system, share) in enumerate((("", said), ("Be brief.", said[:2]))):
            for one in share:
                alone = text.row(system, [one])
                ids = torch.tensor([alone.ids])
                labels = torch.tensor([alone.labels])
                number = int((labels != talk.IGNORE).sum())
                loss = net(input_ids=ids, pixel_values=pixels[row : row + 1], labels=labels).loss
                total, count = total + loss.item() * number, count + number
    assert packed.item() == pytest.approx(total / count, rel=1e-4)


def test_only_sight_is_trained(model: sight.Sight) -> None:
    rows = model.text.batch([model.text.row("", [talk.Said("What is it?", "A dog.")])])
    features = model.tokens(model.see(torch.randn(1, 3, 64, 64)))
    talk.answer_loss(model.net, features, rows, model.text.image).backward()
    assert all(p.grad is None for p in model.net.model.language_model.parameters())
    for part in (model.tower, model.projector):
        missing = [name for name, p in part.named_parameters() if p.grad is None or not p.grad.any()]
        # Keys of attention have no bias whose gradient could be anything but zero; there are none here.
        assert missing == []


def test_shapes_are_rounded_up() -> None:
    wanted = torch.tensor([False, True, True, False, True, False])
    assert rounded_up(wanted, 4).tolist() == [1, 2, 4, 0]
    assert rounded_up(wanted, 3).tolist() == [1, 2, 4]
    # Where there is not enough to round up with, there is less.
    assert len(rounded_up(wanted, 100)) == 6


def test_batches_depend_on_the_step_alone(gallery: pictures.Gallery, checkpoint: Path) -> None:
    for stage in (batches.Stage("look", 6, 4, 5, 0, 1e-3), batches.Stage("talk", 6, 3, 3, 2, 1e-3)):
        whole = [*batches.Batches(stage, 0, 0, gallery, checkpoint)]
        rest = [*batches.Batches(stage, 3, 0, gallery, checkpoint)]
        assert len(whole) == 6 and len(rest) == 3
        for one, other in zip(whole[3:], rest, strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        assert not torch.equal(whole[0]["pixels"], whole[1]["pixels"])


def test_targets_of_image_tokens(gallery: pictures.Gallery, checkpoint: Path) -> None:
    stage = batches.Stage("look", 1, 8, 5, 0, 1e-3)
    (batch,) = batches.Batches(stage, 0, 0, gallery, checkpoint)
    tokens, index = batch["tokens"], gallery.scene_things()
    assert tokens.shape == (13, 16) and batch["pixels"].shape == (13, 3, 64, 64)
    none = len(gallery.things)
    for patches, row in zip(batch["patches"], tokens[:8], strict=True):
        for i in range(16):
            under = patches[i // 4 * 2 : i // 4 * 2 + 2, i % 4 * 2 : i % 4 * 2 + 2].flatten().tolist()
            shown = {int(index[c]) for c in under if c < sight.GROUND}
            assert int(row[i]) in shown if shown else int(row[i]) == none
    for thing, row in zip(batch["things"], tokens[8:], strict=True):
        assert set(row.tolist()) <= {int(thing), none} and int(thing) in row


def test_a_tower_of_another_shape_is_refused(model: sight.Sight, tmp_path: Path) -> None:
    tower = {f"vision_tower.{k}": v.clone() for k, v in model.tower.state_dict().items()}
    save_file(tower, tmp_path / "good.safetensors")
    sight.load_tower(model.tower, tmp_path / "good.safetensors")
    name = "vision_tower.layernorm.weight"
    save_file({**tower, name: torch.ones(7)}, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=r"layernorm.weight is \(7,\), expected \(192,\); give --start"):
        sight.load_tower(model.tower, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=r"none.safetensors cannot be read .* --start"):
        sight.load_tower(model.tower, tmp_path / "none.safetensors")


def test_shares_of_the_examination() -> None:
    assert exam.holds("The picture shows a Dog.", "dog") and not exam.holds("a dogma", "dog")
    captions = [f"c{i}" for i in range(150)]
    right = torch.eye(150)
    assert exam.found_among(right, right, captions) == 1.0
    assert exam.found_among(right.roll(1, 0), right, captions) < 0.4
    # A constant answer finds nothing, though it ties with everything.
    assert exam.found_among(torch.ones(150, 150), right, captions) == 0.0


def test_scores_of_scenes(model: sight.Sight, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = compose(
        draw_scenes(torch.tensor([1, 2]), generator := torch.Generator().manual_seed(0)), generator
    )
    (one, _), (two, _) = (batches.content(drawn, i) for i in range(2))
    told = [f"The picture shows {one[0]}.", f"The picture shows {two[1]}."]
    monkeypatch.setattr(model, "answer", lambda *_, **__: told)
    shares = exam.Exam(model, None, 2)._scenes(drawn)
    assert shares["recall"] == round(2 / 3, 4) and shares["precision"] == 1.0 and shares["exact"] == 0.5


def arguments(folder: Path, work: Path, embedder: Path, *more: str) -> list[str]:
    given = ["train_smol_vision.py", "--work", work, "--output", work / "out", "--pictures", folder]
    given += ["--embedder", embedder, "--checkpoint", "pocket-internvl", "--start", "noise"]
    return [str(item) for item in (*given, "--sizes", 3, 4, 2, "--examined", 4, *more)]


@pytest.mark.slow
def test_a_whole_run_and_the_same_run_interrupted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DACO_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(script, "KEEP", 2)
    embedder = save_embedder(tmp_path / "bert", "bert")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    monkeypatch.setattr(sys, "argv", arguments(folder, whole, embedder, "--steps", "3", "3"))
    assert script.main() == 0
    # Stopped after the second step of the second stage: the last checkpoint is of that step.
    kept, calls = script.answer_loss, []

    def stop(*given: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return kept(*given)

    monkeypatch.setattr(script, "answer_loss", stop)
    monkeypatch.setattr(sys, "argv", arguments(folder, broken, embedder, "--steps", "3", "3"))
    with pytest.raises(KeyboardInterrupt):
        script.main()
    monkeypatch.setattr(script, "answer_loss", kept)
    capsys.readouterr()
    assert script.main() == 0
    assert "goes on at step 2 of stage talk" in capsys.readouterr().out
    one, other = (load_file(work / "out" / "vision.safetensors") for work in (whole, broken))
    assert one.keys() == other.keys() == {name for name, _ in vision_tensors(192, 1.0)}
    assert all(value.dtype == torch.float16 for value in one.values())
    assert all(torch.equal(one[name], other[name]) for name in one)
    record = json.loads((whole / "out" / "training.json").read_text("utf-8"))
    assert [stage["name"] for stage in record["stages"]] == ["look", "talk"]
    assert record["held-out pictures"] == 2 and record["started from"] == "noise"
    assert {"recall", "precision", "exact", "chance"} < set(record["shares"]["scenes of two, held-out pairs"])
    for kind in ("pictures of training", "emoji in a style not seen", "stamps of Tux Paint"):
        assert {"named", "other", "caption found by the tower"} < set(record["shares"][kind])
    assert record["shares"]["stamps of Tux Paint"]["pictures"] == 2


def test_what_is_missing_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(folder, tmp_path, tmp_path / "no-embedder")
    monkeypatch.setattr(sys, "argv", given)
    assert script.main() == 2
    said = capsys.readouterr().err
    assert said.endswith("no-embedder is no embedder's folder; run python scripts/fetch_embedder.py\n")
