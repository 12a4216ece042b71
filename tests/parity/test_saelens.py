"""Our SAE folders in the real sae-lens and its folders here, with equal codes.

Needs an environment of its own: ``make test-saelens`` makes it, or DACO_RT_SAELENS_PYTHON names one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daco_rt.artifacts import Concept, ModelIdentity, Sae, load_sae, save_sae
from daco_rt.errors import UnsupportedError
from daco_rt.ops.reference import steer_sae

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("DACO_RT_SAELENS_PYTHON", ROOT / ".venv-saelens" / "bin" / "python"))
WORKER = Path(__file__).with_name("saelens_worker.py")
D, M, K = 12, 40, 5
MODEL = ModelIdentity(D, 20, 100, 2, 1, "llama", (0.25,))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason=f"no sae-lens at {PYTHON}; run 'make test-saelens'"),
]


@pytest.fixture
def rows(tmp_path: Path) -> np.ndarray:
    made = np.random.default_rng(5).standard_normal((64, D)).astype(np.float32) * 3
    np.save(tmp_path / "rows.npy", made)
    return made


def saelens(tmp_path: Path, *arguments: str) -> dict[str, np.ndarray]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(PYTHON), str(WORKER), *arguments, str(tmp_path / "rows.npy"), str(tmp_path / "out.npz")],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return dict(np.load(tmp_path / "out.npz"))


def codes_of(sae: Sae, rows: np.ndarray) -> np.ndarray:
    """Codes as the operator's reference finds them, every latent watched."""
    latents = len(sae.encoder)
    flags = np.ones((2, latents), bool)
    found = steer_sae(
        rows, np.ones(len(rows), np.int32), sae.encoder, sae.enc_bias, sae.decoder,
        gain=np.ones((2, latents), np.float32), undesirable=flags, shift=np.zeros((2, rows.shape[1]),
        np.float32), limits=np.zeros((2, 4), np.float32), threshold=sae.threshold, coder=sae.coder, k=sae.k or
        1, k_out=latents,
    )  # fmt: skip
    codes = np.zeros((len(rows), latents))
    for row, (index, value) in enumerate(zip(found.support_index, found.support_value, strict=True)):
        codes[row, index[index >= 0]] = value[index >= 0]
    return codes


def compare(sae: Sae, rows: np.ndarray, theirs: dict[str, np.ndarray]) -> None:
    ours = codes_of(sae, rows)
    # A code may be scaled where the decoder's row is scaled the other way; what it writes is the same.
    ours = ours * np.linalg.norm(sae.decoder, axis=1)
    norms = theirs.get("norms", 1.0)
    assert (ours > 0).any() and ((ours > 0) == (theirs["codes"] > 0)).all()
    assert np.allclose(ours, theirs["codes"] * norms, rtol=1e-4, atol=1e-4)
    decoded = (ours / np.linalg.norm(sae.decoder, axis=1)) @ sae.decoder + sae.decoder_bias
    assert np.allclose(decoded, theirs["decoded"], rtol=1e-4, atol=1e-3)


def weights(threshold: bool) -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    rows = random.standard_normal((M, D)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    made: dict[str, Any] = {
        "W_enc": np.ascontiguousarray(rows.T) * np.float32(0.8),
        "W_dec": rows,
        "b_enc": random.standard_normal(M).astype(np.float32) * np.float32(0.1),
        "b_dec": random.standard_normal(D).astype(np.float32),
    }
    return made | ({"threshold": np.abs(made["b_enc"]) * 5} if threshold else {})


@pytest.mark.parametrize("coder", ["topk", "relu", "jumprelu"])
def test_ours_load_there(tmp_path: Path, rows: np.ndarray, coder: str):
    sae = save_sae(
        tmp_path / "sae", model=MODEL, block=3, coder=coder, k=K if coder == "topk" else None,
        weights=weights(coder == "jumprelu"), annotation=[Concept(0, "dagger", "undesirable")],
    )  # fmt: skip
    compare(sae, rows, saelens(tmp_path, "codes", str(sae.path)))


@pytest.mark.parametrize("kind", ["standard", "topk", "topk-rescaled", "jumprelu", "no-pre-bias"])
def test_theirs_load_here(tmp_path: Path, rows: np.ndarray, kind: str):
    theirs = saelens(tmp_path, "save", kind, str(tmp_path / "sae"))
    sae = load_sae(tmp_path / "sae")
    assert sae.block == 3 and sae.model is None
    if kind != "topk-rescaled":
        theirs["norms"] = np.linalg.norm(sae.decoder, axis=1)
    compare(sae, rows, theirs)


def test_what_cannot_be_folded_is_refused_by_name(tmp_path: Path, rows: np.ndarray):
    saelens(tmp_path, "save", "layer-norm", str(tmp_path / "sae"))
    with pytest.raises(UnsupportedError, match="layer_norm"):
        load_sae(tmp_path / "sae")


def test_a_trained_one_loads_there(tmp_path: Path):
    """From our own training to sae-lens: the biases carry the training's scale divided out."""
    sys.path.insert(0, str(ROOT / "tests" / "unit"))
    try:
        import sae_samples as samples
    finally:
        sys.path.pop(0)
    from daco_rt.sae import StoreSource, convert_to_jumprelu, train_sae

    store = samples.store(tmp_path / "store")
    source = StoreSource(store, samples.BLOCK)
    sae = train_sae(
        source, tmp_path / "sae", model=samples.MODEL, block=samples.BLOCK, training=samples.quick(),
        dictionary=samples.dictionary(tmp_path / "dictionary"), progress=False,
    )  # fmt: skip
    rows = samples.rows(64, seed=50)
    np.save(tmp_path / "rows.npy", rows)
    compare(sae, rows, saelens(tmp_path, "codes", str(sae.path)))
    jump, _ = convert_to_jumprelu(sae, source, tmp_path / "jump", rows=300)
    compare(jump, rows, saelens(tmp_path, "codes", str(jump.path)))
