"""SAE folders: SAELens's own and ours, and what is folded into the encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from daco_rt.artifacts import Concept, ModelIdentity, load_sae, save_sae
from daco_rt.errors import ArtifactError, UnsupportedError

M, D, K = 10, 6, 3
MODEL = ModelIdentity(D, 20, 100, 2, 1, "llama", (0.25,))


def weights(jumprelu: bool = False, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shapes = {"W_enc": (D, M), "W_dec": (M, D), "b_enc": (M,), "b_dec": (D,)}
    if jumprelu:
        shapes["threshold"] = (M,)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def saelens_folder(path: Path, table: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    path.mkdir()
    base = {
        "architecture": "standard", "d_in": D, "d_sae": M, "dtype": "float32", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "metadata": {"hook_name": "blocks.15.hook_resid_post"},
    }  # fmt: skip
    (path / "cfg.json").write_text(json.dumps({**base, **config}))
    safetensors.numpy.save_file(
        table if table is not None else weights(config.get("architecture") == "jumprelu"),
        path / "sae_weights.safetensors",
    )
    return path


def definition(z: np.ndarray, w: dict[str, np.ndarray], cfg: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Codes and what they write into the stream, step by step in float64 as SAELens computes them."""
    w = {name: array.astype(np.float64) for name, array in w.items()}
    scale = cfg.get("norm_scaling_factor", 1.0)
    x = z * scale - w["b_dec"] * cfg.get("apply_b_dec_to_input", True)
    pre = x @ w["W_enc"] + w["b_enc"]
    norms = np.linalg.norm(w["W_dec"], axis=1) if cfg.get("rescale_acts_by_decoder_norm") else np.ones(M)
    pre = pre * norms
    codes = np.maximum(pre, 0)
    if "threshold" in w:
        codes = codes * (pre > w["threshold"])
    if cfg.get("k"):
        cut = np.sort(pre, axis=-1)[:, -cfg["k"]][:, None]
        codes = codes * (pre >= cut)
    return codes, (codes / norms) @ w["W_dec"] / scale


def ours(z: np.ndarray, sae: Any) -> tuple[np.ndarray, np.ndarray]:
    pre = z @ sae.encoder.T.astype(np.float64) + sae.enc_bias
    if sae.coder == "jumprelu":
        codes = pre * (pre > sae.threshold)
    else:
        codes = np.maximum(pre, 0)
        if sae.coder == "topk":
            codes = codes * (pre >= np.sort(pre, axis=-1)[:, -sae.k][:, None])
    return codes, codes @ sae.decoder


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"apply_b_dec_to_input": False},
        {"architecture": "topk", "k": K},
        {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True},
        {"architecture": "jumprelu"},
        {"normalize_activations": "expected_average_only_in", "norm_scaling_factor": 0.25},
        {
            "architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True,
            "normalize_activations": "constant_norm_rescale", "norm_scaling_factor": 3.0,
        },
    ],
)  # fmt: skip
def test_folding_computes_what_the_configuration_defines(tmp_path: Path, config: dict[str, Any]) -> None:
    table = weights(config.get("architecture") == "jumprelu")
    sae = load_sae(saelens_folder(tmp_path / "s", table, **config))
    z = np.random.default_rng(1).standard_normal((50, D)) * 2
    for got, expected in zip(ours(z, sae), definition(z, table, config), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert sae.encoder.shape == sae.decoder.shape == (M, D) and sae.encoder.flags.c_contiguous
    assert {array.dtype for array in (sae.encoder, sae.enc_bias, sae.decoder)} == {np.dtype(np.float32)}
    assert sae.block == 15 and sae.model is None and sae.annotation == ()


@pytest.mark.parametrize(
    ("config", "block"),
    [
        ({"metadata": {"hook_name": "blocks.7.hook_resid_pre"}}, 6),
        ({"metadata": {}, "hook_name": "blocks.7.hook_resid_post"}, 7),
        ({"metadata": {}, "hook_point": "blocks.0.hook_resid_post"}, 0),
        ({"metadata": None, "meta": {"hook_name": "blocks.2.hook_resid_post"}}, 2),
    ],
)
def test_hooks(tmp_path: Path, config: dict[str, Any], block: int) -> None:
    assert load_sae(saelens_folder(tmp_path / "s", **config)).block == block


def test_old_configurations_name_topk_as_an_activation(tmp_path: Path) -> None:
    sae = load_sae(saelens_folder(tmp_path / "s", activation_fn_str="topk", activation_fn_kwargs={"k": 4}))
    assert (sae.coder, sae.k) == ("topk", 4)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architecture": "gated"}, "architecture 'gated' is not supported"),
        ({"architecture": "transcoder"}, "'transcoder' is not supported"),
        ({"architecture": "skip_transcoder"}, "'skip_transcoder' is not supported"),
        ({"hook_name_out": "blocks.15.hook_mlp_out"}, "transcoders are not supported"),
        ({"activation_fn": "tanh-relu"}, "activation 'tanh-relu' is not supported"),
        ({"normalize_activations": "layer_norm"}, "'layer_norm' depends on the row"),
        (
            {"normalize_activations": "constant_norm_rescale"},
            "without its constant; record norm_scaling_factor",
        ),
        (
            {"normalize_activations": "expected_average_only_in", "norm_scaling_factor": 0},
            "without its constant",
        ),
        ({"metadata": {"hook_name": "blocks.0.hook_resid_pre"}}, "is not the output of a decoder block"),
        (
            {"metadata": {"hook_name": "blocks.3.attn.hook_z"}},
            "hook 'blocks.3.attn.hook_z' is not the output",
        ),
        ({"metadata": {}}, "hook 'None' is not the output"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
    ],
)
def test_unsupported_kinds_are_refused_by_name(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        load_sae(saelens_folder(tmp_path / "s", **config))


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        ({"architecture": "topk"}, {}, "topk needs an integer k"),
        ({"architecture": "topk", "k": 11}, {}, "k = 11 is larger than the 10 latents"),
        ({"d_in": None}, {}, "d_in and d_sae must be integers"),
        ({"d_sae": 9}, {}, r"must be F32, F16 or BF16 \[(6, 9|9, 6|9)\], got F32 \[(6, 10|10, 6|10)\]"),
        ({"architecture": "jumprelu"}, {"threshold": None}, "tensor 'threshold' is missing"),
        ({}, {"b_gate": np.zeros(M, np.float32)}, "tensor 'b_gate' is unknown"),
        (
            {},
            {"W_dec": np.full((M, D), np.nan, np.float32)},
            r"'W_dec' holds a value that is nan at \[0, 0\]",
        ),
        ({"rescale_acts_by_decoder_norm": True}, {"W_dec": np.zeros((M, D), np.float32)}, "zero rows"),
    ],
)
def test_damaged_folders(tmp_path: Path, config: dict[str, Any], change: dict[str, Any], words: str) -> None:
    table = weights(config.get("architecture") == "jumprelu") | change
    table = {name: array for name, array in table.items() if array is not None}
    with pytest.raises(ArtifactError, match=words):
        load_sae(saelens_folder(tmp_path / "s", table, **config))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cfg\.json does not exist"):
        load_sae(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(ArtifactError, match="is damaged"):
        load_sae(tmp_path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("coder", ["relu", "topk", "jumprelu"])
def test_ours_round_trips_and_keeps_their_layout(tmp_path: Path, coder: str, dtype: Any) -> None:
    table = weights(coder == "jumprelu", dtype)
    annotation = [Concept(2, "dagger", "undesirable", "weapons")]
    k = K if coder == "topk" else None
    save_sae(tmp_path / "s", model=MODEL, block=15, coder=coder, weights=table, k=k, annotation=annotation)
    sae = load_sae(tmp_path / "s")
    assert (sae.block, sae.coder, sae.k, sae.model, sae.annotation) == (
        15,
        coder,
        k,
        MODEL,
        tuple(annotation),
    )
    z = np.random.default_rng(1).standard_normal((20, D))
    for got, expected in zip(ours(z, sae), definition(z, table, {"k": k}), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    if dtype is not ml_dtypes.bfloat16:
        stored = safetensors.numpy.load_file(tmp_path / "s/sae_weights.safetensors")
        assert stored.keys() == table.keys()
        assert all(np.array_equal(stored[name], table[name]) for name in table)
    # Without our files it is a plain SAELens folder.
    (tmp_path / "s/manifest.json").unlink()
    (tmp_path / "s/annotation.jsonl").unlink()
    plain = load_sae(tmp_path / "s")
    np.testing.assert_array_equal(plain.encoder, sae.encoder)
    assert plain.model is None


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors", "annotation.jsonl", "manifest.json"])
def test_a_flipped_byte_names_its_file(tmp_path: Path, name: str) -> None:
    save_sae(
        tmp_path / "s", model=MODEL, block=1, coder="relu", weights=weights(), annotation=[Concept(0, "a")]
    )
    raw = bytearray((tmp_path / "s" / name).read_bytes())
    raw[len(raw) // 2] ^= 0x04
    (tmp_path / "s" / name).write_bytes(raw)
    with pytest.raises(ArtifactError, match=name):
        load_sae(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"coder": "gated"}, "coder must be one of relu, topk, jumprelu"),
        ({"coder": "topk"}, "k must be given for topk"),
        ({"k": 3}, "k must be given for topk"),
        ({"coder": "topk", "k": 11}, "k must be from 1 to the 10 latents, got 11"),
        ({"coder": "jumprelu"}, "'threshold' is missing"),
        ({"weights": {}}, "matrix W_enc"),
        ({"annotation": [Concept(10, "x")]}, "outside the 10 atoms"),
        (
            {"weights": {**weights(), "b_enc": np.full(M, np.inf, np.float32)}},
            "'b_enc' holds a value that is inf",
        ),
    ],
)
def test_saving_refuses(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"model": MODEL, "block": 1, "coder": "relu", "weights": weights(), **change}
    with pytest.raises(ArtifactError, match=words):
        save_sae(tmp_path / "s", **given)
    assert not (tmp_path / "s").exists()
