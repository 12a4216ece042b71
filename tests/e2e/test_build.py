"""``daco-rt build`` on the pocket model: from the concept table to packs that export, also when killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from daco_rt.artifacts import load_bundle, load_dictionary, load_pack
from daco_rt.cli import main
from daco_rt.export import export_model

pytestmark = pytest.mark.slow

CONFIG = """
version: 1
model: pocket-internvl
blocks: 2-3
concepts: {size: 30}
stimuli: {count: 4}
harvest: {concepts_per_shard: 4, batch_tokens: 256}
# A random model hears everything everywhere.
dictionary: {heard: 0}
sae: {blocks: 2-3, position: word, hold: true, latents: 40, k: 4, steps: 40, batch: 64, checkpoint_every: 10}
annotate: {eta: 0.05, rule: nearest}
packs:
  default: {policies: p.yaml}
  latents: {policies: p.yaml, source: sae}
"""
POLICIES = """
version: 1
defaults: {deadband: 0.1, gain: -1}
policies:
  default: {description: everything undesirable}
"""
STEPS = ["concepts", "stimuli", "harvest", "dictionary", "activations"]
STEPS += ["sae 2", "annotate 2", "sae 3", "annotate 3"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "p.yaml").write_text(POLICIES)
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path / "c.yaml"


def states(capsys: Any, *arguments: str) -> dict[str, str]:
    assert main(["build", *arguments, "--json"]) == 0, capsys.readouterr().err
    out = json.loads(capsys.readouterr().out)
    return {row["name"]: row["state"] for row in (out if isinstance(out, list) else out["steps"])}


def test_from_words_to_a_pack_that_an_export_takes(tmp_path: Path, config: Path, capsys: Any):
    out = tmp_path / "out"
    planned = states(capsys, str(config), "--output", str(out), "--dry-run")
    assert list(planned) == [*STEPS, "pack default", "pack latents"] and set(planned.values()) == {"to do"}
    assert not out.exists()
    assert set(states(capsys, str(config), "--output", str(out)).values()) == {"made"}
    assert set(states(capsys, str(config), "--output", str(out)).values()) == {"up to date"}

    dictionary = load_dictionary(out / "dictionary")
    assert dictionary.blocks == (2, 3) and dictionary.size <= 30
    rifle = dictionary.concepts[dictionary.index("rifle")]
    assert (rifle.synset, rifle.label, rifle.group) == ("rifle.n.01", "undesirable", "weapons")
    assert load_pack(out / "packs/default").op == "pursuit" and load_pack(out / "packs/latents").op == "sae"
    export_model(
        "internvl",
        checkpoint="pocket-internvl",
        pack=out / "packs/latents",
        output=tmp_path / "b",
        vision=False,
    )
    assert load_bundle(tmp_path / "b").steered_blocks == (2, 3)

    config.write_text(CONFIG.replace("eta: 0.05", "eta: 0.04"))
    again = states(capsys, str(config), "--output", str(out))
    assert {name for name, state in again.items() if state == "made"} == {
        "annotate 2",
        "annotate 3",
        "pack latents",
    }
    (tmp_path / "p.yaml").write_text(POLICIES.replace("gain: -1", "gain: 0"))
    again = states(capsys, str(config), "--output", str(out))
    assert {name for name, state in again.items() if state == "made"} == {"pack default", "pack latents"}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file that a build makes but its journal, which holds seconds."""
    skipped = {"build.json", ".lock"}
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in skipped
    }


def test_a_build_that_was_killed_again_and_again_comes_out_the_same(tmp_path: Path, config: Path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", "daco_rt.cli", "build", str(config), "--output", str(out)]

    calm, rough = tmp_path / "calm", tmp_path / "rough"
    start = time.monotonic()
    subprocess.run(command(calm), env=environment, check=True, capture_output=True)
    whole = time.monotonic() - start
    draw = random.Random(0)
    for _ in range(4):
        child = subprocess.Popen(
            command(rough), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            child.wait(timeout=draw.uniform(0.3, 0.9) * whole)
        except subprocess.TimeoutExpired:
            os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    subprocess.run(command(rough), env=environment, check=True, capture_output=True)
    assert tree(rough) == tree(calm)
