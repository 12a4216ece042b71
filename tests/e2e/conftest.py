"""One small exported model for the end-to-end tests: made once a session, never written to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from daco_rt.artifacts import Concept, Pack, Policy, save_pack
from daco_rt.export import export_model
from daco_rt.models import Checkpoint, model_identity, resolve_checkpoint


@pytest.fixture(scope="session")
def pocket() -> Checkpoint:
    """The seeded pocket model, opened."""
    return resolve_checkpoint("internvl", "pocket-internvl")


@pytest.fixture(scope="session")
def pocket_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the pocket model with its own concept pack; tests that change it take a copy."""
    path = tmp_path_factory.mktemp("bundles") / "pocket"
    export_model("internvl", checkpoint="pocket-internvl", output=path)
    return path


@pytest.fixture
def bundle_copy(pocket_bundle: Path, tmp_path: Path) -> Path:
    """A private copy of the pocket bundle, to damage."""
    copy = tmp_path / "bundle"
    shutil.copytree(pocket_bundle, copy)
    return copy


@pytest.fixture
def make_pack(pocket: Checkpoint, tmp_path: Path) -> Callable[..., Pack]:
    """Make a pack of random atoms for the pocket model."""

    def make(name: str = "pack", *, seed: int = 0, dim: int = 0, **changes) -> Pack:
        d, m, blocks = dim or pocket.decoder.hidden_size, 40, (2, 3)
        draw = np.random.default_rng(seed)
        operands = {}
        for block in blocks:
            atoms = draw.normal(size=(m, d)).astype(np.float32)
            atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
            gain = np.ones((3, m), np.float32)
            gain[2, : m // 2] = -1
            undesirable = np.zeros((3, m), bool)
            undesirable[1:, : m // 2] = True
            operands[block] = {
                "enc": atoms,
                "enc_bias": np.zeros(m, np.float32),
                "dec": atoms,
                "gain": gain,
                "undesirable": undesirable,
                "shift": np.zeros((3, d), np.float32),
                "limits": np.zeros((3, 4), np.float32),
            }
        fields = {
            "model": replace(model_identity(pocket), hidden_size=d),
            "op": "sae",
            "coder": "topk",
            "k": 4,
            "k_out": 4,
            "operands": operands,
            "policies": [Policy("default", 2, "all", blocks)],
            "default_policy": "default",
            "concepts": [
                Concept(i, f"concept {i}", "undesirable" if i < m // 2 else "neutral") for i in range(m)
            ],
            "median_norm": dict.fromkeys(blocks, 1.0),
        }
        return save_pack(tmp_path / name, **(fields | changes))

    return make


@pytest.fixture
def run_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``daco-rt`` as a user does; returns status, standard output and standard error."""

    def run(*arguments: object, module: str = "daco_rt.cli", **options) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            capture_output=True,
            text=True,
            env=os.environ | {"COLUMNS": "200"},
            timeout=300,
            **options,
        )

    return run


@pytest.fixture
def one_sentence() -> Callable[[subprocess.CompletedProcess[str]], str]:
    """Return the error of a command that refused its input: status 2, one line, no traceback."""

    def check(result: subprocess.CompletedProcess[str]) -> str:
        assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
        assert "Traceback" not in result.stderr
        lines = [line for line in result.stderr.splitlines() if "error:" in line]
        assert len(lines) == 1, result.stderr
        return lines[0]

    return check
