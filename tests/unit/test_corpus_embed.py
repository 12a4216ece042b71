"""Embeddings of a corpus: encoders of real classes with random weights, shards, kills and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_models import save_embedder
from corpus_samples import CAPTIONS, folder, picture

from daco_rt.corpus import FolderCorpus
from daco_rt.errors import ArtifactError, CheckpointError, DacoError, UnsupportedError

pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra 'corpus')")

from daco_rt.corpus.embed import embed_corpus
from daco_rt.corpus.embeddings import open_embeddings
from daco_rt.corpus.encoders import load_encoder
from daco_rt.corpus.text import TextCorpus


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("embedders")
    return {kind: save_embedder(place / kind, kind) for kind in ("clip", "siglip", "bert")}


@pytest.fixture(scope="module")
def clip(folders: dict[str, Path]) -> Any:
    return load_encoder(folders["clip"])


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_vectors_are_those_of_the_model_whatever_the_batch(folders: dict[str, Path], kind: str):
    import torch
    from transformers import AutoModel, AutoTokenizer

    encoder = load_encoder(folders[kind])
    texts = encoder.texts(CAPTIONS)
    assert texts.shape == (len(CAPTIONS), encoder.dim) and texts.dtype == np.float32
    assert np.linalg.norm(texts, axis=1) == pytest.approx(1)
    model, tokens = AutoModel.from_pretrained(folders[kind]), AutoTokenizer.from_pretrained(folders[kind])
    for caption, got in zip(CAPTIONS, texts, strict=True):
        padding = "max_length" if kind == "siglip" else False
        fed = tokens(caption, padding=padding, max_length=12, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            want = model.get_text_features(fed["input_ids"], fed["attention_mask"]).pooler_output[0]
        assert got @ (want / want.norm()).numpy() == pytest.approx(1, abs=1e-5)
    pictures = [picture(i, (20, 30)) for i in range(3)]
    together = encoder.images(pictures)
    assert np.abs(together - np.concatenate([encoder.images([p]) for p in pictures])).max() < 1e-5
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_a_text_model_averages_over_its_tokens(folders: dict[str, Path]):
    import torch
    from transformers import AutoModel, AutoTokenizer

    encoder = load_encoder(folders["bert"])
    model, tokens = AutoModel.from_pretrained(folders["bert"]), AutoTokenizer.from_pretrained(folders["bert"])
    for caption, got in zip(CAPTIONS, encoder.texts(CAPTIONS), strict=True):
        with torch.inference_mode():
            want = (
                model(**tokens(caption, return_tensors="pt", truncation=True, max_length=12))
                .last_hidden_state[0]
                .mean(0)
            )
        assert got @ (want / want.norm()).numpy() == pytest.approx(1, abs=1e-5)
    with pytest.raises(UnsupportedError, match="texts only"):
        encoder.images([picture(0)])


def test_the_pooling_of_a_sentence_embedder_is_followed(folders: dict[str, Path], tmp_path: Path):
    import shutil

    shutil.copytree(folders["bert"], tmp_path / "m")
    (tmp_path / "m" / "1_Pooling").mkdir()
    config = tmp_path / "m" / "1_Pooling" / "config.json"
    config.write_text('{"pooling_mode_cls_token": true}')
    assert load_encoder(tmp_path / "m").pooling == "cls"
    config.write_text('{"pooling_mode_mean_tokens": false, "pooling_mode_max_tokens": true}')
    with pytest.raises(UnsupportedError, match="pooling"):
        load_encoder(tmp_path / "m")


@pytest.mark.parametrize("damage", ["none", "no processor", "no weights", "language model"])
def test_what_is_no_embedder_is_refused_in_one_sentence(
    folders: dict[str, Path], tmp_path: Path, damage: str
):
    import shutil

    place = tmp_path / "m"
    if damage == "language model":
        import transformers as hf

        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = hf.LlamaConfig(vocab_size=50, **sizes)
        hf.LlamaForCausalLM(config).save_pretrained(place)
        shutil.copy(folders["clip"] / "tokenizer.json", place)
        shutil.copy(folders["clip"] / "tokenizer_config.json", place)
    elif damage != "none":
        shutil.copytree(folders["clip"], place)
        (
            place / {"no processor": "preprocessor_config.json", "no weights": "model.safetensors"}[damage]
        ).unlink()
    with pytest.raises(CheckpointError) as error:
        load_encoder(place)
    assert "\n" not in str(error.value)


def test_rows_are_the_vectors_of_the_pairs_in_order(tmp_path: Path, clip: Any):
    corpus = FolderCorpus(folder(tmp_path / "c"))
    store = embed_corpus(corpus, clip, tmp_path / "e", batch=2, shard_pairs=2, progress=False)
    assert (store.rows, store.shards) == (len(CAPTIONS), 3)
    image, text = store.block(0, store.rows)
    assert image is not None and image.dtype == np.float16
    assert np.abs(text - clip.texts(CAPTIONS)).max() < 1e-3
    assert np.abs(image - clip.images([picture(i) for i in range(len(CAPTIONS))])).max() < 1e-3
    for start, stop in ((1, 4), (2, 4), (3, 3), (0, 5)):
        part = store.block(start, stop)
        assert (part[0] == image[start:stop]).all() and (part[1] == text[start:stop]).all()
    taken = store.take(np.array([4, 0, 3]))
    assert (taken[0] == image[[4, 0, 3]]).all() and (taken[1] == text[[4, 0, 3]]).all()
    assert [(p.id, p.caption, p.image_ref) for p in store.pairs([4, 0, 4])] == [
        (f"p{i}", CAPTIONS[i], f"images/{i}.png") for i in (4, 0, 4)
    ]


def test_broken_pictures_have_no_row_and_are_listed(tmp_path: Path, clip: Any):
    place = folder(tmp_path / "c")
    for i in (0, 1, 4):
        (place / "images" / f"{i}.png").write_bytes(b"no picture")
    store = embed_corpus(FolderCorpus(place), clip, tmp_path / "e", shard_pairs=2, progress=False)
    assert [pair.id for pair in store.pairs(range(store.rows))] == ["p2", "p3"]
    problems = open_embeddings(tmp_path / "e", verify=True).problems()
    assert problems.counts == {"picture broken": 3}
    assert [entry["pair"] for entry in problems.listed] == ["p0", "p1", "p4"]
    for file in place.glob("images/*"):
        file.write_bytes(b"")
    with pytest.raises(DacoError, match="no pair of the corpus could be embedded"):
        embed_corpus(FolderCorpus(place), clip, tmp_path / "e2", progress=False)


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", range(5))
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, clip: Any, at: int, monkeypatch: pytest.MonkeyPatch
):
    place = folder(tmp_path / "c")
    whole = embed_corpus(
        FolderCorpus(place), clip, tmp_path / "whole", batch=1, shard_pairs=2, progress=False
    )
    calls, real = [], type(clip).images

    def dying(self: Any, images: Any) -> Any:
        calls.append(1)
        if len(calls) == at + 1:
            raise Killed
        return real(self, images)

    monkeypatch.setattr(type(clip), "images", dying)
    with pytest.raises(Killed):
        embed_corpus(FolderCorpus(place), clip, tmp_path / "e", batch=1, shard_pairs=2, progress=False)
    with pytest.raises(ArtifactError, match="not complete"):
        open_embeddings(tmp_path / "e")
    calls.clear()
    calls.extend([1] * 99)
    store = embed_corpus(FolderCorpus(place), clip, tmp_path / "e", batch=1, shard_pairs=2, progress=False)
    assert len(calls) - 99 == len(CAPTIONS) - at // 2 * 2, "committed shards are not computed again"
    assert tree(store.path) == tree(whole.path)


def tree(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
    }


def test_a_store_of_something_else_is_not_continued(tmp_path: Path, clip: Any, folders: dict[str, Path]):
    corpus = FolderCorpus(folder(tmp_path / "c"))
    embed_corpus(corpus, clip, tmp_path / "e", progress=False)
    with pytest.raises(ArtifactError, match="another dim, encoder"):
        embed_corpus(corpus, load_encoder(folders["siglip"]), tmp_path / "e", progress=False)
    (tmp_path / "t.txt").write_text("a dagger\n")
    with pytest.raises(ArtifactError, match=r"another corpus \(kind, file, sha256\), images"):
        embed_corpus(TextCorpus(tmp_path / "t.txt"), clip, tmp_path / "e", progress=False)
    with pytest.raises(ArtifactError, match="not empty"):
        embed_corpus(corpus, clip, tmp_path / "c", progress=False)


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
def test_damage_is_found(tmp_path: Path, clip: Any, suffix: str):
    embed_corpus(FolderCorpus(folder(tmp_path / "c")), clip, tmp_path / "e", progress=False)
    file = tmp_path / "e" / "shards" / f"00000.{suffix}"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    open_embeddings(tmp_path / "e")
    with pytest.raises(ArtifactError, match="missing or damaged"):
        open_embeddings(tmp_path / "e", verify=True)
    file.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match="missing or damaged"):
        open_embeddings(tmp_path / "e")


def test_vectors_that_are_no_numbers_are_refused_by_pair(
    tmp_path: Path, clip: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(type(clip), "texts", lambda self, texts: np.full((len(texts), self.dim), np.nan))
    with pytest.raises(ArtifactError, match="text embedding of pair 'p0' is zero, NaN"):
        embed_corpus(FolderCorpus(folder(tmp_path / "c")), clip, tmp_path / "e", progress=False)


def test_an_empty_corpus_is_refused(tmp_path: Path, clip: Any):
    (tmp_path / "t.txt").write_text("\n \n")
    with pytest.raises(DacoError, match="no usable pair"):
        embed_corpus(TextCorpus(tmp_path / "t.txt"), clip, tmp_path / "e", progress=False)
