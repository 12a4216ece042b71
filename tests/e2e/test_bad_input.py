"""Bad input gets one clear sentence and a non-zero exit; nothing is half-written, nothing is lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from daco_rt.artifacts import load_bundle
from daco_rt.artifacts.tensors import TensorRef, read_header

EXPORT = ("--model", "internvl")


@pytest.fixture
def export(run_cli):
    return lambda *arguments, **options: run_cli(*EXPORT, *arguments, module="daco_rt.export", **options)


@pytest.fixture
def checkpoint_copy(pocket, tmp_path) -> Path:
    return Path(shutil.copytree(pocket.path, tmp_path / "checkpoint"))


def test_unknown_family(run_cli, tmp_path, one_sentence):
    result = run_cli("--model", "intervl", "--output", tmp_path / "b", module="daco_rt.export")
    assert "did you mean 'internvl'" in one_sentence(result)


def test_unknown_checkpoint(export, tmp_path, one_sentence):
    said = one_sentence(export("--checkpoint", tmp_path / "nowhere", "--output", tmp_path / "b"))
    assert "nowhere" in said and not (tmp_path / "b").exists()


def test_original_format_names_its_twin(export, tmp_path, one_sentence):
    (tmp_path / "InternVL3-1B").mkdir()
    config = {"architectures": ["InternVLChatModel"], "model_type": "internvl_chat"}
    (tmp_path / "InternVL3-1B" / "config.json").write_text(json.dumps(config))
    assert "-hf" in one_sentence(
        export("--checkpoint", tmp_path / "InternVL3-1B", "--output", tmp_path / "b")
    )


def test_missing_and_truncated_weights(export, checkpoint_copy, tmp_path, one_sentence):
    weights = checkpoint_copy / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    said = one_sentence(export("--checkpoint", checkpoint_copy, "--output", tmp_path / "b"))
    assert "model.safetensors" in said and "bytes" in said
    weights.unlink()
    said = one_sentence(export("--checkpoint", checkpoint_copy, "--output", tmp_path / "b"))
    assert "model.safetensors" in said
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nan_weights(export, checkpoint_copy, tmp_path, precision, one_sentence):
    weights = checkpoint_copy / "model.safetensors"
    ref = next(
        ref for name, ref in read_header(weights).items() if name.endswith("layers.1.mlp.up_proj.weight")
    )
    with open(weights, "r+b") as file:
        file.seek(ref.offset + 40)
        file.write(np.float32(np.nan).tobytes())
    said = one_sentence(
        export("--checkpoint", checkpoint_copy, "--precision", precision, "--output", tmp_path / "b")
    )
    assert "layers.1.mlp.up_proj.weight" in said and "NaN" in said
    assert not (tmp_path / "b").exists()


def test_weights_too_large_for_fp16(export, checkpoint_copy, tmp_path, one_sentence):
    weights = checkpoint_copy / "model.safetensors"
    ref = next(
        ref for name, ref in read_header(weights).items() if name.endswith("layers.1.mlp.up_proj.weight")
    )
    with open(weights, "r+b") as file:
        file.seek(ref.offset)
        file.write(np.float32(1e6).tobytes())
    said = one_sentence(
        export("--checkpoint", checkpoint_copy, "--precision", "fp16", "--output", tmp_path / "b")
    )
    assert "--precision fp32" in said


def test_pack_for_another_model(export, make_pack, tmp_path, one_sentence):
    pack = make_pack(dim=64)
    said = one_sentence(
        export("--checkpoint", "pocket-internvl", "--pack", pack.path, "--output", tmp_path / "b")
    )
    assert "64" in said or "hidden_size" in said


def test_damaged_pack(export, make_pack, tmp_path, one_sentence):
    pack = make_pack()
    _flip(pack.path / "steering.safetensors", -5)
    said = one_sentence(
        export("--checkpoint", "pocket-internvl", "--pack", pack.path, "--output", tmp_path / "b")
    )
    assert "steering.safetensors" in said


def test_layers_out_of_range(export, tmp_path, one_sentence):
    said = one_sentence(
        export("--checkpoint", "pocket-internvl", "--layers", "90-95", "--output", tmp_path / "b")
    )
    assert "90" in said


def test_existing_output_is_kept(export, pocket_bundle, tmp_path, one_sentence):
    said = one_sentence(export("--checkpoint", "pocket-internvl", "--output", pocket_bundle))
    assert "--force" in said
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("precious")
    one_sentence(export("--checkpoint", "pocket-internvl", "--output", tmp_path / "notes", "--force"))
    assert (tmp_path / "notes" / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("length", ["1", "999999999"])
def test_cache_length(export, tmp_path, length, one_sentence):
    said = one_sentence(
        export("--checkpoint", "pocket-internvl", "--max-length", length, "--output", tmp_path / "b")
    )
    assert "--max-length" in said


def test_disk_full(export, tmp_path, one_sentence):
    """A file-size limit stands in for a full disk: the write itself fails, in the middle."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))

    result = export(
        "--checkpoint",
        "pocket-internvl",
        "--precision",
        "fp16",
        "--output",
        tmp_path / "b",
        preexec_fn=limit,
    )
    one_sentence(result)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("delay", [0.05, 0.2, 0.4, 0.8])
def test_kill_while_exporting(pocket_bundle, bundle_copy, delay):
    """Killed without warning, the export leaves the previous bundle as it was, or the complete new one."""
    process = subprocess.Popen(
        [sys.executable, "-m", "daco_rt.export", *EXPORT, "--checkpoint", "pocket-internvl",
         "--precision", "fp16", "--output", str(bundle_copy), "--force"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:  # "converting weights …": the writing has begun
        if "converting" in line:
            break
    time.sleep(delay / 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert load_bundle(bundle_copy, verify=True, full=True).precision in ("fp32", "fp16")


def test_flipped_byte_in_every_file_of_a_bundle(bundle_copy, run_cli, one_sentence):
    files = [f for f in bundle_copy.rglob("*") if f.is_file() and "weights" not in f.parts]
    assert len(files) >= 8
    for file in files:
        original = file.read_bytes()
        _flip(file, len(original) // 2)
        said = one_sentence(run_cli("verify", bundle_copy, "--no-model", "--tokens", 2))
        assert file.name in said, (file, said)
        file.write_bytes(original)


def test_flipped_byte_in_linked_weights_is_found_by_full(bundle_copy, run_cli, one_sentence):
    shard = bundle_copy / "weights" / "model.safetensors"
    copy = shard.with_suffix(".tmp")
    shutil.copyfile(shard, copy)
    copy.replace(shard)  # break the hard link: the checkpoint itself must stay whole
    _flip(shard, shard.stat().st_size // 2)
    said = one_sentence(run_cli("verify", bundle_copy, "--full", "--no-model", "--tokens", 2))
    assert "model.safetensors" in said


class TestGenerate:
    def test_unknown_policy(self, run_cli, pocket_bundle, one_sentence):
        said = one_sentence(run_cli("generate", pocket_bundle, "--prompt", "hi", "--policy", "defualt"))
        assert "did you mean 'default'" in said

    def test_an_image_that_is_none(self, run_cli, pocket_bundle, tmp_path, one_sentence):
        (tmp_path / "photo.txt").write_text("not a picture")
        said = one_sentence(
            run_cli("generate", pocket_bundle, "--prompt", "hi", "--image", tmp_path / "photo.txt")
        )
        assert "photo.txt" in said
        one_sentence(run_cli("generate", pocket_bundle, "--prompt", "hi", "--image", tmp_path / "absent.png"))

    def test_prompt_longer_than_the_cache(self, run_cli, pocket_bundle, one_sentence):
        said = one_sentence(run_cli("generate", pocket_bundle, "--prompt", "word " * 5000))
        assert "2048" in said

    def test_empty_prompt(self, run_cli, pocket_bundle, one_sentence):
        assert "--prompt" in one_sentence(run_cli("generate", pocket_bundle, "--prompt", " "))

    def test_not_a_bundle(self, run_cli, tmp_path, one_sentence):
        one_sentence(run_cli("generate", tmp_path, "--prompt", "hi"))
        one_sentence(run_cli("verify", tmp_path / "absent"))
        one_sentence(run_cli("inspect", tmp_path))


def _up_projection(weights: Path) -> TensorRef:
    (ref,) = [
        ref for name, ref in read_header(weights).items() if name.endswith("layers.1.mlp.up_proj.weight")
    ]
    return ref


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(bytes(data))
