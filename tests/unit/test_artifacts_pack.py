"""Packs: round trips of both operators, every check, views, and swapping one pack for another."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from pack_arguments import DTYPES, MODEL, arguments, arrays

from daco_rt.artifacts import (
    Concept,
    Pack,
    Policy,
    header_sha256,
    load_pack,
    read_header,
    save_pack,
)
from daco_rt.artifacts.operands import first_bad
from daco_rt.errors import ArtifactError, PolicyError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return save_pack(tmp_path_factory.mktemp("pack") / "pack", **arguments())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["sae", "pursuit"])
def test_round_trip(tmp_path: Path, op: str, dtype: str) -> None:
    given = arguments(op, dtype)
    save_pack(tmp_path / "p", **given)
    pack = load_pack(tmp_path / "p")
    assert (pack.op, pack.coder, pack.k, pack.k_out, pack.sign, pack.tol) == (
        op,
        given["coder"],
        3,
        2,
        "positive",
        0,
    )
    assert (pack.dim, pack.atoms, pack.slots_count, pack.dtype, pack.blocks) == (12, 9, 4, dtype, (1, 3))
    assert pack.model == MODEL and pack.default_policy == "default" and pack.recipe == given["recipe"]
    assert list(pack.policies) == given["policies"] and list(pack.concepts) == given["concepts"]
    assert pack.median_norm == {1: 10.5, 3: 20.25}
    assert pack.slot_map.dtype == np.int32
    assert pack.slot_map.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]
    for block in (1, 3):
        operands = pack.operands(block)
        assert operands.keys() == given["operands"][block].keys()
        for name, array in given["operands"][block].items():
            assert operands[name].dtype == array.dtype and operands[name].tobytes() == array.tobytes()
            assert not operands[name].flags.writeable
    concept = pack.concept(4)
    assert concept is not None and concept.name == "dagger" and pack.concept(5) is None


def test_operands_come_in_the_order_of_the_contract(made: Pack) -> None:
    assert list(made.operands(1)) == [
        "enc", "enc_bias", "dec", "threshold", "gain", "boost", "undesirable", "shift", "limits",
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["absent", "empty"])
def test_optional_operands(tmp_path: Path, how: str) -> None:
    for op, optional in (("sae", ("threshold", "boost")), ("pursuit", ("gram", "boost"))):
        given = arguments(op)
        for block in given["operands"].values():
            for name in optional:
                if how == "absent":
                    del block[name]
                else:
                    block[name] = np.empty((0, 0), np.float32)
        operands = save_pack(tmp_path / op, **given).operands(3)
        assert operands["boost"].size == 0 and operands["boost"].dtype == np.float32
        assert "gram" not in operands
        assert ("threshold" in operands) == (op == "sae")


def test_coder_none_takes_a_placeholder(tmp_path: Path) -> None:
    given = arguments(m=1)
    given.update(coder="none", k=32, concepts=[])
    assert save_pack(tmp_path / "p", **given).coder == "none"


def test_policies_by_name(made: Pack) -> None:
    assert made.policy("gentle").slot == 3
    assert (made.policy("off").slot, made.policy("observe").slot) == (0, 1)
    assert made.policy("observe").blocks == (1, 3)
    with pytest.raises(PolicyError, match=r"unknown policy 'defalt'.*did you mean 'default'\?.*gentle"):
        made.policy("defalt")


def test_equal_shapes_have_equal_headers(tmp_path: Path, made: Pack) -> None:
    given = arguments(seed=7)
    given["policies"] = [Policy("strict", 3, "image", (1,))]
    given["default_policy"] = "strict"
    given["operands"] = dict(reversed(given["operands"].items()))
    save_pack(tmp_path / "p", **given)
    ours, theirs = tmp_path / "p/steering.safetensors", made.path / "steering.safetensors"
    assert header_sha256(ours) == header_sha256(theirs)
    assert ours.read_bytes() != theirs.read_bytes()
    assert min(ref.offset for ref in read_header(ours).values()) % 64 == 0
    names = {f"block.{block}.{name}" for block in (1, 3) for name in arrays()} | {"slot_map"}
    assert read_header(ours).keys() == names


def test_save_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_pack(tmp_path / name, **arguments())
    for file in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_select_blocks_and_save(tmp_path: Path, made: Pack) -> None:
    view = made.select_blocks([3])
    assert view.blocks == (3,) and view.slot_map.tolist() == [[0, 1, 2, 3]] and view.median_norm == {3: 20.25}
    assert [policy.blocks for policy in view.policies] == [(3,), (3,)]
    view = made.select_blocks(iter([1, 1]))
    assert [policy.name for policy in view.policies] == ["default"] and view.slots_count == 4
    copy = view.save_to(tmp_path / "copy")
    copy = load_pack(copy.path)
    assert copy.blocks == (1,) and copy.slot_map.tolist() == [[0, 1, 2, 0]]
    assert copy.signature() == view.signature()
    for name, array in made.operands(1).items():
        assert copy.operands(1)[name].tobytes() == array.tobytes()
    assert copy.concepts == made.concepts and copy.recipe == made.recipe
    with pytest.raises(PolicyError, match=r"has no block 3; available: 1"):
        copy.operands(3)


def test_select_blocks_refuses(tmp_path: Path, made: Pack) -> None:
    with pytest.raises(PolicyError, match=r"has no block 2, 17; available: 1, 3"):
        made.select_blocks([17, 1, 2])
    with pytest.raises(PolicyError, match="no block chosen"):
        made.select_blocks([])
    given = arguments()
    given["default_policy"] = "gentle"
    pack = save_pack(tmp_path / "p", **given)
    with pytest.raises(
        PolicyError, match=r"default policy 'gentle' steers only blocks 3, none of them among 1"
    ):
        pack.select_blocks([1])


def poke(block: int, name: str, index: Any, value: float) -> Any:
    def change(given: dict[str, Any]) -> None:
        given["operands"][block][name][index] = value

    return change


def put(block: int, name: str, array: Any) -> Any:
    def change(given: dict[str, Any]) -> None:
        given["operands"][block][name] = array

    return change


def quantised(**changes: Any) -> Any:
    def change(given: dict[str, Any]) -> None:
        given["operands"] = {block: arrays("sae", "int8") | changes for block in (1, 3)}
        for operands in given["operands"].values():
            if operands["scales"] is None:
                del operands["scales"]

    return change


def drop(block: int, name: str) -> Any:
    return lambda given: given["operands"][block].pop(name)


def assign(**changes: Any) -> Any:
    return lambda given: given.update(changes)


def slots(first: list[int]) -> np.ndarray:
    return np.array([first, [0, 1, 2, 3]], np.int32)


P2 = Policy("a", 2, "all", (1, 3))

BAD: list[tuple[Any, str]] = [
    (poke(3, "dec", (2, 5), np.nan), r"block 3: 'dec' holds a value that is nan at \[2, 5\]"),
    (poke(1, "enc", (8, 11), np.inf), r"block 1: 'enc' holds a value that is inf at \[8, 11\]"),
    (poke(1, "shift", (0, 0), -np.inf), "'shift' holds a value that is -inf"),
    (poke(1, "limits", (2, 1), np.nan), "'limits' holds a value that is nan"),
    (poke(1, "limits", (2, 0), -0.5), "negative deadband"),
    (poke(1, "limits", (2, 3), 1), "reserved"),
    (put(1, "enc_bias", np.zeros(8, np.float32)), r"'enc_bias' must have shape \[9\].*got \[8\]"),
    (put(1, "dec", np.zeros((12, 9), np.float32)), r"'dec' must have shape \[9, 12\].*got \[12, 9\]"),
    (put(1, "gain", np.zeros((4, 8), np.float32)), r"'gain' must have shape \[4, 9\].*got \[4, 8\]"),
    (put(1, "shift", np.zeros((3, 12), np.float32)), r"'shift' must have shape \[4, 12\]"),
    (put(1, "limits", np.zeros((4, 3), np.float32)), r"'limits' must have shape \[4, 4\]"),
    (put(1, "dec", np.zeros((9, 12), np.float16)), "'enc' and 'dec' must have one dtype, got F32 and F16"),
    (put(1, "gain", np.ones((4, 9))), "'gain' must be F32, got F64"),
    (put(1, "undesirable", np.ones((4, 9), np.int8)), "'undesirable' must be BOOL, got I8"),
    (put(1, "enc", np.zeros(9, np.float32)), "'enc' must be a matrix"),
    (put(1, "enc", np.zeros((9, 0), np.float32)), "operand 'enc' is missing"),
    (put(1, "scale", np.ones(9, np.float32)), "unknown operand 'scale'"),
    (put(1, "scales", np.ones(9, np.float32)), r"'scales' must have shape \[2, 9\].*got \[9\]"),
    (put(1, "scales", np.ones((2, 9), np.float32)), "'enc' of dtype F32 takes no 'scales'"),
    (quantised(scales=None), r"'enc' of dtype I8 needs 'scales' \[2, m\]"),
    (quantised(scales=np.zeros((2, 9), np.float32)), "'scales' must be above 0"),
    (drop(1, "limits"), "operand 'limits' is missing"),
    (drop(1, "boost"), "all blocks of a pack must have the same shapes"),
    (assign(k=10), "k = 10 is larger than the 9 atoms"),
    (assign(k=0), "k must be an integer of at least 1"),
    (assign(k_out=-1), "k_out must be"),
    (assign(coder="omp"), "coder of sae must be one of topk, relu, jumprelu, none, got 'omp'"),
    (assign(op="linear"), "op must be one of sae, pursuit, affine"),
    (assign(sign="negative"), "sign must be one of"),
    (assign(tol=-1.0), "tol must be"),
    (assign(tau=1.5), "tau must be"),
    (assign(operands={}), "no block"),
    (assign(model=dataclasses.replace(MODEL, hidden_size=16)), "rows are 12 wide, .* hidden_size 16"),
    (assign(model=dataclasses.replace(MODEL, num_hidden_layers=3)), "steers block 3, .* blocks 0 to 2"),
    (assign(operands={-1: arrays()}), "blocks must be unique ascending integers"),
    (assign(median_norm={1: 1.0}), "median_norm must give one positive number for each of the blocks"),
    (assign(median_norm={1: 1.0, 3: 0.0}), "median_norm"),
    (assign(median_norm={1: 1.0, 3: float("nan")}), "median_norm"),
    (assign(concepts=[Concept(9, "x")]), "outside the 9 atoms"),
    (assign(concepts=[Concept(1, "x"), Concept(1, "y")]), "comes twice"),
    (assign(concepts=[Concept(1, "x", "bad")]), "has label 'bad', expected one of desirable"),
    (assign(concepts=[Concept(1, "")]), "has no name"),
    (assign(policies=[P2, dataclasses.replace(P2, slot=3)], default_policy="a"), "policy 'a' comes twice"),
    (assign(policies=[P2, dataclasses.replace(P2, name="b")]), "has slot 2, which another policy has"),
    (assign(policies=[dataclasses.replace(P2, slot=4)]), "must have a slot from 2 to 3, got 4"),
    (assign(policies=[dataclasses.replace(P2, slot=1)]), "must have a slot from 2 to 3, got 1"),
    (assign(policies=[dataclasses.replace(P2, name="off")]), "must have a name other than off, observe"),
    (assign(policies=[dataclasses.replace(P2, positions="last")]), "positions must be one of generated"),
    (assign(policies=[dataclasses.replace(P2, blocks=(1, 2))]), "names block 2, the pack has 1, 3"),
    (assign(policies=[dataclasses.replace(P2, blocks=(3, 1))]), "unique and ascending"),
    (assign(default_policy="none such"), "default policy 'none such' does not exist; choose one of off"),
    (assign(slot_map=np.zeros((2, 4), np.int64)), r"slot_map must be int32 \[2, 4\]"),
    (assign(slot_map=np.full((2, 4), 4, np.int32)), "slots from 0 to 3, got 4 to 4"),
    (assign(slot_map=slots([2, 1, 2, 0])), "slot 0 to 0"),
    (assign(slot_map=slots([0, 1, 0, 0])), "does not edit block 1 under policy 'default'"),
    (assign(slot_map=slots([0, 1, 2, 3])), "edits block 1 under policy 'gentle'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words[:30] for _, words in BAD])
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, change: Any, words: str
) -> None:
    given = arguments()
    change(given)
    with pytest.raises((ArtifactError, PolicyError), match=words) as caught:
        save_pack(tmp_path / "p", **given)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_pursuit_limits(tmp_path: Path) -> None:
    given = arguments("pursuit", m=70, d=3)
    with pytest.raises(ArtifactError, match="at least 1 and at most 64, got 65"):
        save_pack(tmp_path / "p", **{**given, "k": 65})
    given["operands"][1]["gram"] = given["operands"][1]["gram"].astype(ml_dtypes.bfloat16)
    with pytest.raises(ArtifactError, match="'gram' must be F32 or F16, got BF16"):
        save_pack(tmp_path / "p", **given)
    given = arguments()
    del given["operands"][1]["threshold"], given["operands"][3]["threshold"]
    with pytest.raises(ArtifactError, match=r"jumprelu needs 'threshold' \[9\]"):
        save_pack(tmp_path / "p", **{**given, "coder": "jumprelu"})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_first_bad_finds_any_place(dtype: Any, value: float) -> None:
    array = np.linspace(-3e4, 3e4, 5_000_000).astype(dtype).reshape(5, -1)
    assert first_bad(array) is None
    for index in (0, 4_999_999, 2_097_152):
        bad = array.copy()
        bad.reshape(-1)[index] = value
        assert first_bad(bad) == index
