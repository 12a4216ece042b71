"""Safetensors: headers that lie, views at odd bytes, and files that the real library reads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from daco_rt.artifacts.tensors import (
    DTYPES,
    TensorRef,
    from_array,
    header_sha256,
    read_header,
    write_safetensors,
)
from daco_rt.errors import ArtifactError, CheckpointError

RNG = np.random.default_rng(0)


def random_array(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    raw = RNG.integers(0, 2 if dtype == "BOOL" else 120, math.prod(shape) * DTYPES[dtype].itemsize, np.uint8)
    return raw.view(DTYPES[dtype]).reshape(shape)


def raw_file(path: Path, header: Any, data: bytes, pad: int = 0) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=5,
    )
)
def test_round_trip_of_any_names_dtypes_and_shapes(
    tmp_path_factory: pytest.TempPathFactory, table: dict[str, tuple[str, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("t") / "f.safetensors"
    arrays = {name: random_array(dtype, tuple(shape)) for name, (dtype, shape) in table.items()}
    write_safetensors(path, {name: from_array(array) for name, array in arrays.items()})
    refs = read_header(path)
    assert refs.keys() == arrays.keys()
    for name, array in arrays.items():
        got = refs[name].read()
        assert (refs[name].dtype, refs[name].shape) == (table[name][0], array.shape)
        assert got.dtype == array.dtype and got.tobytes() == array.tobytes()
        assert not got.flags.writeable
        assert refs[name].offset % array.itemsize == 0
    with safetensors.safe_open(path, "numpy") as file:
        assert set(file.keys()) == set(arrays)


def test_the_real_library_reads_ours_and_we_read_theirs(tmp_path: Path) -> None:
    arrays = {
        "h": random_array("F16", (3, 5)),
        "w": random_array("F32", (2, 3)),
        "flag": np.array([True, False, True]),
        "i": random_array("I64", (4,)),
        "empty": np.empty((0, 3), np.float32),
        "scalar": np.array(2.5, np.float32),
    }
    write_safetensors(tmp_path / "ours", {name: from_array(array) for name, array in arrays.items()})
    for name, array in safetensors.numpy.load_file(tmp_path / "ours").items():
        np.testing.assert_array_equal(array, arrays[name])
    safetensors.numpy.save_file(arrays, tmp_path / "theirs", metadata={"format": "pt"})
    refs = read_header(tmp_path / "theirs")
    assert refs.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(refs[name].read(), array)


def test_bf16_through_the_real_library(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    array = RNG.standard_normal((7, 3)).astype(ml_dtypes.bfloat16)
    write_safetensors(tmp_path / "ours", {"w": from_array(array)})
    loaded = load_file(tmp_path / "ours")["w"]
    assert loaded.dtype == torch.bfloat16
    np.testing.assert_array_equal(loaded.float().numpy(), array.astype(np.float32))
    save_file({"w": loaded}, tmp_path / "theirs")
    assert read_header(tmp_path / "theirs")["w"].read().tobytes() == array.tobytes()


@pytest.mark.parametrize("shift", [0, 1, 3, 5])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "I64"])
def test_reads_at_any_byte(tmp_path: Path, dtype: str, shift: int) -> None:
    array = random_array(dtype, (300, 7))
    path = raw_file(
        tmp_path / "f",
        {
            "a": {"dtype": "U8", "shape": [4096 + shift], "data_offsets": [0, 4096 + shift]},
            "b": {
                "dtype": dtype,
                "shape": [300, 7],
                "data_offsets": [4096 + shift, 4096 + shift + array.nbytes],
            },
        },
        bytes(4096 + shift) + array.tobytes(),
    )
    got = read_header(path)["b"].read()
    assert got.tobytes() == array.tobytes()
    np.testing.assert_array_equal(got.astype(np.float64), array.astype(np.float64))


def test_header_is_a_pure_function_of_names_dtypes_and_shapes(tmp_path: Path) -> None:
    shapes = {"b.w": ("F16", (3, 5)), "a.w": ("F32", (7,)), "a.x": ("BOOL", (3,)), "a.b": ("F32", (1, 2))}
    hashes = set()
    for index, names in enumerate([list(shapes), list(reversed(shapes))]):
        path = tmp_path / str(index)
        write_safetensors(path, {name: from_array(random_array(*shapes[name])) for name in names})
        hashes.add(header_sha256(path))
    assert len(hashes) == 1
    refs = read_header(path)
    assert [ref.name for ref in sorted(refs.values(), key=lambda r: r.offset)] == ["a.b", "a.w", "b.w", "a.x"]
    assert min(ref.offset for ref in refs.values()) % 64 == 0
    write_safetensors(
        path, {name: from_array(random_array(dtype, (*shape, 1))) for name, (dtype, shape) in shapes.items()}
    )
    assert header_sha256(path) not in hashes


def test_writer_holds_one_chunk_at_a_time(tmp_path: Path) -> None:
    alive = 0

    def rows(name: int) -> Iterator[np.ndarray]:
        nonlocal alive
        alive += 1
        assert alive == 1, "two tensors were open at once"
        for start in range(0, 10, 4):
            yield np.full((min(4, 10 - start), 3), name * 100 + start, np.float32)
        alive -= 1

    tensors = ((f"t{i}", ("F32", (10, 3), lambda i=i: rows(i))) for i in range(3))
    written = write_safetensors(tmp_path / "f", tensors)
    assert written.bytes == (tmp_path / "f").stat().st_size
    got = read_header(tmp_path / "f")["t2"].read()
    assert got[:, 0].tolist() == [200] * 4 + [204] * 4 + [208] * 2


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (np.zeros((2, 3), np.float16), r"announced as F32 \[2, 3\], its producer gave F16 \[2, 3\]"),
        (np.zeros((3, 2), np.float32), r"gave F32 \[3, 2\]"),
        ([np.zeros((1, 3), np.float32)], "announced with 2 rows, its producer gave 1"),
        ([np.zeros((1, 4), np.float32)], r"gave F32 \[1, 4\]"),
    ],
)
def test_producers_that_lie_leave_no_file(tmp_path: Path, made: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        write_safetensors(tmp_path / "f", {"w": ("F32", (2, 3), lambda: made)})
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_unknown_dtypes_and_double_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype of 'w'"):
        write_safetensors(tmp_path / "f", {"w": ("C64", (1,), lambda: np.zeros(1))})
    source = from_array(np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="twice"):
        write_safetensors(tmp_path / "f", [("w", source), ("w", source)])
    with pytest.raises(TypeError, match="complex64"):
        from_array(np.zeros(1, np.complex64))


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"w": entry()}, 4, r"tensor 'w' ends at byte \d+, the file has \d+ bytes; it is cut short"),
        ({"w": entry()}, 12, r"the header describes \d+ bytes, the file has \d+"),
        ({"w": entry(shape=[3])}, 8, r"'w' of F32 \[3\] needs 12 bytes, its header gives it 8"),
        ({"w": entry(dtype="F16")}, 8, "needs 4 bytes, its header gives it 8"),
        ({"w": entry(dtype="Q4")}, 8, "'w' has dtype Q4, expected one of"),
        ({"a": entry(), "w": entry(offsets=[4, 12])}, 12, "'w' overlaps the tensor before it"),
        ({"a": entry(), "w": entry(offsets=[12, 20])}, 20, "'w' leaves a gap"),
        ({"w": entry(offsets=[8, 16])}, 16, "'w' leaves a gap"),
        ({"w": entry(offsets=[8, 0])}, 8, "'w'"),
        ({"w": entry(shape=[-2], offsets=[0, -8])}, 0, "entry of tensor 'w' is damaged"),
        ({"w": entry(shape=[True, 2])}, 8, "entry of tensor 'w' is damaged"),
        ({"w": entry(shape=[2.0])}, 8, "entry of tensor 'w' is damaged"),
        ({"w": entry(shape=None)}, 8, "entry of tensor 'w' is damaged"),
        ({"w": entry(offsets=[0])}, 8, "entry of tensor 'w' is damaged"),
        ({"w": entry(dtype=[])}, 8, "'w'"),
        ({"w": 3}, 8, "entry of tensor 'w' is damaged"),
        ([1], 8, "not a JSON object"),
        ('{"w": ', 0, "header is damaged"),
        ('{"w": {}, "w": {}}', 0, "twice"),
        ("[" * 100_000, 0, "header is damaged"),
    ],
)
def test_damaged_headers_are_refused_by_name(tmp_path: Path, header: Any, data: int, words: str) -> None:
    path = raw_file(tmp_path / "shard.safetensors", header, bytes(data))
    with pytest.raises(ArtifactError, match=words) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 5, 8, 30])
def test_truncated_header(tmp_path: Path, size: int) -> None:
    write_safetensors(tmp_path / "f", {"w": from_array(np.zeros(100, np.float32))})
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"restore"):
        read_header(tmp_path / "f", CheckpointError)


def test_header_length_that_would_fill_the_memory(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(ArtifactError, match="the header should be 1152921504606846976 bytes long"):
        read_header(tmp_path / "f")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        read_header(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="is a directory"):
        header_sha256(tmp_path)


def test_file_cut_short_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_safetensors(path, {"w": from_array(np.zeros(5000, np.float32))})
    ref = read_header(path)["w"]
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ArtifactError, match=r"cannot map the 20000 bytes of tensor 'w'"):
        ref.read()
    path.unlink()
    with pytest.raises(ArtifactError, match="cannot map"):
        ref.read()


def test_every_flipped_header_byte_is_refused_or_harmless(tmp_path: Path) -> None:
    """No flip may crash, hang, or give a view outside the file."""
    path = tmp_path / "f"
    write_safetensors(
        path, {"a": from_array(np.zeros((4, 4), np.float32)), "b": from_array(np.ones(3, np.float16))}
    )
    good = path.read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    for index in range(end):
        bad = bytearray(good)
        bad[index] ^= 0xFF if index < 8 else 0x01
        path.write_bytes(bad)
        try:
            refs: dict[str, TensorRef] = read_header(path)
        except ArtifactError as error:
            assert str(path) in str(error)
        else:
            for ref in refs.values():
                assert ref.offset + ref.nbytes <= len(good)
                ref.read().tobytes()
