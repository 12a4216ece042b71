"""Readers of corpora, and what they say of bad input."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from corpus_samples import CAPTIONS, folder, picture, picture_bytes, shows, tar

from daco_rt.corpus import Corpus, FolderCorpus
from daco_rt.corpus.cc3m import Cc3mCorpus
from daco_rt.corpus.open import open_corpus
from daco_rt.corpus.pairs import Problems, clean_caption
from daco_rt.corpus.text import TextCorpus
from daco_rt.corpus.webdataset import WebdatasetCorpus
from daco_rt.errors import DacoError

URLS = [f"http://example.org/{i}.jpg" for i in range(5)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DACO_RT_CACHE", str(tmp_path / "cache"))


def read(corpus: Corpus) -> list[tuple[str, str, str]]:
    first = [(pair.id, pair.caption, pair.image_ref) for pair in corpus]
    counts = dict(corpus.problems.counts)
    assert [(pair.id, pair.caption, pair.image_ref) for pair in corpus] == first
    assert dict(corpus.problems.counts) == counts, "each iteration counts anew"
    return first


# ---- every reader, the same pairs


def make_cc3m(path: Path, naming: str = "row") -> Corpus:
    (path / "images" / "0000").mkdir(parents=True)
    lines = [f"{caption}\t{url}\n" for caption, url in zip(CAPTIONS, URLS, strict=True)]
    (path / "t.tsv").write_text("".join(lines), encoding="utf-8")
    mapping = []
    for i, url in enumerate(URLS):
        name = (
            f"{i:09d}"
            if naming == "row"
            else hashlib.new(naming if naming != "map" else "md5", url.encode()).hexdigest()
        )
        picture(i).save(path / "images" / "0000" / f"{name}.png")
        mapping.append(f"{url if i % 2 else i}\t0000/{name}.png\n")
    (path / "map.tsv").write_text("".join(mapping))
    return Cc3mCorpus(path / "t.tsv", path / "images", naming=path / "map.tsv" if naming == "map" else naming)


def make_webdataset(path: Path) -> Corpus:
    samples: dict[str, bytes] = {}
    for i, caption in enumerate(CAPTIONS):
        samples[f"{i:04d}.png"] = picture_bytes(i)
        if i % 2:
            samples[f"{i:04d}.txt"] = caption.encode()
        else:
            samples[f"{i:04d}.json"] = json.dumps({"caption": caption, "key": f"k{i}"}).encode()
    names = list(samples)
    tar(path / "b.tar", {name: samples[name] for name in names[4:]})
    tar(path / "a.tar", {name: samples[name] for name in names[:4]})
    return WebdatasetCorpus(path)


def make_parquet(path: Path, kind: str = "bytes") -> Corpus:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    from daco_rt.corpus.parquet import ParquetCorpus

    path.mkdir()
    cells: list[Any] = [picture_bytes(i) for i in range(5)]
    if kind == "struct":
        cells = [{"bytes": cell, "path": "x"} for cell in cells]
    if kind == "paths":
        (path / "images").mkdir()
        for i in range(5):
            picture(i).save(path / "images" / f"{i}.png")
        cells = [f"{i}.png" for i in range(5)]
    for name, part in (("a", slice(0, 3)), ("b", slice(3, 5))):
        table = {"text": list(CAPTIONS[part]), "picture": cells[part], "no": [str(i) for i in range(5)][part]}
        pq.write_table(pa.table(table), path / f"{name}.parquet", row_group_size=2)
    images = path / "images" if kind == "paths" else None
    return ParquetCorpus(path, caption="text", image="picture", images=images, id="no")


MAKERS = {
    "folder": lambda path: FolderCorpus(folder(path)),
    "cc3m row": make_cc3m,
    "cc3m md5": lambda path: make_cc3m(path, "md5"),
    "cc3m sha256": lambda path: make_cc3m(path, "sha256"),
    "cc3m mapping": lambda path: make_cc3m(path, "map"),
    "webdataset": make_webdataset,
    "parquet bytes": make_parquet,
    "parquet struct": lambda path: make_parquet(path, "struct"),
    "parquet paths": lambda path: make_parquet(path, "paths"),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_every_reader_gives_every_pair_with_its_picture(tmp_path: Path, maker: str):
    corpus = MAKERS[maker](tmp_path / "corpus")
    pairs = read(corpus)
    assert [caption for _, caption, _ in pairs] == list(CAPTIONS)
    assert len({id for id, _, _ in pairs}) == 5 and not corpus.problems.counts
    assert all(shows(corpus.open_image(ref), i) for i, (_, _, ref) in enumerate(pairs))
    assert corpus.size in (None, 5)
    described = json.loads(json.dumps(corpus.describe()))
    assert described["kind"] == corpus.kind == maker.split()[0]


@pytest.mark.parametrize("maker", ["folder", "cc3m row", "cc3m mapping", "webdataset", "parquet bytes"])
def test_another_corpus_has_another_description(tmp_path: Path, maker: str):
    corpus = MAKERS[maker](tmp_path / "corpus")
    before = corpus.describe()
    assert before == corpus.describe()
    if maker == "folder":
        change(tmp_path / "corpus" / "captions.jsonl", b"soup", b"loup")
    elif maker == "cc3m row":
        change(tmp_path / "corpus" / "t.tsv", b"soup", b"loup")
    elif maker == "cc3m mapping":
        change(tmp_path / "corpus" / "map.tsv", b"\n", b" \n")
    elif maker == "webdataset":
        tar(tmp_path / "corpus" / "b.tar", {"x.png": picture_bytes(1), "x.txt": b"x"})
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pq.read_table(tmp_path / "corpus" / "b.parquet")
        table = table.set_column(0, "text", pa.array(["a", "b"]))
        pq.write_table(table, tmp_path / "corpus" / "b.parquet")
    assert corpus.describe() != before


def change(path: Path, old: bytes, new: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(old, new, 1))


# ---- bad input


def test_captions_and_ids_that_cannot_be_used_are_counted(tmp_path: Path):
    place = folder(tmp_path / "c", ["fine", " \t ", "same id", "not UTF-8", "two\nlines", "gone"])
    lines = (place / "captions.jsonl").read_bytes().splitlines()
    lines[2] = lines[2].replace(b'"p2"', b'"p0"')
    lines[3] = lines[3].replace(b"UTF-8", b"UTF-\xff")
    lines += [
        b"{broken",
        b'"text"',
        b'{"image": "images/0.png"}',
        b'{"image": "../c/images/0.png", "caption": "out"}',
    ]
    lines += [b'{"image": "/etc/hostname", "caption": "out"}', b'{"image": 3, "caption": "number"}']
    (place / "captions.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (place / "images" / "5.png").unlink()
    corpus = FolderCorpus(place)
    assert [(id, caption) for id, caption, _ in read(corpus)] == [("p0", "fine"), ("p4", "two lines")]
    assert corpus.problems.counts == {
        "empty caption": 1,
        "duplicate id": 1,
        "caption is not UTF-8": 1,
        "line is not JSON": 2,
        "field missing": 2,
        "picture missing": 3,
    }
    corpus.problems.save(tmp_path / "problems.jsonl")
    first, *rest = map(json.loads, (tmp_path / "problems.jsonl").read_text().splitlines())
    assert first == {"counts": dict(corpus.problems.counts)} and len(rest) == 10
    assert {"problem": "duplicate id", "pair": "p0", "detail": "images/2.png"} in rest


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_captions_in_a_table_with_a_header(tmp_path: Path, kind: str):
    place = folder(tmp_path / "c")
    (place / "captions.jsonl").unlink()
    mark = {"csv": ",", "tsv": "\t"}[kind]
    rows = [
        "\ufefffile_name" + mark + "text",
        f'images/0.png{mark}"a ""red"" dagger, sharp"',
        f"images/1.png{mark}",
    ]
    (place / f"captions.{kind}").write_text(
        "\n".join([*rows, f"images/2.png{mark}Übung"]) + "\n", encoding="utf-8"
    )
    corpus = FolderCorpus(place)
    assert read(corpus) == [
        ("images/0.png", 'a "red" dagger, sharp', "images/0.png"),
        ("images/2.png", "Übung", "images/2.png"),
    ]
    assert corpus.problems.counts == {"empty caption": 1}
    (place / f"captions.{kind}").write_text(f"file{mark}text\n")
    with pytest.raises(DacoError, match="no column 'image'"):
        list(FolderCorpus(place))


def test_captions_beside_the_pictures(tmp_path: Path):
    for name, caption in (
        ("b/1.JPG", "one"),
        ("a/2.png", "two"),
        ("a/3.png", None),
        ("a/4.txt", "no picture"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if not name.endswith("txt"):
            picture(1).save(tmp_path / name)
        if caption:
            (tmp_path / name).with_suffix(".txt").write_text(caption)
    corpus = FolderCorpus(tmp_path)
    assert read(corpus) == [("a/2.png", "two", "a/2.png"), ("b/1.JPG", "one", "b/1.JPG")]
    assert corpus.problems.counts == {"caption missing": 1}


def test_lines_and_pictures_that_cc3m_lacks_are_counted(tmp_path: Path):
    make_cc3m(tmp_path / "c")
    table = tmp_path / "c" / "t.tsv"
    table.write_bytes(table.read_bytes() + b"no url\na\tb\tc\n\xff\xfe\thttp://x\nfine\thttp://gone\n")
    corpus = Cc3mCorpus(table, tmp_path / "c" / "images")
    assert len(read(corpus)) == 5
    assert corpus.problems.counts == {"line is not caption and url": 2, "picture missing": 2}
    alone = Cc3mCorpus(table)
    assert [id for id, _, _ in read(alone)] == ["0", "1", "2", "3", "4", "8"]
    assert alone.problems.counts == {"line is not caption and url": 2, "caption is not UTF-8": 1}
    assert len(read(Cc3mCorpus(table, limit=2))) == 2


def test_a_mapping_with_bad_lines(tmp_path: Path):
    make_cc3m(tmp_path / "c", "map")
    mapping = tmp_path / "c" / "map.tsv"
    mapping.write_text(mapping.read_text().replace("0\t", "0 no tab ", 1) + "9\tgone.png\n")
    corpus = Cc3mCorpus(tmp_path / "c" / "t.tsv", tmp_path / "c" / "images", naming=mapping)
    assert [id for id, _, _ in read(corpus)] == ["1", "2", "3", "4"]
    assert corpus.problems.counts["line of the mapping is bad"] == 1
    assert corpus.problems.counts["picture of the mapping missing"] == 1


def test_samples_that_lack_a_part_are_counted(tmp_path: Path):
    image = picture_bytes(0)
    tar(
        tmp_path / "s" / "0.tar",
        {
            "a.jpg": image, "a.txt": b"fine", "b.jpg": image, "c.txt": b"no picture", "d.jpg": image,
            "d.json": b"{broken", "e.jpg": image, "e.json": b'{"text": "from text"}', "f.png": image,
            "f.txt": b"\xff", "g.jpg": image, "g.json": b'{"key": "0/a", "caption": "same id"}',
            "x/a.jpg": image, "x/a.txt": b"other folder",
        },
    )  # fmt: skip
    corpus = WebdatasetCorpus(tmp_path / "s" / "*.tar")
    assert [(id, caption) for id, caption, _ in read(corpus)] == [
        ("0/a", "fine"),
        ("0/e", "from text"),
        ("0/x/a", "other folder"),
    ]
    assert corpus.problems.counts == {
        "caption missing": 2,
        "picture missing": 1,
        "member is not JSON": 1,
        "caption is not UTF-8": 1,
        "duplicate id": 1,
    }
    whole = (tmp_path / "s" / "0.tar").read_bytes()
    (tmp_path / "s" / "1.tar").write_bytes(whole[: 512 * 5])
    corpus = WebdatasetCorpus(tmp_path / "s")
    assert "1/a" in [id for id, _, _ in read(corpus)]
    assert corpus.problems.counts["shard is cut short"] == 1


def test_cells_that_lack_a_part_are_counted(tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    corpus = make_parquet(tmp_path / "c", "paths")
    table = {
        "text": ["fine", None, "gone", "none"],
        "picture": ["0.png", "0.png", "9.png", None],
        "no": [*"wxyz"],
    }
    pq.write_table(pa.table(table), tmp_path / "c" / "a.parquet")
    assert [id for id, _, _ in read(corpus)] == ["w", "3", "4"]
    assert corpus.problems.counts == {"caption missing": 1, "picture missing": 2}


def test_text_alone(tmp_path: Path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n two \nbad \xff\n")
    corpus = TextCorpus(tmp_path / "t.txt")
    assert [(id, caption) for id, caption, _ in read(corpus)] == [("0", "one"), ("2", "two")]
    assert corpus.problems.counts == {"caption is not UTF-8": 1} and not corpus.has_images
    with pytest.raises(DacoError, match="has no picture"):
        corpus.open_image("")


def test_captions_are_one_clean_line():
    assert clean_caption(" a\u0308 \x00dagger\n\ton  it ") == "ä dagger on it"


def test_problems_are_counted_beyond_the_list(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("daco_rt.corpus.pairs.LISTED", 2)
    problems = Problems()
    for i in range(5):
        problems.add("x", str(i), "")
    assert problems.counts == {"x": 5} and len(problems.listed) == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cc3m", {}, "must be KIND:PLACE"),
        ("folders:x", {}, "did you mean 'folder'"),
        ("folder:none", {}, "none is not a folder"),
        ("folder:.", {"images": "x"}, "takes no option 'images'"),
        ("folder:.", {"captions": "none.csv"}, "none.csv is not a file"),
        ("cc3m:none.tsv", {}, "none.tsv is not a file"),
        ("cc3m:t.tsv", {"images": "none"}, "none is not a folder"),
        ("cc3m:t.tsv", {"images": ".", "naming": "md4"}, "did you mean 'md5'"),
        ("webdataset:.", {}, "holds no .tar file"),
        ("webdataset:none.tar", {}, "is not a file"),
        ("webdataset:t.tsv", {}, "is not called .tar"),
        ("parquet:none.parquet", {}, "no .parquet file"),
        ("parquet:t.tsv", {}, "cannot be read as Parquet"),
        ("text:none", {}, "none is not a file"),
    ],
)
def test_what_is_no_corpus_is_refused(
    tmp_path: Path, name: str, options: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
):
    if name.startswith("parquet"):
        pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    Path("t.tsv").write_text("a\tb\n")
    with pytest.raises(DacoError, match=message) as error:
        open_corpus(name, **options)
    assert "\n" not in str(error.value)


def test_columns_that_are_not_there_are_named(tmp_path: Path):
    make_parquet(tmp_path / "c")
    with pytest.raises(DacoError, match=r"no column 'texts'; did you mean 'text'"):
        open_corpus(f"parquet:{tmp_path / 'c'}", caption="texts", image="picture")
    alone = open_corpus(f"parquet:{tmp_path / 'c'}", caption="text", image="")
    assert not alone.has_images and len(read(alone)) == 5
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"caption": ["a"], "image": [3]}), tmp_path / "n.parquet")
    with pytest.raises(DacoError, match="is int64, expected bytes"):
        open_corpus(f"parquet:{tmp_path / 'n.parquet'}")
