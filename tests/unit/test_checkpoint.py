"""Finding and checking checkpoints: folders, shards, hub ids, built-in names, and what can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from daco_rt.artifacts.tensors import DTYPES, TensorRef, from_array, read_header, write_safetensors
from daco_rt.errors import CheckpointError, DacoError, UnsupportedError
from daco_rt.models import (
    TokenEmbedding,
    check_finite,
    families,
    family_of,
    model_identity,
    resolve_checkpoint,
)
from daco_rt.models.checkpoint import _places
from daco_rt.models.registry import Registry

SPEC = families()["internvl"]
CASE = SPEC.tiny_configs()["qwen2"]
CONFIG = {"architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl", **CASE}
OLD = ("language_model.model.", "language_model.lm_head.weight", "")
NEW = ("model.language_model.", "lm_head.weight", "model.")
NORM = "language_model.model.norm.weight"
DOWN = "language_model.model.layers.1.mlp.down_proj.weight"


def arrays(config=CONFIG, names=OLD, *, head=False, dtype=np.float32, seed=0) -> dict[str, np.ndarray]:
    """Random tensors under stored names."""
    text, lm_head, vision = names
    rng = np.random.default_rng(seed)
    shapes = {}
    for name, shape in SPEC.decoder_config(config, head).tensor_shapes().items():
        shapes[lm_head if name == "lm_head.weight" else text + name] = shape
    shapes.update({vision + name: shape for name, shape in SPEC.vision_shapes(config).items()})
    return {name: (0.1 * rng.normal(size=shape)).astype(dtype) for name, shape in shapes.items()}


def save(folder: Path, tensors: dict[str, np.ndarray], config=CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    sources = {name: from_array(value) for name, value in tensors.items()}
    write_safetensors(folder / "model.safetensors", sources)
    return folder


def save_shards(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    save(folder, tensors)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    table = {}
    for part, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{part:05}-of-00002.safetensors"
        write_safetensors(folder / file, {name: from_array(tensors[name]) for name in chosen})
        table |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


def refused(path, sentence: str, family="internvl", error=CheckpointError, **options) -> None:
    with pytest.raises(error, match=sentence) as caught:
        resolve_checkpoint(family, path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [OLD, NEW], ids=["saved", "module"])
@pytest.mark.parametrize("writer", [save, save_shards])
def test_opens_both_namings_and_layouts(names, writer, tmp_path):
    tensors = arrays(names=names)
    ckpt = resolve_checkpoint("internvl", writer(tmp_path / "model", tensors))
    assert family_of(ckpt) is SPEC
    assert ckpt.label == str(tmp_path / "model")
    assert set(ckpt.canonical) == set(ckpt.decoder.tensor_shapes())
    name = "layers.2.self_attn.k_proj.bias"
    assert np.array_equal(ckpt.read(name), tensors[names[0] + name])
    assert np.array_equal(ckpt.read(names[0] + name), tensors[names[0] + name])
    assert ckpt.text_weights()[name].name == names[0] + name
    tower = "vision_tower.encoder.layer.1.lambda_2"
    assert np.array_equal(ckpt.vision_weights()[tower].read(), tensors[names[2] + tower])
    with pytest.raises(CheckpointError, match=r"no tensor 'layers\.9\.x'"):
        ckpt.read("layers.9.x")


def test_family_from_the_configuration(tmp_path):
    assert resolve_checkpoint(None, save(tmp_path / "m", arrays())).family == "internvl"


@pytest.mark.parametrize("names", [OLD, NEW], ids=["saved", "module"])
def test_head(names, tmp_path):
    tied = resolve_checkpoint("internvl", save(tmp_path / "tied", arrays(names=names)))
    assert tied.decoder.tie_word_embeddings
    assert "lm_head.weight" not in tied.canonical
    config = {**CONFIG, "tie_word_embeddings": False}
    stored = resolve_checkpoint("internvl", save(tmp_path / "own", arrays(names=names, head=True), config))
    assert not stored.decoder.tie_word_embeddings
    assert stored.canonical["lm_head.weight"] == names[1]
    refused(save(tmp_path / "lost", arrays(names=names), config), "no lm_head.weight although")


def test_light_import(tmp_path):
    """Opening a checkpoint loads no framework."""
    path = save(tmp_path / "m", arrays())
    code = (
        "import sys; from daco_rt.models import resolve_checkpoint, model_identity;"
        f"model_identity(resolve_checkpoint('internvl', {str(path)!r}));"
        "heavy = ('torch', 'onnx', 'onnxscript', 'transformers', 'onnxruntime');"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_missing_and_damaged_shards(tmp_path):
    shard = "model-00002-of-00002.safetensors"
    cut = save_shards(tmp_path / "cut", arrays())
    with open(cut / shard, "r+b") as file:
        file.truncate((cut / shard).stat().st_size - 8)
    refused(cut, f"{shard}.*cut short")
    gone = save_shards(tmp_path / "gone", arrays())
    (gone / shard).unlink()
    refused(gone, f"{shard} is missing; model.safetensors.index.json names it")
    header = save_shards(tmp_path / "header", arrays())
    (header / shard).write_bytes(b"\xff" * 64)
    refused(header, shard)


def test_index_that_does_not_fit(tmp_path):
    folder = save_shards(tmp_path / "m", arrays())
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())["weight_map"]
    other = next(file for file in set(table.values()) if file != table[NORM])
    index.write_text(json.dumps({"weight_map": {**table, NORM: other}}))
    refused(folder, f"does not hold the tensor '{NORM}' that .* places there")
    index.write_text(json.dumps({"weight_map": {**table, NORM: "../" + other}}))
    refused(folder, "lies outside the folder")
    index.write_text(json.dumps({"weights": {}}))
    refused(folder, "has no weight_map")
    index.write_text("{")
    refused(folder, "index.json cannot be read")


def test_tensors_that_do_not_fit(tmp_path):
    tensors = arrays()
    refused(
        save(tmp_path / "shape", {**tensors, DOWN: np.zeros((64, 95), np.float32)}),
        rf"'{DOWN}' has shape \[64, 95\], config.json asks for \[64, 96\]",
    )
    refused(save(tmp_path / "int8", {**tensors, DOWN: np.zeros((64, 96), np.int8)}), "stored as I8; expected")
    short = {name: value for name, value in tensors.items() if ".layers.2." not in name}
    refused(save(tmp_path / "short", short), "lack 'layers.2.input_layernorm.weight' and 11 more")
    blind = {name: value for name, value in tensors.items() if "linear_2" not in name}
    refused(save(tmp_path / "blind", blind), "lack 'multi_modal_projector.linear_2.weight' and 1 more")


def test_no_safetensors(tmp_path):
    folder = save(tmp_path / "m", arrays())
    (folder / "model.safetensors").unlink()
    refused(folder, "has neither model.safetensors nor")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(folder, r"only pickled weights \(pytorch_model.bin\).*never loaded")


def test_configuration_files(tmp_path):
    folder = save(tmp_path / "m", arrays())
    config = folder / "config.json"
    config.write_text("[]")
    refused(folder, "must hold a JSON object, got a list")
    config.write_text("{nonsense")
    refused(folder, "config.json cannot be read")
    config.write_text("{}")
    refused(folder, "no 'architectures'")
    config.write_text(json.dumps({**CONFIG, "architectures": ["InternVLForConditionalGenerations"]}))
    refused(folder, "did you mean 'InternVLForConditionalGeneration'")
    config.write_text(json.dumps({**CONFIG, "quantization_config": {"quant_method": "awq"}}))
    refused(folder, r"quantised weights \(awq\)")
    yarn = {**CONFIG["text_config"], "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}
    config.write_text(json.dumps({**CONFIG, "text_config": yarn}))
    refused(folder, "rope_type 'yarn'", error=UnsupportedError)
    config.unlink()
    refused(folder, "config.json does not exist")


@pytest.mark.parametrize("mark", [{"model_type": "internvl_chat"}, {"architectures": ["InternVLChatModel"]}])
def test_original_layout_names_its_twin(mark, tmp_path):
    folder = tmp_path / "InternVL3-1B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(mark))
    refused(folder, "twin OpenGVLab/InternVL3-1B-hf instead")
    (folder / "config.json").write_text(json.dumps({**mark, "_name_or_path": "Lab/Mine"}))
    refused(folder, "twin Lab/Mine-hf instead")
    assert "twin Lab/Mine-hf" in SPEC.redirect(mark, "Lab/Mine")


def test_places_that_are_no_checkpoint(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    refused(file, "is a file; pass the folder")
    refused(str(tmp_path / "nowhere"), "neither a folder, a hub id nor a built-in model")
    refused("smol-internvk", "did you mean 'smol-internvl'")
    refused(None, "unknown model 'internvk'; did you mean 'internvl'", family="internvk")
    refused("smol", "write 'smol-internvl'", family=None)


def test_hub_out_of_reach():
    refused("someone/InternVL-unknown-hf", "pass the folder with --checkpoint")


def test_hub_from_its_cache(tmp_path, monkeypatch):
    """What was downloaded before is found offline; a model that is not supported is refused at its config."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name, config in (("good", CONFIG), ("chat", {"model_type": "internvl_chat"})):
        repository = tmp_path / f"models--lab--{name}"
        snapshot = repository / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        save(snapshot, arrays(), config)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("a" * 40)
    ckpt = resolve_checkpoint("internvl", "lab/good", fetch=False)
    assert (ckpt.label, ckpt.path) == ("lab/good", tmp_path / "models--lab--good" / "snapshots" / ("a" * 40))
    refused("lab/chat", "twin lab/chat-hf", fetch=False)


def test_built_in_names(tmp_path, monkeypatch):
    monkeypatch.setenv("DACO_RT_CACHE", str(tmp_path))
    refused(None, "smol-internvl is not on this machine; get it with 'daco-rt models get", fetch=False)
    ckpt = resolve_checkpoint("internvl", "pocket", fetch=False)
    assert ckpt.label == "pocket-internvl"
    assert ckpt.path.is_relative_to(tmp_path)
    assert resolve_checkpoint(None, "pocket-internvl").path == ckpt.path
    assert model_identity(ckpt).hidden_size == ckpt.decoder.hidden_size


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_not_finite_is_named(kind, value, tmp_path):
    tensors = arrays(dtype=kind)
    ckpt = resolve_checkpoint("internvl", save(tmp_path / "good", tensors))
    sizes = []
    check_finite(ckpt.tensors.values(), progress=sizes.append)
    assert sum(sizes) == sum(value.nbytes for value in tensors.values())
    tensors[DOWN][-1, -1] = value
    bad = resolve_checkpoint("internvl", save(tmp_path / "bad", tensors))
    with pytest.raises(CheckpointError, match=f"model.safetensors: tensor '{DOWN}' holds NaN or infinity"):
        check_finite(bad.text_weights().values())
    check_finite([bad.ref(NORM), bad.ref("layers.0.mlp.down_proj.weight")])


def test_finite_check_reads_every_piece(tmp_path):
    """Largest finite values pass; the last element of a tensor of several pieces counts."""
    config = {**CONFIG, "text_config": {**CONFIG["text_config"], "vocab_size": 40_000}}
    tensors = arrays(config)
    table = tensors["language_model.model.embed_tokens.weight"]
    table[0, :2] = np.finfo(np.float32).max, np.finfo(np.float32).min
    good = resolve_checkpoint("internvl", save(tmp_path / "good", tensors, config))
    check_finite([good.ref("embed_tokens.weight")])
    table[-1, -1] = np.nan
    bad = resolve_checkpoint("internvl", save(tmp_path / "bad", tensors, config))
    with pytest.raises(CheckpointError, match="embed_tokens"):
        check_finite([bad.ref("embed_tokens.weight")])
    read = []
    check_finite([good.ref("embed_tokens.weight")], at_most=2 << 20, progress=read.append)
    assert 1 << 20 <= sum(read) <= 2 << 20


def test_identity(tmp_path):
    tensors = arrays()
    identity = model_identity(resolve_checkpoint("internvl", save(tmp_path / "a", tensors)))
    assert (identity.hidden_size, identity.num_hidden_layers, identity.vocab_size) == (64, 3, 160)
    assert (identity.num_attention_heads, identity.num_key_value_heads) == (4, 2)
    assert identity.model_type == "internvl"
    assert len(set(identity.samples)) > 60
    for i, kind in enumerate((np.float16, ml_dtypes.bfloat16)):
        narrow = {name: value.astype(kind) for name, value in tensors.items()}
        other = model_identity(resolve_checkpoint("internvl", save_shards(tmp_path / f"n{i}", narrow)))
        assert identity.matches(other)
    other = model_identity(resolve_checkpoint("internvl", save(tmp_path / "b", arrays(seed=1))))
    assert not identity.matches(other)
    tensors[NORM][:] = np.nan
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        model_identity(resolve_checkpoint("internvl", save(tmp_path / "c", tensors)))


def test_sampled_places_never_change():
    """Packs on disk hold samples from these places: splitmix64's published sequence for seed 0."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert _places(0, 4, 1 << 64) == published
    assert _places(1, 2, 1 << 64) == published[2:]
    assert _places(0, 4, 1000) == [value % 1000 for value in published]


def test_registry(tmp_path):
    tools: Registry[type] = Registry("tool")
    tools.register("ordered", "collections:OrderedDict")
    tools.register("ordered", "collections:OrderedDict")
    with pytest.raises(ValueError, match="'ordered' is already registered"):
        tools.register("ordered", "collections:Counter")
    with pytest.raises(ValueError, match="module:attribute"):
        tools.register("other", "collections.Counter")
    with pytest.raises(DacoError, match="unknown tool 'order'; did you mean 'ordered'"):
        tools["order"]
    assert tools["ordered"].__name__ == "OrderedDict"
    assert list(tools) == ["ordered"]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_token_embedding(kind, tmp_path):
    values = np.random.default_rng(0).normal(size=(11, 6)).astype(DTYPES[kind])
    write_safetensors(tmp_path / "t.safetensors", {"a": from_array(values[:3]), "b": from_array(values)})
    ref: TensorRef = read_header(tmp_path / "t.safetensors")["b"]
    table = TokenEmbedding(ref.file, ref.offset, ref.shape, ref.dtype)
    ids = [[10, 0], [3, 3]]
    assert np.array_equal(table.lookup(ids), values[np.array(ids)].astype(np.float32))
    half = table.lookup(np.array(ids, np.int32), dtype="fp16")
    assert half.dtype == np.float16
    assert np.array_equal(half, values[np.array(ids)].astype(np.float16))
    assert table.lookup(np.zeros((2, 0), np.int64)).shape == (2, 0, 6)
    for wrong in ([11], [-1]):
        with pytest.raises(ValueError, match=r"must lie in 0…10"):
            table.lookup(wrong)
    with pytest.raises(TypeError, match="must be integers, got float64"):
        table.lookup([1.0])
    with pytest.raises(DacoError, match="cut short"):
        TokenEmbedding(ref.file, ref.offset, (12, 6), ref.dtype)
    with pytest.raises(CheckpointError, match="matrix of F32, F16 or BF16, got I8"):
        TokenEmbedding(ref.file, ref.offset, ref.shape, "I8")
