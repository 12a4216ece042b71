"""Weights on their way into a bundle: converted, checked, in the file's own order."""

from __future__ import annotations

import hashlib

import ml_dtypes
import numpy as np
import pytest

from daco_rt import _native
from daco_rt._files import atomic_file
from daco_rt.artifacts.store import new_artifact
from daco_rt.artifacts.tensors import DTYPES, from_array, read_header, write_safetensors
from daco_rt.errors import CheckpointError
from daco_rt.export import weights

BF16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = (np.dtype(np.float32), np.dtype(np.float16), BF16)
ISAS = ("scalar", "avx2", "avx512")


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.itemsize == 2 else array.view(np.uint32)


def native(array: np.ndarray) -> np.ndarray:
    """What the extension module takes: it has no bf16."""
    return array.view(np.uint16) if array.dtype == BF16 else array


def every_value(dtype: np.dtype) -> np.ndarray:
    """All finite values of a 16-bit type; a sample of fp32's, and what lies between two of bf16's."""
    if dtype.itemsize == 2:
        found = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    else:
        draw = np.random.default_rng(0)
        found = draw.integers(0, 1 << 32, 200_003, dtype=np.uint32)
        found[: 1 << 16] = (np.arange(1 << 16, dtype=np.uint32) << 16) + 0x8000
        found = found.view(np.float32)
    with np.errstate(invalid="ignore"):
        return found[np.isfinite(found.astype(np.float64))]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("given", FLOATS, ids=str)
@pytest.mark.parametrize("wanted", FLOATS, ids=str)
def test_the_kernel_rounds_as_numpy_does(given, wanted, isa):
    if ISAS.index(isa) > ISAS.index(_native.build_info()["best_isa"]):
        pytest.skip(f"this machine has no {isa}")
    values = every_value(given)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float32).astype(wanted)
    inside = np.isfinite(expected.astype(np.float64))
    values, expected, outside = values[inside], expected[inside], values[~inside]
    got = np.empty(len(values), wanted)
    assert _native.core().convert(native(values), native(got), isa)
    np.testing.assert_array_equal(bits(got), bits(expected))
    broken = [np.array([bad]).astype(given) for bad in (np.nan, np.inf, -np.inf)]
    for bad in (*broken, outside[:1], outside[-1:]):
        for at in (0, 17, 4_999)[: 3 * len(bad)]:
            row = values[:5_000].copy()
            row[at] = bad[0]
            assert not _native.core().convert(native(row), native(np.empty(5_000, wanted)), isa)


class GivenUp(Exception):
    """Ends a bundle that has no manifest."""


def converted(tmp_path, tensors: dict[str, np.ndarray], precision: str) -> dict[str, np.ndarray]:
    """Place tensors in a bundle that is given up, and return what was converted."""
    source = tmp_path / "model.safetensors"
    write_safetensors(source, {name: from_array(a) for name, a in tensors.items()})
    written: dict[str, np.ndarray] = {}
    with pytest.raises(GivenUp), new_artifact(tmp_path / "made", "bundle") as writer:
        placed = weights.place_weights(read_header(source).values(), precision, writer)
        written |= {name: ref.read().copy() for name, ref in placed.converted.items()}
        data = (writer.path / weights.CONVERTED).read_bytes()
        assert writer._files[weights.CONVERTED]["sha256"] == hashlib.sha256(data).hexdigest()
        raise GivenUp
    return written


@pytest.mark.parametrize("piece", [8 << 20, 4096])
def test_tensors_of_every_dtype_and_size(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(weights, "_PIECE_BYTES", piece)
    monkeypatch.setattr(weights, "_BUFFER_BYTES", 1 << 10)
    draw = np.random.default_rng(1)
    tensors = {
        f"{dtype}.{rows}": draw.standard_normal((rows, 33)).astype(dtype)
        for dtype in (np.float64, np.float32, BF16)
        for rows in (1, 2, 301)
    }
    tensors["stays"] = np.ones(5, np.float16)
    found = converted(tmp_path, tensors, "fp16")
    assert found.keys() == tensors.keys() - {"stays"}
    for name, got in found.items():
        np.testing.assert_array_equal(got, tensors[name].astype(np.float32).astype(np.float16))


@pytest.mark.parametrize("dtype", ["F32", "F64", "BF16"])
def test_what_does_not_fit_is_named(tmp_path, dtype):
    good = np.ones((50, 40), DTYPES[dtype])
    for bad, message in (
        (7e4, r"'b' reaches 7(\.01)?e\+04, more than fp16"),
        (np.nan, "'b' holds NaN or infinity"),
    ):
        wrong = good.copy()
        wrong[49, 39] = bad
        folder = tmp_path / str(bad)
        folder.mkdir()
        with pytest.raises(CheckpointError, match=message):
            converted(folder, {"a": good, "b": wrong, "c": good}, "fp16")
        assert not (folder / "made").exists()


def test_hashing_apart_changes_no_digest(tmp_path):
    draw = np.random.default_rng(2)
    pieces = [draw.bytes(n) for n in (3, 5 << 20, 0, 7, 1 << 20, 2 << 20)]
    buffer = bytearray(5 << 20)
    with atomic_file(tmp_path / "file") as file:
        for (
            piece
        ) in pieces:  # one buffer for all of them: a piece must be hashed before the next one is there
            buffer[: len(piece)] = piece
            file.write(memoryview(buffer)[: len(piece)])
    whole = b"".join(pieces)
    assert (tmp_path / "file").read_bytes() == whole and file.bytes == len(whole)
    assert file.sha256 == hashlib.sha256(whole).hexdigest()


def test_an_order_that_was_not_planned_is_noticed(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {name: from_array(np.ones((4, 2), np.float32)) for name in "ab"})
    refs = read_header(path)
    with (
        weights._Conversion([refs["a"], refs["b"]], "F16", lambda _: None) as conversion,
        pytest.raises(RuntimeError, match="another order"),
    ):
        list(conversion.rows(refs["b"]))
