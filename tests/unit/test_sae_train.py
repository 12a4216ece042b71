"""Training: what it learns, what it records, and that a kill changes nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sae_samples as samples
import torch
from sae_samples import ATOMS, BLOCK, DIM, MODEL, quick

from daco_rt.artifacts import load_dictionary, load_sae
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.sae import SaeTraining, ShuffledRows, StoreSource, open_store, read_metrics, train_sae
from daco_rt.sae.autoencoder import Autoencoder, initial_directions


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("world")
    samples.store(folder / "store", dtype="fp32")
    samples.dictionary(folder / "dictionary")
    return folder


def train(world: Path, output: Path, **changes: Any) -> Any:
    options = {
        name: changes.pop(name)
        for name in ("resume", "overwrite", "tensorboard", "model", "run")
        if name in changes
    }
    training = quick(**changes)
    return train_sae(
        StoreSource(open_store(world / "store"), BLOCK),
        output,
        model=options.pop("model", MODEL),
        block=BLOCK,
        training=training,
        dictionary=load_dictionary(world / "dictionary") if training.init == "dictionary" else None,
        progress=False,
        **options,
    )


def recipe(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_bytes())["recipe"]


# ---- what is learnt


@pytest.mark.parametrize("sparsity", ["topk", "l1"])
def test_training_explains_held_out_rows(world: Path, tmp_path: Path, sparsity: str):
    sae = train(world, tmp_path / "sae", sparsity=sparsity, steps=200)
    found = recipe(sae.path)
    assert found["evaluation"]["explained_variance"] > 0.8
    assert np.linalg.norm(sae.decoder, axis=1) == pytest.approx(1, abs=1e-5)
    assert found["evaluated_on"].startswith("held-out chunks")
    # The saved SAE, as the operator computes it in the stream's own units, explains as much.
    rows = samples.rows(500, seed=99)
    codes = np.maximum(rows @ sae.encoder.T + sae.enc_bias, 0)
    if sparsity == "topk":
        codes[codes < np.sort(codes, axis=1)[:, [-3]]] = 0
    left = rows - codes @ sae.decoder - sae.decoder_bias
    assert 1 - (left**2).sum() / ((rows - rows.mean(axis=0)) ** 2).sum() == pytest.approx(
        found["evaluation"]["explained_variance"], abs=0.05
    )
    metrics = read_metrics(tmp_path / "sae.run")
    assert metrics[-1]["step"] == 200 and metrics[-1]["eval_l0"] == pytest.approx(
        found["evaluation"]["l0"], rel=1e-6
    )
    assert metrics[0]["loss"] > metrics[-1]["loss"]


def test_dictionary_start_beats_random_and_keeps_its_atoms(world: Path, tmp_path: Path):
    ours = recipe(train(world, tmp_path / "ours").path)
    control = recipe(train(world, tmp_path / "control", init="random", latents=ATOMS).path)
    assert ours["evaluation"]["explained_variance"] > control["evaluation"]["explained_variance"] + 0.05
    assert ours["cosine_to_own_atom"]["mean"] > 0.95
    assert "cosine_to_own_atom" not in control and control["dictionary"] is None


def test_held_rows_stay_at_their_atoms_while_the_others_learn(world: Path, tmp_path: Path):
    free = train(world, tmp_path / "free", latents=ATOMS + 6)
    held = train(world, tmp_path / "held", latents=ATOMS + 6, hold=True, weight_decay=0.01)
    atoms = load_dictionary(world / "dictionary").atoms(BLOCK).astype(np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    assert np.allclose(held.decoder[:ATOMS], atoms, atol=1e-5)
    assert not np.allclose(free.decoder[:ATOMS], atoms, atol=1e-2)
    start = initial_directions(atoms, atoms.shape[1], quick(latents=ATOMS + 6)).numpy()
    assert not np.allclose(held.decoder[ATOMS:], start[ATOMS:], atol=1e-2)
    assert recipe(held.path)["evaluation"]["explained_variance"] > 0.5


def test_every_hyper_parameter_is_in_the_artifact(world: Path, tmp_path: Path):
    found = recipe(train(world, tmp_path / "sae", weight_decay=0.01).path)
    assert found["training"] == quick(weight_decay=0.01).to_dict()
    assert found["source"]["rows"] == 800 and found["dictionary"]["concepts"] == ATOMS
    assert {"input_scale", "encoder_scale", "dead_after", "run_on"} <= found.keys()


def test_bf16_autocast_trains_about_as_well(world: Path, tmp_path: Path):
    full = recipe(train(world, tmp_path / "full", steps=150).path)["evaluation"]
    half = recipe(train(world, tmp_path / "half", steps=150, precision="bf16").path)["evaluation"]
    assert half["explained_variance"] == pytest.approx(full["explained_variance"], abs=0.05)


# ---- its parts


def autoencoder(**changes: Any) -> Autoencoder:
    training = quick(**changes)
    directions = initial_directions(samples.atoms(), DIM, training)
    return Autoencoder(directions, torch.tensor(samples.CENTRE, dtype=torch.float32), 0.5, training)


def test_start_is_the_transposed_decoder_scaled_to_explain_most():
    sae = autoencoder()
    x = sae.inputs(torch.tensor(samples.rows(400)))
    assert (sae.encoder == sae.decoder).all()

    @torch.no_grad()
    def error() -> float:
        return float((x - sae.decoder_bias - sae.decode(sae.codes(x))).square().sum())

    before = error()
    factor = sae.fit_encoder_scale(x)
    best = error()
    assert best < before and torch.allclose(sae.encoder, sae.decoder * factor)
    with torch.no_grad():
        for nearby in (0.98, 1.02):
            sae.encoder *= nearby
            assert error() >= best
            sae.encoder /= nearby


def test_topk_keeps_k_and_l1_all_positive_codes():
    x = torch.tensor(samples.rows(50))
    topk, l1 = autoencoder(k=2), autoencoder(sparsity="l1")
    assert int((topk.codes(x) > 0).sum(dim=1).max()) == 2
    before = l1.preactivations(x)
    assert torch.equal(l1.codes(x), torch.relu(before))
    assert float(l1.losses(x, torch.zeros(ATOMS, dtype=torch.bool)).sparsity) > 0


def test_projected_gradient_leaves_the_length_alone():
    sae = autoencoder()
    x = sae.inputs(torch.tensor(samples.rows(64)))
    sae.losses(x, torch.zeros(ATOMS, dtype=torch.bool)).total.backward()
    along = (sae.decoder.grad * sae.decoder).sum(dim=1).abs().max()
    sae.project_gradient()
    assert (sae.decoder.grad * sae.decoder).sum(dim=1).abs().max() < 1e-6 < along


def test_auxiliary_loss_moves_only_dead_latents():
    sae = autoencoder(k=1)
    x = sae.inputs(torch.tensor(samples.rows(64)))
    dead = torch.zeros(ATOMS, dtype=torch.bool)
    dead[:5] = True
    sae.losses(x, dead)
    before = sae.preactivations(x)
    left = (x - sae.decoder_bias - sae.decode(sae.select(before))).detach()
    sae._auxiliary(before, left, dead, 5).backward()
    assert sae.decoder.grad[:5].abs().sum() > 0 and sae.decoder.grad[5:].abs().sum() == 0


def test_auxiliary_loss_turns_dead_latents_and_does_not_shrink_them():
    many = [samples.atoms(seed=8 + i) for i in range(8)]
    directions = np.concatenate([samples.atoms()[:12], *many])
    training = quick(k=2, aux_k=len(directions))
    centre = torch.tensor(samples.CENTRE, dtype=torch.float32)
    sae = Autoencoder(initial_directions(directions, DIM, training), centre, 0.5, training)
    x = sae.inputs(torch.tensor(samples.rows(512)))
    dead = torch.arange(len(directions)) >= 12
    optimiser = torch.optim.Adam(sae.parameters(), lr=5e-3)
    values, sizes = [], []
    for _ in range(150):
        before = sae.preactivations(x)
        left = (x - sae.decoder_bias - sae.decode(sae.select(before.masked_fill(dead, -1)))).detach()
        value = sae._auxiliary(before, left, dead, int(dead.sum()))
        values.append(float(value.detach()))
        sizes.append(float(before.detach()[:, dead].amax(dim=0).mean()))
        optimiser.zero_grad()
        value.backward()
        sae.project_gradient()
        optimiser.step()
        sae.normalise()
    assert values[-1] < 0.75 * values[0]
    assert sizes[-1] > 0.8 * sizes[0]


def test_learning_rate_rises_holds_and_falls():
    training = SaeTraining(steps=100, lr=1.0, warmup=0.1, decay=0.2)
    rates = [training.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:81] == pytest.approx([1.0] * 72)
    assert rates[99] == pytest.approx(0.05) and rates == sorted(rates[:50]) + sorted(rates[50:], reverse=True)


# ---- a kill changes nothing


def child(world: Path, output: Path, fatal: int, name: str) -> None:
    """Train, and die like a power cut before or after the n-th flush or rename."""
    torch.set_num_threads(1)
    count = 0

    def wrap(function: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == fatal and name == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **options)
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    os.fsync, os.replace = wrap(os.fsync), wrap(os.replace)
    train(world, output, resume=True)


def run_child(*arguments: Any) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["daco_rt.sae.train", "test_sae_train"])
    process = context.Process(target=child, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture(scope="module")
def undisturbed(world: Path) -> Path:
    assert run_child(world, world / "whole", 0, "none") == 0
    return world / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["before", "after"])
def test_kills_at_writes_give_the_same_bits(world: Path, undisturbed: Path, tmp_path: Path, name: str):
    output = tmp_path / "sae"
    fatal, kills, finished = 1, 0, False
    while not finished:
        # A later write is fatal each time; what came before it is on disk.
        code = run_child(world, output, fatal, name)
        finished = code == 0
        kills += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL)
        fatal += 9 if fatal > 3 else 1
    assert kills >= 5
    assert (output / "sae_weights.safetensors").read_bytes() == (
        undisturbed / "sae_weights.safetensors"
    ).read_bytes()
    assert recipe(output) == recipe(undisturbed)
    assert (tmp_path / "sae.run" / "metrics.jsonl").read_bytes() == (
        world / "whole.run" / "metrics.jsonl"
    ).read_bytes()
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted(
        [
            "annotation.jsonl",
            "cfg.json",
            "manifest.json",
            "metrics.jsonl",
            "sae_weights.safetensors",
            "settings.json",
        ]
    )
    assert load_sae(output).encoder.shape == (ATOMS, DIM)


def test_a_finished_training_is_returned(world: Path, undisturbed: Path):
    stamp = (undisturbed / "manifest.json").stat().st_mtime_ns
    train(world, undisturbed, resume=True)
    assert (undisturbed / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(ArtifactError, match="already exists"):
        train(world, undisturbed)


def interrupted(world: Path, output: Path, monkeypatch: Any) -> None:
    advance = {"left": 30}
    draw = ShuffledRows.draw

    def dying(self: Any) -> Any:
        advance["left"] -= 1
        if advance["left"] == 0:
            raise KeyboardInterrupt
        return draw(self)

    monkeypatch.setattr("daco_rt.sae.feed.ShuffledRows.draw", dying)
    with pytest.raises(KeyboardInterrupt):
        train(world, output)
    monkeypatch.undo()


def test_an_unfinished_run_is_neither_mixed_nor_lost(world: Path, tmp_path: Path, monkeypatch: Any):
    interrupted(world, tmp_path / "sae", monkeypatch)
    with pytest.raises(ArtifactError, match="--resume, or discard it with --force"):
        train(world, tmp_path / "sae")
    with pytest.raises(ArtifactError, match="begun with training"):
        train(world, tmp_path / "sae", resume=True, lr=1e-4)
    train(world, tmp_path / "sae", overwrite=True)
    assert not (tmp_path / "sae.run" / "checkpoint.safetensors").exists()


def test_a_damaged_checkpoint_is_refused(world: Path, tmp_path: Path, monkeypatch: Any):
    interrupted(world, tmp_path / "sae", monkeypatch)
    file = tmp_path / "sae.run" / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match=r"checkpoint\.safetensors"):
        train(world, tmp_path / "sae", resume=True)


def test_tensorboard_gets_the_metrics(world: Path, tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(world, tmp_path / "sae", tensorboard=True)
    events = EventAccumulator(str(tmp_path / "sae.run" / "tensorboard"))
    events.Reload()
    rows = read_metrics(tmp_path / "sae.run")
    scalars = events.Scalars("explained_variance")
    assert [event.step for event in scalars] == [row["step"] for row in rows]
    assert scalars[-1].value == pytest.approx(rows[-1]["explained_variance"], rel=1e-5)


# ---- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": "gated"}, "sparsity must be one of topk, l1"),
        ({"k": 0}, "k must be an integer of at least 1"),
        ({"k": 2.5}, "k must be an integer"),
        ({"lr": float("nan")}, "lr must be a number"),
        ({"warmup": 0.6, "decay": 0.5}, "overlap"),
        ({"beta2": 1.0}, "beta2 must be from 0 to below 1"),
        ({"hold": True, "init": "random"}, "needs init 'dictionary'"),
    ],
)
def test_settings_out_of_range(change: dict[str, Any], message: str):
    with pytest.raises(DacoError, match=message):
        SaeTraining(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": ATOMS + 1}, "larger than the 24 latents"),
        ({"latents": ATOMS - 1}, "more than the 23 latents"),
        ({"init": "random"}, "give latents"),
        ({"lr": 1e30, "clip": 0.0}, "lower the learning rate"),
    ],
)
def test_trainings_that_cannot_be(world: Path, tmp_path: Path, change: dict[str, Any], message: str):
    with pytest.raises(DacoError, match=message):
        train(world, tmp_path / "sae", **change)
    assert not (tmp_path / "sae").exists()


def test_a_dictionary_of_another_model_is_refused(world: Path, tmp_path: Path):
    import dataclasses

    with pytest.raises(ArtifactError, match="does not fit the activations"):
        train(world, tmp_path / "sae", model=dataclasses.replace(MODEL, samples=(0.9, 0.9)))
