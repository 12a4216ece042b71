"""Packs that remove projections: what is stored, what is refused, and that a block's rows lose the directions."""

from __future__ import annotations

import numpy as np
import pytest

from daco_rt.artifacts import ModelIdentity, describe, load_pack, save_pack
from daco_rt.errors import ArtifactError, PolicyError
from daco_rt.ops import numpy as kernels
from daco_rt.steering import compile_affine_pack

D = 16
MODEL = ModelIdentity(D, 4, 100, 2, 1, "llama", (0.25, -0.5))
NORMS = {1: 10.0, 3: 20.0}


def directions(rank=2, seed=0):
    rng = np.random.default_rng(seed)
    return {block: rng.normal(size=(rank, D)) * 7 for block in NORMS}


def compiled(path, made=None, **options):
    return compile_affine_pack(
        directions() if made is None else made, path, model=MODEL, median_norm=NORMS, **options
    )


def test_rows_lose_what_they_have_along_the_directions(tmp_path):
    made = directions()
    pack = compiled(tmp_path / "p", made, strengths={"remove": 1.0, "half": 0.5, "mirror": 2.0})
    pack = load_pack(pack.path)
    assert (pack.op, pack.coder, pack.dim, pack.atoms, pack.slots_count, pack.k_out) == (
        "affine", "identity", D, 2, 5, 0
    )  # fmt: skip
    assert pack.default_policy == "remove"
    z = np.random.default_rng(1).normal(size=(6, D)).astype(np.float32)
    for block, rows in made.items():
        for slot, left in ((2, 0.0), (3, 0.5), (4, -1.0)):
            out = kernels.steer_affine(z, np.full(6, slot, np.int32), **pack.operands(block), phi=pack.coder)
            np.testing.assert_allclose(out.z @ rows.T, left * (z @ rows.T), atol=1e-4)
            rest = np.linalg.svd(rows)[2][2:]
            np.testing.assert_allclose(out.z @ rest.T, z @ rest.T, atol=1e-5)


def test_means_and_positive_parts(tmp_path):
    axis = {block: np.eye(D)[:2] * 3 for block in NORMS}
    mean = {block: np.full(D, 0.5) for block in NORMS}
    pack = compiled(tmp_path / "p", axis, means=mean, positive_only=True, dtype="fp16", max_dose=0.9)
    assert (pack.coder, pack.dtype) == ("relu", "fp16")
    z = np.full((2, D), 0.25, np.float32)
    z[1, :2] = 2.0, -2.0
    out = kernels.steer_affine(z, np.full(2, 2, np.int32), **pack.operands(1), phi=pack.coder)
    np.testing.assert_array_equal(out.z[0], z[0])  # below the mean on both axes
    np.testing.assert_allclose(out.z[1, :2], [0.5, -2.0], atol=1e-5)
    np.testing.assert_allclose(pack.operands(1)["limits"][2], [0, 0.9, 0, 0], atol=1e-6)


def test_a_single_direction_is_a_vector(tmp_path):
    pack = compiled(tmp_path / "p", {block: np.arange(D) + 1.0 for block in NORMS}, positions="generated")
    assert pack.atoms == 1 and pack.policy("default").positions == "generated"
    about = describe(pack.path)
    assert about["policies"][0]["edited"] == {"1": 1, "3": 1}
    assert about["operands"]["a"]["shape"] == [3, 1, D]


def test_packs_come_back_from_a_view(tmp_path):
    pack = compiled(tmp_path / "p").select_blocks([3]).save_to(tmp_path / "q")
    assert pack.blocks == (3,) and set(pack.operands(3)) == {"a", "a_bias", "b", "shift", "limits"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"made": {}}, ArtifactError, "no direction given"),
        ({"made": {1: np.ones((2, D)), 3: np.ones(D)}}, ArtifactError, "as many directions"),
        ({"made": dict.fromkeys(NORMS, np.ones(D + 1))}, ArtifactError, rf"block 1: directions .*\[r, {D}\]"),
        ({"made": dict.fromkeys(NORMS, np.ones((2, D)))}, ArtifactError, "depends on the others"),
        ({"made": dict.fromkeys(NORMS, np.zeros(D))}, ArtifactError, "is zero or depends"),
        ({"strengths": {}}, PolicyError, "strengths must be finite, one at least"),
        ({"strengths": {"a": float("nan")}}, PolicyError, "strengths must be finite"),
        ({"positive_only": True}, ArtifactError, "must be orthogonal to each other"),
        ({"means": {1: np.zeros(3)}}, ArtifactError, rf"the mean of block 1 must have shape \[{D}\]"),
        ({"dtype": "int8"}, ArtifactError, "dtype must be one of fp32, fp16, bf16"),
        ({"positions": "some"}, PolicyError, "positions 'some' are unknown"),
    ],
)
def test_misuse(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        compiled(tmp_path / "p", **change)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("b", np.zeros((3, 2, D), np.float32), r"'b' must have shape \[3, 16, 2\] .*got \[3, 2, 16\]"),
        ("a", np.zeros((2, D), np.float32), "'a' must be a matrix a slot"),
        ("a", np.zeros((1, 2, D), np.float32), "'a' must have a row a slot"),
        ("a", np.zeros((3, 2, D), np.int8), "'a' must be F32 or F16 or BF16, got I8"),
        (
            "gain",
            np.ones((3, 2), np.float32),
            "unknown operand 'gain'; affine takes a, a_bias, b, shift, limits",
        ),
    ],
)
def test_operands_that_do_not_fit(tmp_path, name, array, message):
    pack = compiled(tmp_path / "p")
    with pytest.raises(ArtifactError, match=message):
        save_pack(
            tmp_path / "q", model=MODEL, op="affine", coder="identity", k=1, policies=pack.policies,
            operands={block: pack.operands(block) | {name: array} for block in NORMS}, concepts=(),
            default_policy="default", median_norm=NORMS,
        )  # fmt: skip
