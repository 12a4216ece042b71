"""The activation store: what enters, what a kill leaves, the order in which rows come out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sae_samples import BLOCK, DIM, MODEL, rows, store

from daco_rt.artifacts import ModelIdentity
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.models import model_identity, pocket, resolve_checkpoint
from daco_rt.sae import (
    LiveSource,
    ShuffledRows,
    StoreSource,
    TextReader,
    create_store,
    harvest_activations,
    open_store,
)

TEXTS = [
    f"<|im_start|>The {word} is here, and nobody knows why." for word in ("dog", "house", "old tree")
] + [
    "<|im_start|>user\nWhat is a dagger?<|im_end|>\n",
    "",
    "<|im_start|>One two three four five six seven eight nine ten.",
]


@pytest.fixture(scope="module")
def pocket_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, ModelIdentity]:
    from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DACO_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = pocket.ensure(progress=False)
    model = InternVLForConditionalGeneration.from_pretrained(folder).eval()
    identity = model_identity(resolve_checkpoint("internvl", folder))
    return model, PreTrainedTokenizerFast.from_pretrained(folder), identity


def begin(path: Path, **changes: Any) -> Any:
    options = {"model": MODEL, "blocks": [1, BLOCK], "median_norm": {1: 1.0, BLOCK: 1.0}, "shards": 2}
    return create_store(path, **{**options, **changes})


@pytest.mark.parametrize(("dtype", "error"), [("fp32", 0.0), ("bf16", 2.0**-8)])
def test_rows_come_back_in_their_dtype(tmp_path: Path, dtype: str, error: float):
    made = begin(tmp_path / "s", dtype=dtype, norm_limit=100.0)
    table = rows(20)
    made.add(0, {1: table, BLOCK: table * 2}, text=np.arange(20), token=np.ones(20))
    got = made.chunk(BLOCK, 0)
    assert got.dtype.name == {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    assert np.abs(got.astype(np.float32) - table * 2).max() <= error * np.abs(table * 2).max()


def test_first_tokens_and_outliers_stay_out_block_by_block(tmp_path: Path):
    made = begin(tmp_path / "s", median_norm={1: 1.0, BLOCK: 10.0}, norm_limit=4.0)
    table = np.zeros((5, DIM), np.float32)
    table[:, 0] = [1, 3.9, 4.1, 1, 100]
    kept = made.add(0, {1: table, BLOCK: table}, text=[7, 7, 7, 8, 8], token=[1, 2, 3, 0, 1])
    assert kept == {1: 2, BLOCK: 3}
    assert made.chunk(1, 0)[:, 0].astype(float) == pytest.approx([1, 3.9], rel=1e-2)
    assert (made.rejected(1), made.rejected(BLOCK)) == (2, 1)
    text, token = made.origins(BLOCK, 0)
    assert text.tolist() == [7, 7, 7] and token.tolist() == [1, 2, 3]


def test_a_store_is_incomplete_until_its_last_commit(tmp_path: Path):
    made = begin(tmp_path / "s")
    with pytest.raises(ArtifactError, match="2 of 2 shards are missing"):
        open_store(made.path)
    for shard in range(2):
        made.add(shard, {1: rows(3), BLOCK: rows(3)}, text=[0, 1, 2], token=[1, 1, 1])
    assert open_store(made.path, verify=True).missing == []


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damage_is_found_and_named(tmp_path: Path, damage: str):
    made = store(tmp_path / "s", shards=1)
    file = made.path / f"block-{BLOCK:03d}" / "00000.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        data[-1] ^= 1
        file.write_bytes(data[:-4] if damage == "cut" else data)
    with pytest.raises(ArtifactError, match=r"00000\.safetensors is missing or damaged"):
        open_store(made.path, verify=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": [BLOCK]}, "another blocks"),
        ({"recipe": {"texts": 2}}, "another recipe"),
        ({"dtype": "fp32", "shards": 3}, "another dtype, shards"),
        ({"dtype": "fp16"}, "dtype must be one of fp32, bf16"),
        ({"median_norm": {1: 1.0}}, "median_norm must be positive"),
        ({"shards": 0}, "at least one shard"),
    ],
)
def test_another_store_is_not_continued(tmp_path: Path, change: dict[str, Any], message: str):
    begin(tmp_path / "s")
    with pytest.raises(ArtifactError, match=message):
        begin(tmp_path / "s", **change)


def test_bad_input_is_one_sentence(tmp_path: Path):
    made = begin(tmp_path / "s")
    table = rows(3)
    bad = table.copy()
    bad[1, 2] = np.nan
    where = {"text": [4, 5, 6], "token": [1, 2, 3]}
    with pytest.raises(ArtifactError, match=f"text 5 gives NaN or Inf at block {BLOCK}, token 2"):
        made.add(0, {1: table, BLOCK: bad}, **where)
    with pytest.raises(ArtifactError, match="rows are for blocks"):
        made.add(0, {1: table}, **where)
    with pytest.raises(ArtifactError, match="give 0 to 1"):
        made.add(2, {1: table, BLOCK: table}, **where)
    with pytest.raises(ArtifactError, match=r"must be \[3, 16\]"):
        made.add(0, {1: table[:, :4], BLOCK: table}, **where)
    with pytest.raises(ArtifactError, match="has no block 9; available: 1, 3"):
        made.chunk(9, 0)
    with pytest.raises(ArtifactError, match="is not there yet"):
        made.chunk(1, 0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(ArtifactError, match=r"holds no store\.json"):
        begin(tmp_path / "other")
    (made.path / "store.json").write_text(json.dumps({"format": "daco_rt.activations", "version": 9}))
    with pytest.raises(ArtifactError, match="version 9, expected"):
        open_store(made.path)


# ---- the order of rows


class Counting:
    """Chunks of different lengths, one of them empty, whose rows are numbered."""

    dim = 1
    lengths = (5, 0, 9, 2, 7)
    chunks = len(lengths)

    def chunk(self, index: int) -> np.ndarray:
        start = sum(self.lengths[:index])
        return np.arange(start, start + self.lengths[index], dtype=np.float32)[:, None]

    def describe(self) -> dict[str, Any]:
        return {}


def feed(**changes: Any) -> ShuffledRows:
    return ShuffledRows(Counting(), range(5), **{"batch": 4, "buffer_rows": 8, "seed": 3, **changes})


def test_every_row_comes_once_an_epoch_in_another_order():
    total = sum(Counting.lengths)
    drawn = np.concatenate([feed_.draw() for feed_ in [feed(batch=1)] for _ in range(3 * total)])[:, 0]
    epochs = drawn.reshape(3, total)
    for epoch in epochs:
        assert sorted(epoch) == list(range(total))
    assert not (epochs[0] == epochs[1]).all() and not (epochs[0] == np.arange(total)).all()


@pytest.mark.parametrize("buffer_rows", [1, 8, 1000])
def test_a_restored_feed_goes_on_at_the_next_row(buffer_rows: int):
    whole = feed(buffer_rows=buffer_rows)
    expected = [whole.draw() for _ in range(20)]
    for stop in range(20):
        first = feed(buffer_rows=buffer_rows)
        for _ in range(stop):
            first.draw()
        second = feed(buffer_rows=buffer_rows)
        second.restore(json.loads(json.dumps(first.state)))
        assert (second.draw() == expected[stop]).all()


def test_an_empty_source_is_refused():
    with pytest.raises(DacoError, match="holds no rows"):
        ShuffledRows(Counting(), [1], batch=2, buffer_rows=4, seed=0).draw()


# ---- from texts


def harvest(pocket_model: Any, path: Path, **changes: Any) -> Any:
    model, tokenizer, identity = pocket_model
    options = {"identity": identity, "texts_per_shard": 2, "dtype": "fp32", "progress": False, **changes}
    return harvest_activations(model, tokenizer, TEXTS, [2, 3], path, **options)


def test_harvested_rows_are_the_hidden_states(pocket_model: Any, tmp_path: Path):
    import torch

    model, tokenizer, _ = pocket_model
    made = harvest(pocket_model, tmp_path / "s", norm_limit=1e9)
    assert made.shards == 3 and made.missing == []
    for number, text in enumerate(TEXTS):
        shard = number // 2
        owners, tokens = made.origins(3, shard)
        if not text:
            assert number not in owners
            continue
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            states = model(input_ids=inputs["input_ids"], output_hidden_states=True).hidden_states
        mine = owners == number
        assert tokens[mine].tolist() == list(range(1, inputs["input_ids"].shape[1]))
        # hidden_states[0] are the embeddings, so block 2's output is number 3.
        expected = states[3][0, 1:].numpy()
        assert np.allclose(made.chunk(2, shard)[mine], expected, atol=1e-4 * np.abs(expected).max())


def test_only_kept_rows_are_stored(pocket_model: Any, tmp_path: Path):
    model, tokenizer, identity = pocket_model
    whole = harvest(pocket_model, tmp_path / "whole", norm_limit=1e9)
    lengths = [len(ids) for ids in tokenizer(TEXTS, add_special_tokens=False)["input_ids"]]
    kept = [[n - 1] if n > 3 else [] for n in lengths]
    kept[0] = [1, 2, 5000]  # the last is cut off
    made = harvest(pocket_model, tmp_path / "s", norm_limit=1e9, position="word", kept=kept)
    expected = [(text, at) for text, row in enumerate(kept) for at in row if at < lengths[text]]
    found = []
    for shard in range(made.shards):
        owners, tokens = made.origins(3, shard)
        found += list(zip(owners.tolist(), tokens.tolist(), strict=True))
        all_owners, all_tokens = whole.origins(3, shard)
        for owner, token, row in zip(owners, tokens, made.chunk(3, shard), strict=True):
            same = whole.chunk(3, shard)[(all_owners == owner) & (all_tokens == token)]
            assert np.array_equal(same[0], row)
    assert sorted(found) == expected
    reader = TextReader(model, tokenizer, TEXTS, (3,), texts_per_shard=2, position="word", kept=kept)
    live = LiveSource(reader, identity.hidden_size, norm_limit=1e9)
    assert np.allclose(live.chunk(0), made.chunk(3, 0), rtol=1e-5, atol=1e-5)
    # Other rows of the same texts are another store.
    with pytest.raises(ArtifactError, match="another recipe"):
        harvest(pocket_model, tmp_path / "s", norm_limit=1e9, position="word", kept=[[1]] * len(TEXTS))
    with pytest.raises(DacoError, match="kept is of 1 texts, expected"):
        harvest(pocket_model, tmp_path / "t", kept=[[1]])


def test_a_harvest_goes_on_where_it_stopped(pocket_model: Any, tmp_path: Path, monkeypatch: Any):
    whole = harvest(pocket_model, tmp_path / "whole")
    read, count = TextReader.read, 0

    def dying(self: TextReader, shard: int) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return read(self, shard)

    monkeypatch.setattr(TextReader, "read", dying)
    with pytest.raises(KeyboardInterrupt):
        harvest(pocket_model, tmp_path / "cut")
    monkeypatch.undo()
    assert open_store(tmp_path / "cut", complete=False).missing == [2]
    cut = harvest(pocket_model, tmp_path / "cut")
    assert cut.median_norm == whole.median_norm
    for file in sorted(whole.path.rglob("*.safetensors")):
        assert file.read_bytes() == (cut.path / file.relative_to(whole.path)).read_bytes()
    stamps = {file: file.stat().st_mtime_ns for file in cut.path.rglob("*.safetensors")}
    harvest(pocket_model, tmp_path / "cut")
    assert stamps == {file: file.stat().st_mtime_ns for file in cut.path.rglob("*.safetensors")}


def test_live_rows_are_the_stored_ones(pocket_model: Any, tmp_path: Path):
    model, tokenizer, identity = pocket_model
    made = harvest(pocket_model, tmp_path / "s")
    live = LiveSource(TextReader(model, tokenizer, TEXTS, (3,), texts_per_shard=2), identity.hidden_size)
    stored = StoreSource(made, 3)
    assert (live.dim, live.chunks) == (stored.dim, stored.chunks)
    for index in range(live.chunks):
        # Reading fewer blocks ends the pass earlier and may change the last bit, no more.
        assert np.allclose(live.chunk(index), stored.chunk(index), rtol=1e-5, atol=1e-5)


def test_texts_that_cannot_be_read(pocket_model: Any, tmp_path: Path):
    model, tokenizer, identity = pocket_model
    with pytest.raises(DacoError, match="there is no text"):
        harvest_activations(model, tokenizer, [], [1], tmp_path / "a", identity=identity)
    with pytest.raises(DacoError, match="no row to read behind"):
        harvest_activations(model, tokenizer, ["", ""], [1], tmp_path / "a", identity=identity)
    with pytest.raises(DacoError, match="blocks must be one or more of 0 to"):
        harvest_activations(model, tokenizer, TEXTS, [99], tmp_path / "a", identity=identity)
    harvest(pocket_model, tmp_path / "b")
    with pytest.raises(ArtifactError, match="another recipe"):
        harvest_activations(
            model, tokenizer, TEXTS[:-1], [2, 3], tmp_path / "b", identity=identity, dtype="fp32",
            texts_per_shard=2, progress=False,
        )  # fmt: skip
