"""Harvest of pairs of pictures and captions: what is read at image tokens and at the caption's words."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harvest_samples import pocket, tree
from PIL import Image

from daco_rt.artifacts import Concept
from daco_rt.cli import main
from daco_rt.dictionary.encode import PROMPT, Encoder, Losses
from daco_rt.dictionary.harvest import harvest_means
from daco_rt.dictionary.items import HarvestItem, ItemTable, pair_items
from daco_rt.dictionary.means import ConceptMeans, open_means
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.models import pocket as pocket_model
from daco_rt.runtime.processor import Processor

corpus = pytest.importorskip("daco_rt.corpus")
pytest.importorskip("pyarrow")

WORDS = ("dagger", "garden", "river")
CONCEPTS = tuple(Concept(i, word) for i, word in enumerate(WORDS))
BLOCK = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DACO_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return pocket_model.ensure(progress=False)


def row(concept: int, pair: str, sign: int, caption: str, image: str) -> dict[str, Any]:
    start = caption.find(WORDS[concept])
    return {
        "concept": concept, "name": WORDS[concept], "pair": pair, "sign": sign, "caption": caption,
        "image_similarity": 0.6, "text_similarity": 0.7, "score": 0.9, "image": image,
        "start": start, "end": start + len(WORDS[concept]) if start >= 0 else -1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several sizes, two of them in a tar file; captions with and without the word."""
    root = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(3)
    for i, size in enumerate([(64, 64), (200, 70), (90, 300), (64, 64), (130, 64), (48, 48)]):
        pixels = draw.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    with tarfile.open(root / "shard.tar", "w") as archive:
        for i in (3, 4):
            archive.add(root / f"{i}.png", f"{i}.png")
    rows = [
        row(0, "a", 1, "an old dagger on a table", "0.png"),
        row(0, "b", 1, "the dagger of a king", "1.png"),
        row(0, "c", -1, "a wide river", "shard.tar#3.png"),
        row(1, "d", 1, "garden in the morning", "2.png"),
        row(1, "e", 1, "behind the house lies a garden, with roses", "shard.tar#4.png"),
        row(1, "a", -1, "an old dagger on a table", "0.png"),
        row(2, "c", 1, "a wide river", "shard.tar#3.png"),
        row(2, "f", 1, "the same river without a picture", ""),
        row(2, "d", -1, "garden in the morning", "2.png"),
    ]
    columns = {name: [entry[name] for entry in rows] for name in rows[0]}
    return corpus.save_pairs(columns, root / "pairs.parquet", root=root)


def harvest(folder: Path, pairs: Path, output: Path, **changes: Any) -> ConceptMeans:
    model, _, identity = pocket(folder)
    options = {"items": pair_items(pairs, CONCEPTS), "norm_limit": 50.0} | changes
    items = options.pop("items")
    return harvest_means(
        model, Processor(folder), CONCEPTS, items, [BLOCK], output, identity=identity, progress=False,
        concepts_per_shard=2, batch_tokens=160, **options,
    )  # fmt: skip


def states(folder: Path, item: HarvestItem, max_tiles: int | None = None) -> tuple[np.ndarray, Any]:
    """The stream of one pair alone, by the whole model of transformers, and its prepared tokens."""
    model = pocket(folder)[0]
    processor = Processor(folder)
    if item.image is None:
        made = processor.prepare(item.text, raw=True)
    else:
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}
        root, name = str(item.image).split("/pictures", 1)
        picture = corpus.open_reference(root, f"pictures{name}")
        text = processor.render([question]) + item.text
        made = processor.prepare(text, [picture], raw=True, max_tiles=max_tiles)
    pixels = {} if made.pixel_values is None else {"pixel_values": torch.from_numpy(made.pixel_values)}
    with torch.no_grad():
        found = model(
            input_ids=torch.from_numpy(made.input_ids)[None], output_hidden_states=True, **pixels
        ).hidden_states
    return found[BLOCK + 1][0].double().numpy(), made


def expected(folder: Path, item: HarvestItem, rule: str) -> np.ndarray | None:
    rows, made = states(folder, item)
    if rule == "image":
        return rows[made.image_mask].mean(axis=0) if made.image_mask.any() else None
    if rule == "all":
        return rows[1:].mean(axis=0)
    if rule == "last":
        return rows[-1]
    if rule == "last-prompt":
        # Where the prompt alone ends.
        return None if item.image is None else states(folder, replace(item, text=""))[0][-1]
    # The word's last token is found by decoding ever longer ends, without any offsets.
    processor = Processor(folder)
    if item.end is None:
        return None
    behind = item.text[item.end :]
    for i in range(len(made.input_ids) - 1, 0, -1):
        if len(processor.decode(made.input_ids[i:].tolist())) > len(behind):
            return rows[i]
    raise AssertionError


@pytest.mark.parametrize("rule", ["image", "word", "last", "last-prompt", "all"])
def test_pictures_are_read_as_the_model_sees_them(folder: Path, pairs: Path, tmp_path: Path, rule: str):
    means = harvest(folder, pairs, tmp_path / "m", position=rule)
    readings: dict[tuple[int, int], list[np.ndarray]] = {}
    for item in pair_items(pairs):
        found = expected(folder, item, rule)
        if found is not None:
            readings.setdefault((item.concept, item.sign), []).append(found)
    assert means.problems == [] and means.signs == (1, -1)
    for sign in (1, -1):
        for concept in range(len(WORDS)):
            own = readings.get((concept, sign), [])
            assert means.count(BLOCK, sign)[concept] == len(own), (concept, sign)
            if own:
                centre = np.mean(own, axis=0)
                error = np.abs(means.mean(BLOCK, sign)[concept] - centre).max()
                assert error <= 2e-5 * np.linalg.norm(centre)
    if rule == "image":
        assert means.skipped == {"without a picture": 1}
    if rule == "last-prompt":
        assert means.skipped == {"without a prompt and its answer": 1}
    if rule == "word":
        # Counterexamples do not say the word.
        assert means.skipped == {"without the word": 3}


def test_image_tokens_have_a_median_of_their_own(folder: Path, pairs: Path, tmp_path: Path):
    means = harvest(folder, pairs, tmp_path / "m", position="image", norm_limit=1.05)
    norms: list[np.ndarray] = []
    rejected = 0
    with_picture = [item for item in ItemTable(pair_items(pairs), 3) if item.image is not None]
    for item in with_picture:
        rows, made = states(folder, item)
        norms.append(np.linalg.norm(rows[made.image_mask], axis=1))
    assert means.image_norm[BLOCK] == pytest.approx(np.median(np.concatenate(norms)), rel=1e-5)
    limit = 1.05 * means.image_norm[BLOCK]
    rejected = sum(int((norm > limit).sum()) for norm in norms)
    assert 0 < rejected == means.rejected(BLOCK)
    # Where no image token is read there is no such norm.
    assert harvest(folder, pairs, tmp_path / "n", position="word").image_norm == {}


def test_fewer_tiles_are_fewer_tokens(folder: Path, pairs: Path):
    item = next(item for item in pair_items(pairs) if item.id == "b")
    counts = []
    for tiles in (1, 3, None):
        (window,) = Encoder(Processor(folder), "image", 2048, max_tiles=tiles).encode([item], 0, Losses())
        counts.append(len(window[0].positions))
        assert counts[-1] == int(states(folder, item, tiles)[1].image_mask.sum())
    assert counts[0] < counts[1] <= counts[2]


def test_broken_pictures_are_listed(folder: Path, pairs: Path, tmp_path: Path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    bad = [
        HarvestItem(2, 1, "x", None, None, tmp_path / "broken.png", "g"),
        HarvestItem(2, 1, "x", None, None, tmp_path / "gone.png", "h"),
    ]
    means = harvest(folder, pairs, tmp_path / "m", position="image", items=[*pair_items(pairs), *bad])
    assert means.problems == [{"id": name, "concept": "2", "reason": "broken picture"} for name in ("g", "h")]
    alone = harvest(folder, pairs, tmp_path / "n", position="image")
    assert np.array_equal(means.mean(BLOCK), alone.mean(BLOCK))


def test_a_folder_that_is_not_there_ends_the_harvest(folder: Path, pairs: Path, tmp_path: Path):
    lost = [HarvestItem(0, 1, "x", None, None, tmp_path / f"{i}.png", str(i)) for i in range(20)]
    with pytest.raises(DacoError, match=r"the first 8 pictures cannot be read, .*7\.png is not a file"):
        harvest(folder, pairs, tmp_path / "m", position="last", items=lost)
    assert open_means(tmp_path / "m", complete=False).missing == [0, 1]


def test_pictures_need_a_processor(folder: Path, pairs: Path, tmp_path: Path):
    model, tokenizer, identity = pocket(folder)
    with pytest.raises(DacoError, match="has a picture, which a tokenizer alone cannot prepare"):
        harvest_means(
            model, tokenizer, CONCEPTS, pair_items(pairs), [BLOCK], tmp_path / "m", identity=identity,
            progress=False,
        )  # fmt: skip


def test_another_table_is_refused(pairs: Path):
    other = [Concept(i, word) for i, word in enumerate(("dagger", "casino", "river"))]
    with pytest.raises(ArtifactError, match="row 4: row 1 is 'garden', in the table 'casino'"):
        list(pair_items(pairs, other))


def test_the_command_reads_pairs(folder: Path, pairs: Path, tmp_path: Path, capsys: Any):
    (tmp_path / "table.jsonl").write_text("".join(json.dumps({"name": word}) + "\n" for word in WORDS))
    command = [
        "harvest", str(pairs), "--table", str(tmp_path / "table.jsonl"), "--checkpoint", str(folder),
        "--blocks", str(BLOCK), "--position", "image", "--output", str(tmp_path / "m"), "--device", "cpu",
        "--concepts-per-shard", "2", "--batch-tokens", "160",
    ]  # fmt: skip
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == {"without a picture": 1}
    harvest(folder, pairs, tmp_path / "n", position="image", norm_limit=4.0)
    for name in ("shards/00000.safetensors", "shards/00001.safetensors"):
        assert tree(tmp_path / "m")[name] == tree(tmp_path / "n")[name]
    assert main([*command, "--prompt", "Which?"]) == 2
    assert "another recipe (prompt)" in capsys.readouterr().err
