"""The harvest of concept means: readings equal transformers' own, and a harvest that stops goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harvest_samples import BLOCKS, TEMPLATES, WORDS, concepts, harvest, items, pocket, stream, tree

from daco_rt.cli import main
from daco_rt.dictionary import harvest as module
from daco_rt.dictionary.items import HarvestItem, ItemTable, text_items
from daco_rt.dictionary.means import open_means
from daco_rt.dictionary.positions import RULES, Tokens, find_positions
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.models import pocket as pocket_model
from daco_rt.models.residual import text_model_of
from daco_rt.sae import open_store

TEXT_RULES = [name for name in RULES if name != "image"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DACO_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
        return pocket_model.ensure(progress=False)


def places(rule: str, offsets: list[tuple[int, int]], item: HarvestItem) -> list[int]:
    """Where a rule reads, said in another way than the code does."""
    inside = [i for i, (a, b) in enumerate(offsets) if item.end and max(a, item.start) < min(b, item.end)]
    everywhere = list(range(1, len(offsets)))
    return {
        "word": inside[-1:],
        "word-mean": inside,
        "before-word": [inside[0] - 1] if inside else [],
        "last": everywhere[-1:],
        "last-prompt": everywhere[-1:] if item.text.endswith("assistant\n") else [],
        "all": everywhere,
    }[rule]


@pytest.mark.parametrize("rule", TEXT_RULES)
def test_means_equal_a_reading_one_text_at_a_time(folder: Path, tmp_path: Path, rule: str):
    # A limit that some positions pass and some do not.
    means = harvest(folder, tmp_path / "m", position=rule, norm_limit=1.1)
    assert means.missing == [] and means.signs == (1, -1) and means.stimuli == len(items())
    readings: dict[tuple[int, int, int], list[np.ndarray]] = {}
    rejected = dict.fromkeys(BLOCKS, 0)
    for item in items():
        rows, offsets = stream(folder, item.text)
        chosen = places(rule, offsets, item)
        for block in BLOCKS:
            limit = 1.1 * means.median_norm[block]
            kept = [rows[block][i] for i in chosen if np.linalg.norm(rows[block][i]) <= limit]
            rejected[block] += len(chosen) - len(kept)
            if kept:
                readings.setdefault((block, item.sign, item.concept), []).append(np.mean(kept, axis=0))
    assert {block: means.rejected(block) for block in BLOCKS} == rejected and min(rejected.values()) > 0
    for block in BLOCKS:
        for sign in (1, -1):
            mean, count, spread = (f(block, sign) for f in (means.mean, means.count, means.spread))
            assert mean.shape == (len(WORDS), means.dim) and mean.dtype == spread.dtype == np.float32
            for row in range(len(WORDS)):
                found = np.array(readings.get((block, sign, row), np.zeros((0, means.dim))))
                assert count[row] == len(found)
                if not len(found):
                    assert not mean[row].any() and spread[row] == 0
                    continue
                centre = found.mean(axis=0)
                assert np.abs(mean[row] - centre).max() <= 1e-5 * np.linalg.norm(centre)
                expected = ((found - centre) ** 2).sum(axis=1).mean()
                assert spread[row] == pytest.approx(expected, rel=1e-4, abs=1e-8 * (centre**2).sum())


CHAT = "<|im_start|>user\nWhat is a {0}?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("prompt", "behind"),
    [
        (CHAT, ""),
        (CHAT, "A {0} is a kind of thing.<|im_end|>\n"),
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n" + CHAT, "A {0} is"),
        ("Question: What is a {0}?\nAnswer:", " A {0} is a kind of thing.\n"),
    ],
)
def test_the_last_token_of_the_prompt_is_read_whatever_the_answer(
    folder: Path, tmp_path: Path, prompt: str, behind: str
):
    given = []
    for row, word in enumerate(WORDS):
        told = HarvestItem(row, 1, (prompt + behind).format(word), None, None, None, "told")
        # Neither an answer to nothing nor a text without turns has a prompt.
        opened = replace(told, text=f"<|im_start|>assistant\nHere is a {word}", id="opened")
        given += [told, opened, replace(told, text=f"<|im_start|>The {word}: an assistant\n", id="plain")]
    means = harvest(folder, tmp_path / "m", items=given, position="last-prompt", norm_limit=100.0)
    assert (means.count(3) == 1).all()
    assert means.skipped == {"without a prompt and its answer": 2 * len(WORDS)}
    for row, word in enumerate(WORDS):
        expected = stream(folder, prompt.format(word))[0][3][-1]
        assert np.abs(means.mean(3)[row] - expected).max() <= 1e-5 * np.linalg.norm(expected)


def test_ordinary_text_gives_norms_and_mean(folder: Path, tmp_path: Path):
    from daco_rt.concepts import ORDINARY_TEXTS

    means = harvest(folder, tmp_path / "m")
    rows = np.concatenate([stream(folder, text)[0][3][1:] for text in ORDINARY_TEXTS])
    norms = np.linalg.norm(rows, axis=1)
    assert means.median_norm[3] == pytest.approx(np.median(norms), rel=1e-5)
    expected = rows[norms <= 4 * np.median(norms)].mean(axis=0)
    assert np.allclose(means.ordinary(3), expected, atol=1e-5 * np.linalg.norm(expected))


def test_a_text_without_the_word_is_skipped_and_counted(folder: Path, tmp_path: Path):
    means = harvest(folder, tmp_path / "m")
    assert means.skipped == {"without the word": len(WORDS)}
    assert not means.count(1, sign=-1).any() and (means.count(1) == 3).all()


def test_unusable_items_are_listed(folder: Path, tmp_path: Path):
    bad = [
        HarvestItem(2, 1, " \n", None, None, None, "blank"),
        replace(items()[0], text="<|im_start|>The dagger", start=16, end=22),
    ]
    means = harvest(folder, tmp_path / "m", items=[*items(), *bad])
    assert means.problems == [
        {"id": "dagger 0", "concept": "0", "reason": "duplicate id"},
        {"id": "blank", "concept": "2", "reason": "empty text"},
    ]
    assert means.skipped["duplicate id"] == means.skipped["empty text"] == 1
    whole = harvest(folder, tmp_path / "n")
    assert np.array_equal(whole.mean(3), means.mean(3)) and means.stimuli == whole.stimuli + 2


def test_stopping_anywhere_changes_nothing(folder: Path, tmp_path: Path, monkeypatch: Any):
    whole = tree(harvest(folder, tmp_path / "whole").path)
    assert len(whole) == 3 + 2 * 3
    make = module.ShardWorker.make

    for stop in range(3):
        calls = 0

        def dying(*arguments: Any, stop: int = stop) -> int:
            nonlocal calls
            if calls == stop:
                raise KeyboardInterrupt
            calls += 1
            return make(*arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module.ShardWorker, "make", dying)
            harvest(folder, tmp_path / f"cut{stop}")
        cut = open_means(tmp_path / f"cut{stop}", complete=False)
        assert cut.missing == list(range(stop, 3))
        with pytest.raises(ArtifactError, match=r"not complete: .* of 3 shards are missing"):
            open_means(cut.path)
        # What is there can be read; what is not counts nothing.
        assert (cut.count(1) > 0).sum() == min(8, 3 * stop)
        harvest(folder, cut.path)
        assert tree(cut.path) == whole


def test_a_finished_harvest_is_left_alone(folder: Path, tmp_path: Path):
    means = harvest(folder, tmp_path / "m")
    stamps = {file: file.stat().st_mtime_ns for file in means.path.rglob("*")}
    harvest(folder, tmp_path / "m")
    assert stamps == {file: file.stat().st_mtime_ns for file in means.path.rglob("*")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": items()[:-1]}, r"another recipe \(stimuli, stimuli_sha256\)"),
        ({"blocks": (1,)}, "another blocks"),
        ({"position": "last"}, "another position"),
        ({"batch_tokens": 32}, r"another recipe \(batch_tokens\)"),
        ({"concepts_per_shard": 4}, "another concepts_per_shard, shards"),
    ],
)
def test_another_harvest_is_not_continued(folder: Path, tmp_path: Path, change: dict[str, Any], message: str):
    harvest(folder, tmp_path / "m")
    before = tree(tmp_path / "m")
    with pytest.raises(ArtifactError, match=message):
        harvest(folder, tmp_path / "m", **change)
    assert tree(tmp_path / "m") == before
    again = harvest(folder, tmp_path / "m", overwrite=True, **change)
    assert again.missing == [] and tree(tmp_path / "m") != before


def test_another_model_is_refused(folder: Path, tmp_path: Path):
    harvest(folder, tmp_path / "m")
    other = replace(pocket(folder)[2], samples=(0.5,) * len(pocket(folder)[2].samples))
    with pytest.raises(ArtifactError, match=r"begun with another model \(samples\)"):
        harvest(folder, tmp_path / "m", identity=other)


def test_another_folder_is_not_overwritten(folder: Path, tmp_path: Path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ArtifactError, match="holds no means"):
            harvest(folder, tmp_path / "notes", overwrite=overwrite)
    (tmp_path / "empty").mkdir()
    assert harvest(folder, tmp_path / "empty").missing == []


def test_nan_names_the_stimulus(folder: Path, tmp_path: Path):
    model, tokenizer, _ = pocket(folder)
    token = tokenizer(" casino", add_special_tokens=False)["input_ids"][-1]
    embedding = model.get_input_embeddings()

    def spoil(_module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.where((args[0] == token)[..., None], torch.nan, output)

    handle = embedding.register_forward_hook(spoil)
    try:
        with pytest.raises(DacoError, match=r"stimulus 'casino \d' of concept 7 gives NaN or Inf at block 1"):
            harvest(folder, tmp_path / "m", position="last", items=items(False))
    finally:
        handle.remove()
    assert open_means(tmp_path / "m", complete=False).missing == [2]
    assert harvest(folder, tmp_path / "m", position="last", items=items(False)).missing == []


def test_nan_in_a_row_that_is_only_kept_names_the_stimulus(folder: Path, tmp_path: Path):
    def spoil(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        output[:, -1] = torch.nan
        return output

    item = HarvestItem(1, 1, "<|im_start|>the dagger or the casino", 16, 22, None, "one")
    # Ordinary text is read before the model is spoilt; the reading itself is sound.
    before = tree(harvest(folder, tmp_path / "m", items=[item]).path)
    handle = text_model_of(pocket(folder)[0]).layers[BLOCKS[-1]].register_forward_hook(spoil)
    try:
        with pytest.raises(DacoError, match="stimulus 'one' of concept 1 gives NaN or Inf at block 3"):
            harvest(folder, tmp_path / "m", items=[item], activations=tmp_path / "s")
    finally:
        handle.remove()
    assert tree(tmp_path / "m") == before


def test_activations_are_kept_in_the_same_pass(folder: Path, tmp_path: Path):
    means = harvest(folder, tmp_path / "m", activations=tmp_path / "s", norm_limit=100.0)
    alone = harvest(folder, tmp_path / "alone", norm_limit=100.0)
    assert tree(means.path) == tree(alone.path)
    # Also where some stimuli are only kept, in batches whose sizes would change with them.
    long = [HarvestItem(1, 1, f"<|im_start|>{'so ' * n}it is", None, None, None, f"{n}") for n in range(40)]
    mixed = {"items": [*items(), *long], "norm_limit": 100.0, "batch_tokens": 512, "concepts_per_shard": 8}
    kept = harvest(folder, tmp_path / "k", activations=tmp_path / "t", **mixed)
    assert tree(kept.path) == tree(harvest(folder, tmp_path / "l", **mixed).path)
    store = open_store(tmp_path / "s")
    table = list(ItemTable(items(), len(WORDS)))
    assert store.shards == means.shards.count
    for shard in range(store.shards):
        text, token = store.origins(3, shard)
        rows = store.chunk(3, shard).astype(np.float32)
        for place in np.unique(text):
            expected = stream(folder, table[place].text)[0][3][1:]
            mine = text == place
            assert token[mine].tolist() == list(range(1, len(expected) + 1))
            assert np.abs(rows[mine] - expected).max() <= 2**-8 * np.abs(expected).max()
    # Beginning anew would leave a store of the old harvest.
    with pytest.raises(ArtifactError, match="does not replace an activation store"):
        harvest(folder, tmp_path / "m", activations=tmp_path / "s", norm_limit=2.0, overwrite=True)
    assert tree(means.path) == tree(alone.path)
    # Means that are there do not keep a store from being filled.
    for file in (tmp_path / "s" / "commits").iterdir():
        file.unlink()
    before = tree(tmp_path / "s")
    harvest(folder, tmp_path / "m", activations=tmp_path / "s", norm_limit=100.0)
    assert {name: before[name] for name in before} == {
        name: data for name, data in tree(tmp_path / "s").items() if "commits" not in name
    }


def test_concepts_without_a_stimulus_cost_nothing(folder: Path, tmp_path: Path):
    means = harvest(folder, tmp_path / "m", items=[item for item in items() if item.concept == 7])
    assert [file.name for file in (means.path / "shards").iterdir()] == ["00002.safetensors"]
    assert means.count(1).tolist() == [0] * 7 + [3] and not means.mean(1)[:7].any()


def test_damage_is_found(folder: Path, tmp_path: Path):
    path = harvest(folder, tmp_path / "m").path
    file = path / "shards" / "00001.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-4])
    with pytest.raises(ArtifactError, match=r"00001.safetensors is missing or damaged; delete .*00001.json"):
        open_means(path)
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    open_means(path)
    with pytest.raises(ArtifactError, match=r"00001\.safetensors is missing or damaged"):
        open_means(path, verify=True)
    file.write_bytes(data)
    open_means(path, verify=True)
    (path / "concepts.jsonl").write_text("")
    with pytest.raises(ArtifactError, match=r"concepts\.jsonl"):
        open_means(path)
    with pytest.raises(ArtifactError, match=r"holds no means\.json; expected the folder of concept means"):
        open_means(tmp_path)


THREE = [(0, 2), (2, 5), (5, 9)]


@pytest.mark.parametrize(
    ("tokens", "rule", "expected"),
    [
        (Tokens([1, 2, 3], THREE, (2, 9)), "word", [2]),
        (Tokens([1, 2, 3], THREE, (2, 9)), "word-mean", [1, 2]),
        (Tokens([1, 2, 3], THREE, (5, 9)), "before-word", [1]),
        (Tokens([1, 2, 3], THREE, (2, 9)), "before-word", "nothing to read but position 0"),
        (Tokens([1, 2, 3], THREE, (0, 2)), "word", "nothing to read but position 0"),
        (Tokens([1, 2], [(0, 2), (2, 5)], None), "word", "without the word"),
        (Tokens([1, 2], [(0, 2), (2, 5)], (5, 9), cut=True), "word", "cut off before the position"),
        (Tokens([1, 2], [(0, 2), (2, 5)], (2, 5), cut=True), "last", "cut off before the position"),
        (Tokens([1, 2, 3], THREE, (2, 9)), "last-prompt", "without a prompt and its answer"),
        (Tokens([1, 2, 3], THREE, None, answer=5), "last-prompt", [1]),
        (Tokens([1, 2, 3], THREE, None, answer=8), "last-prompt", [1]),
        (Tokens([1, 2, 3], THREE, None, answer=9), "last-prompt", [2]),
        (Tokens([1, 2, 3], THREE, None, answer=2), "last-prompt", "nothing to read but position 0"),
        (Tokens([1, 2, 3], THREE, None, answer=9, cut=True), "last-prompt", "cut off before the position"),
        (Tokens([1, 2], [(0, 2), (2, 5)], (2, 5)), "image", "without a picture"),
        (Tokens([1, 2, 3], [(0, 1)] * 3, None, np.array([True, True, False])), "image", [1]),
    ],
)  # fmt: skip
def test_rules(tokens: Tokens, rule: str, expected: list[int] | str):
    found, reason = find_positions(rule, tokens)
    assert (reason or found) == expected


def test_items_come_back_ordered(tmp_path: Path):
    given = [*items(), HarvestItem(0, 1, "ünï", 0, 1, Path("a b.jpg"), "π")]
    table = ItemTable(given, len(WORDS))
    assert list(table) == sorted(given, key=lambda item: (item.concept, -item.sign))
    assert (
        table.select(range(1))[-2] == given[-1]
        and table.sample_pictures(9) == [given[-1]]
        and table.signs == (1, -1)
    )
    assert [item for i in range(0, 8, 2) for item in table.select(range(i, i + 2))] == list(table)
    assert table.sha256() == ItemTable(reversed(list(reversed(given))), len(WORDS)).sha256()
    hashes = {table.sha256()}
    for change in ({"text": "x", "end": 1}, {"image": None}, {"id": "q"}, {"start": None, "end": None}):
        hashes.add(ItemTable([*items(), replace(given[-1], **change)], len(WORDS)).sha256())
    assert len(hashes) == 5


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (HarvestItem(8, 1, "a", None, None, None, "x"), "stimulus 'x' is for concept 8, the table has 8"),
        (HarvestItem(0, 2, "a", None, None, None, "x"), "sign 2"),
        (HarvestItem(0, 1, "a", 0, 2, None, "x"), "marks characters 0 to 2 of a text of 1"),
        (HarvestItem(0, 1, "a", 0, None, None, "x"), "marks characters"),
    ],
)
def test_items_that_cannot_be(item: HarvestItem, message: str):
    with pytest.raises(DacoError, match=message):
        ItemTable([item], len(WORDS))


def test_nothing_to_harvest():
    with pytest.raises(DacoError, match="nothing to harvest"):
        ItemTable([], 3)


def write_stimuli(path: Path) -> None:
    with path.open("w") as file:
        for item in items(counterexamples=False):
            row = {"concept": item.concept, "name": WORDS[item.concept], "kind": "sentence"}
            file.write(json.dumps(row | {"text": item.text, "start": item.start, "end": item.end}) + "\n")


def test_the_command(folder: Path, tmp_path: Path, capsys: Any):
    write_stimuli(tmp_path / "texts.jsonl")
    (tmp_path / "table.jsonl").write_text("".join(json.dumps({"name": word}) + "\n" for word in WORDS))
    command = [
        "harvest", str(tmp_path / "texts.jsonl"), "--table", str(tmp_path / "table.jsonl"),
        "--checkpoint", str(folder), "--blocks", "1,3", "--output", str(tmp_path / "m"),
        "--concepts-per-shard", "3", "--batch-tokens", "64", "--device", "cpu",
    ]  # fmt: skip
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stimuli"] == len(WORDS) * len(TEMPLATES) and found["skipped"] == {}
    assert [row["readings"] for row in found["blocks"]] == [24, 24]
    by_hand = harvest(folder, tmp_path / "n", items=text_items(tmp_path / "texts.jsonl"))
    assert np.array_equal(open_means(tmp_path / "m").mean(3), by_hand.mean(3))
    # A second call has nothing to do; another table does not fit.
    assert main(command) == 0 and "24 stimuli read at 'word'" in capsys.readouterr().out
    table = [{"name": word} for word in reversed(WORDS)]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    assert main(command) == 2
    assert "line 1: row 0 is 'dagger', in the table 'casino'" in capsys.readouterr().err
    assert main(["harvest", "x", "--table", "built-in", "--blocks", "3-", "--output", "y"]) == 2
    assert "--blocks: '3-' is no list" in capsys.readouterr().err


def test_documented_positions_are_those_of_the_command():
    from daco_rt.cli.harvest import POSITIONS

    assert set(POSITIONS) == set(RULES)
    assert concepts()[0].name == "dagger"
