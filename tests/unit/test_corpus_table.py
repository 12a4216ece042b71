"""The table of pairs, and the pictures it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from corpus_samples import picture, picture_bytes, shows, tar

from daco_rt.corpus import COLUMNS, load_image, load_pairs, metadata, open_reference, pairs_schema, save_pairs
from daco_rt.corpus.references import split_reference, tar_index
from daco_rt.errors import ArtifactError, DacoError

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra 'corpus')")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DACO_RT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows(**changes: Any) -> dict[str, list[Any]]:
    made = {
        "concept": [0, 0, 7],
        "name": ["dagger", "dagger", "soup"],
        "pair": ["p0", "p2", "p2"],
        "sign": [1, -1, 1],
        "image_similarity": [0.75, 0.5, None],
        "text_similarity": [0.75, 0.5, 0.875],
        "score": [0.5, 1.25, 0.25],
        "caption": ["Ä dagger", "a bowl of soup", "a bowl of soup"],
        "image": ["images/0.png", "shards/0.tar#b.png", ""],
        "start": [2, -1, 10],
        "end": [8, -1, 14],
    }
    return {**made, **changes}


def test_pairs_come_back_with_their_types_and_bytes_repeat(tmp_path: Path):
    path = save_pairs(rows(), tmp_path / "p.parquet", root=tmp_path, corpus={"kind": "x"}, settings={"n": 27})
    table = load_pairs(path)
    assert table.schema.remove_metadata() == pairs_schema()
    assert {name: table[name].to_pylist() for name in COLUMNS} == rows()
    assert metadata(table) == {"root": tmp_path.resolve(), "corpus": {"kind": "x"}, "settings": {"n": 27}}
    assert all(caption[s:e] in ("dagger", "soup") for caption, s, e in spans(table) if s >= 0)
    first = path.read_bytes()
    save_pairs(table, path, root=tmp_path, corpus={"kind": "x"}, settings={"n": 27}, overwrite=True)
    assert path.read_bytes() == first
    with pytest.raises(ArtifactError, match="already exists"):
        save_pairs(table, path, root=tmp_path)


def spans(table: Any) -> list[tuple[str, int, int]]:
    return list(zip(*(table[name].to_pylist() for name in ("caption", "start", "end")), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sign": [1, 0, 1]}, "row 1 has a sign other"),
        ({"end": [9, -1, 14]}, "row 0 has a span outside"),
        ({"start": [8, -1, 10]}, "row 0 has a span outside"),
        ({"start": [2, 0, 10]}, "row 1 has a span outside"),
        ({"concept": [0, 0, -7]}, "row 2 has a concept below 0"),
        ({"caption": ["Ä dagger", None, "a bowl of soup"]}, "null"),
        ({"concept": ["x", "y", "z"]}, "columns must be"),
    ],
)
def test_values_that_no_reader_could_use_are_refused(tmp_path: Path, change: dict[str, Any], message: str):
    with pytest.raises(ArtifactError, match=message):
        save_pairs(rows(**change), tmp_path / "p.parquet", root=tmp_path)
    assert not (tmp_path / "p.parquet").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:200]), "cannot be read as Parquet"),
        (lambda p: p.unlink(), "cannot be read as Parquet"),
        (lambda p: pq.write_table(pa.table({"a": [1]}), p), "holds no pairs"),
        (lambda p: rewrite(p, {b"version": b"2"}), "is of version 2"),
        (lambda p: rewrite(p, {}, drop="caption"), "no column caption"),
    ],
)
def test_other_and_damaged_files_are_refused(tmp_path: Path, damage: Any, message: str):
    path = save_pairs(rows(), tmp_path / "p.parquet", root=tmp_path)
    damage(path)
    with pytest.raises(ArtifactError, match=message):
        load_pairs(path)


def rewrite(path: Path, changes: dict[bytes, bytes], drop: str | None = None) -> None:
    table = pq.read_table(path)
    found = {**table.schema.metadata, **changes}
    table = table.drop_columns([drop]) if drop else table
    pq.write_table(table.replace_schema_metadata(found), path)


def test_pictures_are_found_after_file_and_root_moved_together(tmp_path: Path):
    (tmp_path / "a" / "images").mkdir(parents=True)
    picture(3).save(tmp_path / "a" / "images" / "0.png")
    save_pairs(rows(), tmp_path / "a" / "p.parquet", root=tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    table = load_pairs(tmp_path / "b" / "p.parquet")
    assert shows(load_image(table, table["image"][0].as_py()), 3)
    assert shows(load_image(table.slice(0, 1), "images/0.png"), 3)


def test_a_root_elsewhere_is_absolute_and_can_be_replaced(tmp_path: Path):
    path = save_pairs(rows(), tmp_path / "out" / "p.parquet", root=tmp_path / "data")
    assert metadata(load_pairs(path))["root"] == (tmp_path / "data").resolve()
    assert metadata(load_pairs(path, root=tmp_path))["root"] == tmp_path.resolve()


def test_members_of_tar_files_are_read_by_their_offset(tmp_path: Path, cache: Path):
    members = {"a.png": picture_bytes(1), "a.txt": b"one", "dir/b#c.png": picture_bytes(2)}
    tar(tmp_path / "s" / "0.tar", members)
    assert shows(open_reference(tmp_path, "s/0.tar#dir/b#c.png"), 2)
    (index,) = (cache / "tar-indexes").iterdir()
    before = index.stat().st_mtime_ns
    from daco_rt.corpus import references

    references._tar_index.cache_clear()
    assert list(tar_index(tmp_path / "s" / "0.tar").members) == list(members)
    assert index.stat().st_mtime_ns == before
    references._tar_index.cache_clear()
    index.write_text('{"members": [["a.png", 0, 99999999]], "damage": ""}')
    assert shows(open_reference(tmp_path, "s/0.tar#a.png"), 1)
    # Another file of the same name has another index.
    tar(tmp_path / "s" / "0.tar", {"a.png": picture_bytes(4)} | members | {"a.png": picture_bytes(5)})
    assert shows(open_reference(tmp_path, "s/0.tar#a.png"), 5)


def test_of_a_tar_file_that_was_cut_short_the_whole_members_remain(tmp_path: Path):
    path = tar(tmp_path / "0.tar", {f"{i}.png": picture_bytes(i) for i in range(4)})
    path.write_bytes(path.read_bytes()[: 2 * 1024 + 520])
    found = tar_index(path)
    assert list(found.members) == ["0.png", "1.png"] and found.damage
    (tmp_path / "no.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(DacoError, match="uncompressed tar"):
        tar_index(tmp_path / "no.tar")


@pytest.mark.parametrize("struct", [False, True])
def test_cells_of_parquet_files_are_pictures(tmp_path: Path, struct: bool):
    cells: list[Any] = [picture_bytes(i) for i in range(5)]
    if struct:
        cells = [{"bytes": cell, "path": None} for cell in cells]
    pq.write_table(pa.table({"image": cells}), tmp_path / "0.parquet", row_group_size=2)
    for row in (4, 0, 3):
        assert shows(open_reference(tmp_path, f"0.parquet#image:{row}"), row)
    for ref in ("0.parquet#image:5", "0.parquet#other:0", "0.parquet#3"):
        with pytest.raises(DacoError, match="row"):
            open_reference(tmp_path, ref)


def test_transparent_pictures_lie_on_white(tmp_path: Path):
    from PIL import Image

    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "t.png")
    Image.new("P", (2, 2)).save(tmp_path / "p.png", transparency=0)
    for name in ("t.png", "p.png"):
        assert open_reference(tmp_path, name).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("", "reference is empty"),
        ("../x.png", "outside its root"),
        ("/etc/passwd", "outside its root"),
        ("none.png", "not a file"),
        ("text.png", "not an image"),
        ("none.tar#a.png", "not a file"),
        ("a.tar#b.png", "no member 'b.png'"),
        ("a.tar#a.txt", "not an image"),
    ],
)
def test_bad_references_are_named(tmp_path: Path, reference: str, message: str):
    (tmp_path / "text.png").write_text("no picture")
    tar(tmp_path / "a.tar", {"a.txt": b"no picture"})
    with pytest.raises(DacoError, match=message):
        open_reference(tmp_path, reference)


def test_references_split_at_the_first_mark():
    assert split_reference("a#b.png") == ("a#b.png", "", "file")
    assert split_reference("d/0.parquet#image:3") == ("d/0.parquet", "image:3", "parquet")


def test_metadata_is_plain_json(tmp_path: Path):
    path = save_pairs(rows(), tmp_path / "p.parquet", root=tmp_path, corpus={"kind": "cc3m", "rows": 3})
    stored = pq.read_schema(path).metadata
    assert stored[b"root"] == b"." and json.loads(stored[b"corpus"]) == {"kind": "cc3m", "rows": 3}
