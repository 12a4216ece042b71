"""From policies to the numbers that the operator reads."""

from __future__ import annotations

import numpy as np
import pytest

from daco_rt.artifacts import Concept, ModelIdentity, load_pack, load_sae, save_dictionary, save_sae
from daco_rt.errors import ArtifactError, PolicyError
from daco_rt.steering import PolicySpec, compile_actadd_pack, compile_pursuit_pack, compile_sae_pack

D, N = 12, 8
MODEL = ModelIdentity(D, 6, 100, 2, 1, "qwen2", (0.5, -0.25))
CONCEPTS = [
    Concept(0, "dagger", "undesirable", "weapon"),
    Concept(1, "rifle", "undesirable", "weapon"),
    Concept(2, "poison", "undesirable", "harm"),
    Concept(3, "kindness", "desirable", "virtue"),
    Concept(4, "honesty", "desirable", "virtue"),
    *(Concept(i, f"thing{i}") for i in range(5, N)),
]
NORMS = {2: 10.0, 4: 20.0}


def dictionary(path, concepts=CONCEPTS, scale=3.0):
    rng = np.random.default_rng(0)
    atoms = {block: (scale * rng.normal(size=(N, D))).astype(np.float32) for block in NORMS}
    atoms[2][7] = 0
    return save_dictionary(
        path / "d",
        model=MODEL,
        atoms=atoms,
        means={block: rng.normal(size=D).astype(np.float32) for block in NORMS},
        median_norm=NORMS,
        concepts=concepts,
    )


def sae(path, block=2, annotation=CONCEPTS, coder="topk", model=MODEL):
    rng = np.random.default_rng(block)
    weights = {
        "W_enc": rng.normal(size=(D, N)).astype(np.float32),
        "W_dec": rng.normal(size=(N, D)).astype(np.float32),
        "b_enc": rng.normal(size=N).astype(np.float32),
        "b_dec": rng.normal(size=D).astype(np.float32),
    }
    if coder == "jumprelu":
        weights["threshold"] = np.full(N, 0.1, np.float32)
    folder = path / f"sae{block}{coder}"
    save_sae(
        folder, model=model, block=block, coder=coder, k=3 if coder == "topk" else None, weights=weights,
        annotation=annotation,
    )  # fmt: skip
    return load_sae(folder)


def test_default_policy_removes_what_is_undesirable(tmp_path):
    pack = compile_pursuit_pack(dictionary(tmp_path), tmp_path / "p", k=4)
    assert (pack.op, pack.coder, pack.blocks, pack.default_policy, pack.slots_count) == (
        "pursuit", "omp", (2, 4), "default", 3,
    )  # fmt: skip
    assert pack.policy("default").positions == "all"
    np.testing.assert_array_equal(pack.slot_map, [[0, 1, 2], [0, 1, 2]])
    for block, norm in NORMS.items():
        o = pack.operands(block)
        np.testing.assert_array_equal(o["gain"], [[1] * N, [1] * N, [-1] * 3 + [1] * (N - 3)])
        np.testing.assert_array_equal(o["undesirable"][1:], [[True] * 3 + [False] * (N - 3)] * 2)
        np.testing.assert_allclose(o["limits"], [[0] * 4, [0] * 4, [0.4 * norm, 0, 0, 0]], rtol=1e-6)
        assert not o["shift"].any()
        assert o["boost"].size == 0


def test_atoms_are_unit_and_coding_is_centred_on_what_is_stored(tmp_path):
    made = dictionary(tmp_path)
    pack = compile_pursuit_pack(made, tmp_path / "p", k=4, dtype="fp16")
    o = pack.operands(2)
    stored = o["atoms"].astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(stored[:7], axis=1), 1, atol=1e-3)
    assert not stored[7].any()
    np.testing.assert_array_equal(o["analysis"], o["atoms"])
    np.testing.assert_allclose(o["bias"], -stored @ made.mean(2), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(o["gram"], stored @ stored.T, atol=1e-5)
    plain = compile_pursuit_pack(made, tmp_path / "q", k=4, centre=False, gram="none", dtype="bf16").operands(
        2
    )
    assert not plain["bias"].any()
    assert "gram" not in plain
    assert plain["atoms"].dtype.name == "bfloat16"


def test_policies_select_and_scale(tmp_path):
    policies = [
        PolicySpec("weapons", groups=("weapon",), positions="generated", gain=0.0, deadband=0.1),
        PolicySpec("poison", concepts=("poison",), blocks=(4,), max_dose=0.5, keep_norm=True),
        PolicySpec("kinder", labels=("neutral",), gain=1.0, boost=0.2, gamma=0.05),
    ]
    pack = compile_pursuit_pack(
        dictionary(tmp_path),
        tmp_path / "p",
        policies=policies,
        default_policy="poison",
        k=4,
        dtype="fp32",
        gain=0.5,
    )
    assert [(p.name, p.slot, p.positions, p.blocks) for p in pack.policies] == [
        ("weapons", 2, "generated", (2, 4)), ("poison", 3, "all", (4,)), ("kinder", 4, "all", (2, 4)),
    ]  # fmt: skip
    assert pack.default_policy == "poison"
    np.testing.assert_array_equal(pack.slot_map, [[0, 1, 2, 0, 4], [0, 1, 2, 3, 4]])
    o = pack.operands(4)
    np.testing.assert_array_equal(np.flatnonzero(o["gain"][2] != 1), [0, 1])
    np.testing.assert_array_equal(o["gain"][3], [1, 1, 0.5, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(np.flatnonzero(o["undesirable"][4]), [5, 6, 7])
    np.testing.assert_allclose(o["limits"][2:, :3], [[2, 0, 0], [8, 0.5, 1], [8, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(o["boost"][4], [0, 0, 0, 4, 4, 0, 0, 0], rtol=1e-6)
    assert not o["boost"][:4].any()
    total = o["atoms"][3] + o["atoms"][4]
    np.testing.assert_allclose(o["shift"][4], total / np.linalg.norm(total) * 0.05 * 20, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (PolicySpec("a", groups=("weapons",)), "no group 'weapons'; did you mean 'weapon'"),
        (PolicySpec("a", concepts=("daggers",)), "no concept 'daggers'; did you mean 'dagger'"),
        (PolicySpec("a", labels=("bad",)), "label 'bad' is unknown"),
        (PolicySpec("a", positions="everywhere"), "positions 'everywhere' are unknown"),
        (PolicySpec("a", blocks=(3,)), "names block 3; choose from 2, 4"),
        (PolicySpec("a", blocks=()), "names no block"),
        (PolicySpec("a", gain=float("nan")), "gain must be a finite number"),
        (PolicySpec("a", deadband=-1.0), "deadband must be 0 or more"),
        (PolicySpec("off"), "built in"),
    ],
)
def test_policies_that_cannot_be_are_refused(tmp_path, spec, sentence):
    with pytest.raises(PolicyError, match=sentence):
        compile_pursuit_pack(dictionary(tmp_path), tmp_path / "p", policies=[spec], k=4)
    assert not (tmp_path / "p").exists()


def test_policies_without_effect_are_refused(tmp_path):
    neutral = [Concept(i, f"thing{i}") for i in range(N)]
    made = dictionary(tmp_path, neutral)
    with pytest.raises(PolicyError, match="selects none of"):
        compile_pursuit_pack(made, tmp_path / "p", k=4)
    with pytest.raises(PolicyError, match="no concept is labelled desirable"):
        compile_pursuit_pack(made, tmp_path / "p", k=4, policies=[PolicySpec("a", gamma=0.1)])
    with pytest.raises(PolicyError, match="comes twice"):
        compile_pursuit_pack(made, tmp_path / "p", k=4, policies=[PolicySpec("a", labels=("neutral",))] * 2)
    with pytest.raises(PolicyError, match="empty"):
        compile_pursuit_pack(made, tmp_path / "p", k=4, policies=[])


def test_block_and_dtype_arguments(tmp_path):
    made = dictionary(tmp_path)
    assert compile_pursuit_pack(made, tmp_path / "p", k=4, blocks=[4]).blocks == (4,)
    with pytest.raises(PolicyError, match=r"block 3 asked for.*2, 4"):
        compile_pursuit_pack(made, tmp_path / "q", k=4, blocks=[3])
    with pytest.raises(ArtifactError, match="dtype must be one of"):
        compile_pursuit_pack(made, tmp_path / "q", k=4, dtype="int4")
    with pytest.raises(ArtifactError, match="already exists"):
        compile_pursuit_pack(made, tmp_path / "p", k=4)
    assert compile_pursuit_pack(made, tmp_path / "p", k=2, overwrite=True).k == 2


@pytest.mark.parametrize("coder", ["topk", "relu", "jumprelu"])
def test_sae_packs(tmp_path, coder):
    made = sae(tmp_path, coder=coder)
    pack = compile_sae_pack({2: made}, tmp_path / "p", median_norm=NORMS, dtype="fp32", deadband=0.2)
    assert (pack.op, pack.coder, pack.blocks) == ("sae", coder, (2,))
    o = load_pack(tmp_path / "p").operands(2)
    np.testing.assert_array_equal(o["enc"], made.encoder)
    np.testing.assert_array_equal(o["dec"], made.decoder)
    np.testing.assert_array_equal(o["enc_bias"], made.enc_bias)
    assert (o["threshold"].size == N) == (coder == "jumprelu")
    np.testing.assert_array_equal(o["gain"][2], [0] * 3 + [1] * (N - 3))
    assert o["limits"][2, 0] == pytest.approx(2.0)


def test_sae_blocks_keep_their_own_labels(tmp_path):
    other = [Concept(0, "dagger", "neutral"), Concept(5, "bomb", "undesirable")]
    saes = {2: sae(tmp_path, 2), 4: sae(tmp_path, 4, other)}
    pack = compile_sae_pack(saes, tmp_path / "p", median_norm=NORMS)
    np.testing.assert_array_equal(np.flatnonzero(pack.operands(2)["gain"][2] != 1), [0, 1, 2])
    np.testing.assert_array_equal(np.flatnonzero(pack.operands(4)["gain"][2] != 1), [5])
    assert pack.concept(0).label == "neutral"
    assert pack.concept(5).name == "thing5"
    named = compile_sae_pack(saes, tmp_path / "q", median_norm=NORMS, concepts=CONCEPTS)
    np.testing.assert_array_equal(np.flatnonzero(named.operands(4)["gain"][2] != 1), [0, 1, 2])


def test_saes_that_do_not_fit_are_refused(tmp_path):
    good = sae(tmp_path)
    for given, sentence in (
        ({}, "no SAE given"),
        ({3: good}, "reads block 2, but is given for block 3"),
        ({2: good, 4: sae(tmp_path, 4, coder="relu")}, "one pack needs them equal"),
        ({2: sae(tmp_path, 2, annotation=(), coder="relu")}, "no labelled latents"),
    ):
        with pytest.raises(ArtifactError, match=sentence):
            compile_sae_pack(given, tmp_path / "p", median_norm=NORMS)
    with pytest.raises(ArtifactError, match=r"median_norm.*block 2"):
        compile_sae_pack({2: good}, tmp_path / "p", median_norm={})
    with pytest.raises(ArtifactError, match="latent 9, it has 8"):
        compile_sae_pack(
            {2: good}, tmp_path / "p", median_norm=NORMS, concepts=[Concept(9, "x", "undesirable")]
        )
    stranger = ModelIdentity(D, 6, 100, 2, 1, "qwen2", (0.5, 0.25))
    with pytest.raises(ArtifactError, match="another model"):
        compile_sae_pack({2: good}, tmp_path / "p", median_norm=NORMS, model=stranger)


def test_vector_packs(tmp_path):
    direction = np.arange(D, dtype=np.float32)
    pack = compile_actadd_pack(
        {2: direction, 4: -direction}, tmp_path / "p", model=MODEL, median_norm=NORMS,
        strengths={"some": 0.1, "less": -0.2}, positions="generated", max_dose=0.4,
    )  # fmt: skip
    assert (pack.op, pack.coder, pack.default_policy) == ("sae", "none", "some")
    unit = direction / np.linalg.norm(direction)
    np.testing.assert_allclose(pack.operands(2)["shift"][2:], [unit, -2 * unit], rtol=1e-5)
    np.testing.assert_allclose(pack.operands(4)["shift"][2:], [-2 * unit, 4 * unit], rtol=1e-5)
    np.testing.assert_allclose(pack.operands(4)["limits"][2:], [[0, 0.4, 0, 0]] * 2, rtol=1e-6)
    for wrong, sentence in (
        ({2: np.zeros(D)}, "direction of its shift is zero"),
        ({2: np.ones(D + 1)}, r"shape \[12\], got \[13\]"),
        ({}, "no direction given"),
    ):
        with pytest.raises((ArtifactError, PolicyError), match=sentence):
            compile_actadd_pack(wrong, tmp_path / "q", model=MODEL, median_norm=NORMS)


@pytest.mark.parametrize("gram", ["auto", "none"])
def test_int8_rows_with_scales(tmp_path, gram):
    made = dictionary(tmp_path)
    pack = compile_pursuit_pack(made, tmp_path / "p", k=4, dtype="int8", gram=gram)
    found, plain = pack.operands(2), compile_pursuit_pack(made, tmp_path / "q", k=4, dtype="fp32").operands(2)
    assert pack.dtype == "int8" and found["analysis"].dtype == np.int8
    np.testing.assert_array_equal(found["analysis"], found["atoms"])
    np.testing.assert_array_equal(found["scales"][0], found["scales"][1])
    meant = found["atoms"] * found["scales"][0][:, None].astype(np.float64)
    assert np.abs(meant - plain["atoms"]).max() <= found["scales"].max() / 2 * 1.001
    # Everything else is derived from what the kernels multiply by.
    np.testing.assert_allclose(found["bias"], -(meant @ np.asarray(made.mean(2), np.float64)), atol=1e-5)
    if gram == "auto":
        np.testing.assert_allclose(found["gram"], meant @ meant.T, atol=1e-5)


def test_elastic_net_packs(tmp_path):
    made = dictionary(tmp_path)
    pack = compile_pursuit_pack(made, tmp_path / "p", coder="elastic_net", tau=0.8, alpha=0.1)
    assert (pack.coder, pack.tau, pack.alpha) == ("elastic_net", 0.8, 0.1)
    with pytest.raises(ArtifactError, match="alpha must be above 0 with coder elastic_net"):
        compile_pursuit_pack(made, tmp_path / "q", coder="elastic_net", alpha=0.0)
