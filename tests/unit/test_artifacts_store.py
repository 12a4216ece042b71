"""Artifacts as folders: manifests, checks, references, parts, and everything that can be wrong with them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daco_rt.artifacts import from_array, new_artifact, open_artifact, write_safetensors
from daco_rt.artifacts.manifest import encode_manifest, sampled_sha256
from daco_rt.artifacts.store import ArtifactWriter, check_target
from daco_rt.errors import ArtifactError


def make(
    path: Path, *, overwrite: bool = False, value: int = 1, shard: Path | None = None, full: bool = False
) -> Path:
    with new_artifact(path, "dictionary", overwrite=overwrite) as writer:
        writer.set(dim=np.int64(value), table={3: 0.5, 10: 1.5}, where=Path("x"), array=np.arange(2))
        writer.add_json("table.json", {"value": value})
        writer.add_jsonl("rows.jsonl", [{"i": i} for i in range(3)])
        writer.add_bytes("deep/er/blob.bin", b"blob")
        writer.write_safetensors("t.safetensors", {"w": from_array(np.full((2, 3), value, np.float32))})
        (writer.path / "direct.txt").write_text("straight")
        if shard is not None:
            writer.link(shard, "weights/shard.safetensors", full_hash=full)
    return path


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A shard of 17 MiB: larger than what sampling covers completely."""
    path = tmp_path / "checkpoint" / "model.safetensors"
    path.parent.mkdir()
    write_safetensors(path, {"w": from_array(np.arange(17 << 18, dtype=np.float32))})
    return path


def flip(path: Path, index: int) -> None:
    """Flip one byte in place, whatever shares the inode."""
    with open(path, "r+b") as file:
        file.seek(index, os.SEEK_SET if index >= 0 else os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def edit(path: Path, **changes: Any) -> None:
    """Rewrite a manifest with a correct checksum, as another writer could."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest.pop("checksum")
    (path / "manifest.json").write_bytes(encode_manifest({**manifest, **changes}))


def test_round_trip(tmp_path: Path) -> None:
    artifact = open_artifact(make(tmp_path / "a"), "dictionary")
    manifest = artifact.manifest
    assert list(manifest)[:3] == ["format", "version", "producer"]
    assert manifest["format"] == "daco_rt.dictionary" and manifest["producer"]["name"] == "daco-rt"
    assert manifest["dim"] == 1 and manifest["table"] == {"3": 0.5, "10": 1.5} and manifest["array"] == [0, 1]
    files = {"table.json", "rows.jsonl", "deep/er/blob.bin", "t.safetensors", "direct.txt"}
    assert set(manifest["files"]) == files
    assert artifact.checks == dict.fromkeys(files, "sha256")
    assert artifact.file("table.json").read_text() == '{\n  "value": 1\n}\n'
    assert artifact.file("rows.jsonl").read_text() == '{"i": 0}\n{"i": 1}\n{"i": 2}\n'
    with pytest.raises(ArtifactError, match="lists no file nothing"):
        artifact.file("nothing.txt")


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    path = make(tmp_path / "a")
    open_artifact(path, "dictionary", progress=lambda done, total: steps.append((done, total)))
    owned = sum(
        entry["bytes"] for entry in json.loads((path / "manifest.json").read_text())["files"].values()
    )
    assert steps[-1] == (owned, owned)


@pytest.mark.parametrize(
    "name", ["table.json", "rows.jsonl", "deep/er/blob.bin", "t.safetensors", "direct.txt", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "grow", "delete"])
def test_damage_is_found_and_named(tmp_path: Path, name: str, damage: str) -> None:
    path = make(tmp_path / "a")
    file = path / name
    if damage == "flip":
        flip(file, -3)
    elif damage == "truncate":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "grow":
        file.write_bytes(file.read_bytes() + b"x")
    else:
        file.unlink()
    if (name, damage) == ("manifest.json", "truncate"):
        os.truncate(file, file.stat().st_size - 1)  # the last byte is only a newline
    with pytest.raises(ArtifactError) as caught:
        open_artifact(path, "dictionary")
    message = str(caught.value)
    remedy = "give the folder" if (name, damage) == ("manifest.json", "delete") else "again"
    assert name in message and remedy in message and "\n" not in message
    if damage != "flip":
        with pytest.raises(ArtifactError, match=name):
            open_artifact(path, "dictionary", verify=False)


def test_every_flipped_byte_of_a_manifest_is_found(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    good = (path / "manifest.json").read_bytes()
    for index in range(len(good) - 1):
        bad = bytearray(good)
        bad[index] ^= 0x01 if index % 2 else 0x20
        (path / "manifest.json").write_bytes(bad)
        with pytest.raises(ArtifactError):
            open_artifact(path, "dictionary", verify=False)


def test_other_kind_newer_version_and_foreign_folders(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    with pytest.raises(ArtifactError, match="is a daco_rt dictionary, expected a pack"):
        open_artifact(path, "pack")
    edit(path, version=2)
    with pytest.raises(ArtifactError, match="format version 2, this daco-rt reads up to 1; upgrade daco-rt"):
        open_artifact(path, "dictionary")
    edit(path, version=1, format="daco_rt.quilt")
    with pytest.raises(ArtifactError, match=r"format is 'daco_rt.quilt'"):
        open_artifact(path, "dictionary")
    edit(path, format=["daco_rt.pack"])
    with pytest.raises(ArtifactError, match="format is"):
        open_artifact(path, "dictionary")
    with pytest.raises(ArtifactError, match="does not exist; expected the folder of a daco_rt pack"):
        open_artifact(tmp_path / "nowhere", "pack")
    with pytest.raises(ArtifactError, match="holds no manifest"):
        open_artifact(tmp_path, "pack")
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match="is damaged"):
        open_artifact(tmp_path, "pack")
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ArtifactError, match="not a JSON object"):
        open_artifact(tmp_path, "pack")


@pytest.mark.parametrize(
    "rel",
    [
        "../outside",
        "/etc/passwd",
        "a/../../b",
        "a/./b",
        "a//b",
        "manifest.json",
        "",
        ".",
        "a\\..\\b",
        "..",
        "a\0b",
    ],
)
@pytest.mark.parametrize("section", ["files", "references", "parts"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, rel: str, section: str) -> None:
    (tmp_path / "outside").write_text("secret")
    path = make(tmp_path / "a")
    edit(path, **{section: {rel: {"bytes": 6, "sha256": "0" * 64, "format": "daco_rt.pack"}}})
    with pytest.raises(ArtifactError, match="is no plain relative path"):
        open_artifact(path, "dictionary")
    with (
        pytest.raises(ArtifactError, match="is no plain relative path"),
        new_artifact(tmp_path / "b", "pack") as w,
    ):
        w.add_bytes(rel, b"")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("entry", [None, {}, {"bytes": "6"}, 3])
def test_incomplete_entries(tmp_path: Path, entry: Any) -> None:
    path = make(tmp_path / "a")
    edit(path, files={"table.json": entry})
    with pytest.raises(ArtifactError, match=r"the entry of table\.json is incomplete"):
        open_artifact(path, "dictionary")


def test_references_are_hard_links_checked_by_size_header_and_samples(tmp_path: Path, shard: Path) -> None:
    path = make(tmp_path / "a", shard=shard)
    linked = path / "weights/shard.safetensors"
    assert linked.stat().st_ino == shard.stat().st_ino
    rel = "weights/shard.safetensors"
    assert open_artifact(path, "dictionary").checks[rel] == "header"
    assert open_artifact(path, "dictionary", full=True).checks[rel] == "sampled"
    assert open_artifact(path, "dictionary", verify=False).checks[rel] == "size"
    for index, found_by in ((40, "header"), (-1, "sampled"), (8192, "sampled")):
        flip(shard, index)
        if found_by == "header":
            with pytest.raises(ArtifactError, match=r"shard\.safetensors.*(header|damaged)"):
                open_artifact(path, "dictionary")
        else:
            open_artifact(path, "dictionary")
        with pytest.raises(ArtifactError, match=r"shard\.safetensors is damaged or was replaced|header"):
            open_artifact(path, "dictionary", full=True)
        flip(shard, index)
    open_artifact(path, "dictionary", full=True)
    os.truncate(shard, shard.stat().st_size - 4)
    with pytest.raises(ArtifactError, match=r"has \d+ bytes, the dictionary's manifest says"):
        open_artifact(path, "dictionary", verify=False)


def test_full_hash_finds_a_byte_that_samples_miss(tmp_path: Path, shard: Path) -> None:
    sampled, full = make(tmp_path / "a", shard=shard), make(tmp_path / "b", shard=shard, full=True)
    before = sampled_sha256(shard)
    missed = next(i for i in range(65536, 400_000, 512) if _flipped_sample(shard, i) == before)
    assert open_artifact(full, "dictionary", full=True).checks["weights/shard.safetensors"] == "sha256"
    flip(shard, missed)
    open_artifact(sampled, "dictionary", full=True)
    with pytest.raises(ArtifactError, match="SHA-256"):
        open_artifact(full, "dictionary", full=True)


def _flipped_sample(shard: Path, index: int) -> str:
    flip(shard, index)
    digest = sampled_sha256(shard)
    flip(shard, index)
    return digest


def test_links_are_copies_where_links_are_impossible(
    tmp_path: Path, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    path = make(tmp_path / "a", shard=shard)
    copied = path / "weights/shard.safetensors"
    assert copied.stat().st_ino != shard.stat().st_ino
    assert copied.read_bytes() == shard.read_bytes()
    open_artifact(path, "dictionary", full=True)


def test_links_through_symlinks_reach_the_file(tmp_path: Path, shard: Path) -> None:
    (tmp_path / "snapshot").symlink_to(shard)
    path = make(tmp_path / "a", shard=tmp_path / "snapshot")
    linked = path / "weights/shard.safetensors"
    assert not linked.is_symlink() and linked.stat().st_ino == shard.stat().st_ino


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nothing\.safetensors does not exist"):
        make(tmp_path / "a", shard=tmp_path / "nothing.safetensors")
    (tmp_path / "text").write_text("no tensors here at all")
    with pytest.raises(ArtifactError, match="no safetensors file"):
        make(tmp_path / "a", shard=tmp_path / "text")
    with (
        pytest.raises(ArtifactError, match=r"source\.txt does not exist"),
        new_artifact(tmp_path / "a", "pack") as w,
    ):
        w.add_file(tmp_path / "source.txt", "copy.txt")
    assert sorted(os.listdir(tmp_path)) == ["text"]


def test_add_file_copies(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(os.urandom(3 << 20))
    with new_artifact(tmp_path / "a", "bundle") as writer:
        writer.add_file(tmp_path / "source", "copy")
    assert (tmp_path / "a/copy").read_bytes() == (tmp_path / "source").read_bytes()
    open_artifact(tmp_path / "a", "bundle")


def test_writer_misuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind must be one of"), new_artifact(tmp_path / "a", "quilt"):
        pytest.fail("the block ran")
    with (
        pytest.raises(ValueError, match="files is written by the artifact itself"),
        new_artifact(tmp_path / "a", "pack") as w,
    ):
        w.set(files={})
    with pytest.raises(ValueError, match="already written"), new_artifact(tmp_path / "a", "pack") as w:
        w.add_bytes("x", b"1")
        w.add_bytes("x", b"2")
    with pytest.raises(ValueError, match="Out of range"), new_artifact(tmp_path / "a", "pack") as w:
        w.set(norm=float("nan"))
    with pytest.raises(ArtifactError, match="symbolic link"), new_artifact(tmp_path / "a", "pack") as w:
        (w.path / "link").symlink_to("/etc/passwd")
    assert os.listdir(tmp_path) == []


def test_parts_are_checked_through_their_own_manifest_and_can_be_swapped(tmp_path: Path) -> None:
    with new_artifact(tmp_path / "outer", "bundle") as writer:
        make(writer.path / "pack", value=1)
        writer.add_bytes("decoder.onnx", b"graph")
    outer = open_artifact(tmp_path / "outer", "bundle")
    assert set(outer.manifest["parts"]) == {"pack"} and set(outer.manifest["files"]) == {"decoder.onnx"}
    assert outer.checks["pack/t.safetensors"] == "sha256"
    assert outer.file("pack/t.safetensors").is_file()

    flip(tmp_path / "outer/pack/t.safetensors", -1)
    with pytest.raises(ArtifactError, match=r"pack/t\.safetensors is damaged"):
        open_artifact(tmp_path / "outer", "bundle")

    shutil.rmtree(tmp_path / "outer/pack")
    with pytest.raises(ArtifactError, match="outer/pack does not exist"):
        open_artifact(tmp_path / "outer", "bundle")
    make(tmp_path / "outer/pack", value=2)
    open_artifact(tmp_path / "outer", "bundle")

    with new_artifact(tmp_path / "outer/pack", "dictionary", overwrite=True) as writer:
        writer.write_safetensors("t.safetensors", {"w": from_array(np.zeros((3, 2), np.float32))})
    with pytest.raises(
        ArtifactError, match="has other tensor names, dtypes or shapes than the bundle was made with"
    ):
        open_artifact(tmp_path / "outer", "bundle", verify=False)


def test_overwrite_only_replaces_artifacts(tmp_path: Path) -> None:
    path = make(tmp_path / "a", value=1)
    with pytest.raises(ArtifactError, match="already exists; pass --force"):
        make(path, value=2)
    make(path, value=2, overwrite=True)
    assert open_artifact(path, "dictionary").manifest["dim"] == 2
    (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes()[:-40])
    make(path, value=3, overwrite=True)
    (tmp_path / "home").mkdir()
    make(tmp_path / "home", overwrite=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter").write_text("precious")
    for target in (tmp_path / "thesis", tmp_path / "thesis/chapter"):
        with pytest.raises(ArtifactError, match="choose another --output"):
            make(target, overwrite=True)
        with pytest.raises(ArtifactError):
            check_target(target, overwrite=True)
    assert (tmp_path / "thesis/chapter").read_text() == "precious"


def test_failure_stops_the_hashing_on_the_other_thread(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"U8","shape":[1073741824],"data_offsets":[0,1073741824]}}'
    sparse = tmp_path / "sparse.safetensors"
    sparse.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(sparse, 8 + len(header) + (1 << 30))
    seen: list[ArtifactWriter] = []
    with pytest.raises(ZeroDivisionError), new_artifact(tmp_path / "a", "bundle") as writer:
        seen.append(writer)
        writer.link(sparse, "running.safetensors", full_hash=True)
        writer.link(sparse, "waiting.safetensors", full_hash=True)
        while not writer._hashes["running.safetensors"].running():
            pass
        raise ZeroDivisionError
    assert isinstance(seen[0]._hashes["running.safetensors"].exception(), InterruptedError)
    assert seen[0]._hashes["waiting.safetensors"].cancelled()
    assert os.listdir(tmp_path) == ["sparse.safetensors"]


def test_sigkill_while_writing_tensors_keeps_the_old_artifact(tmp_path: Path) -> None:
    code = """
        import sys, time
        import numpy as np
        from daco_rt.artifacts import new_artifact
        def rows():
            for i in range(1 << 20):
                if i == 3:
                    print("writing", flush=True)
                yield np.ones((1, 1 << 14), np.float32)
        with new_artifact(sys.argv[1], "dictionary", overwrite=True) as writer:
            writer.add_json("table.json", {})
            writer.write_safetensors("t.safetensors", {"w": ("F32", (1 << 20, 1 << 14), rows)})
    """
    path = make(tmp_path / "a")
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), path], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert len(os.listdir(tmp_path)) == 2
    assert open_artifact(path, "dictionary").manifest["dim"] == 1
    make(path, value=2, overwrite=True)
    assert os.listdir(tmp_path) == ["a"]
