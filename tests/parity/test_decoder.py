"""The exported decoder against Hugging Face eager: every family and text model, ragged rows, decoding."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from tiny_models import (
    CASES,
    TOLERANCE,
    Decoder,
    Tiny,
    decode,
    randomise,
    relative_error,
    session,
    stored,
    tiny,
)

from daco_rt.errors import CheckpointError
from daco_rt.models import DecoderConfig, TokenEmbedding
from daco_rt.models.decoder import SteerNode, build_decoder

PROMPTS, STEPS = [9, 1, 5], 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("decoder")


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def small(request, folder) -> Tiny:
    return tiny(*request.param, folder)


@pytest.fixture
def qwen2(folder) -> Tiny:
    return tiny("internvl", "qwen2", folder)


def plain_decoder(small: Tiny, cache: int, batch: int = len(PROMPTS), dtype: str = "fp32") -> Decoder:
    path = small.checkpoint.path / f"decoder-{dtype}.onnx"
    graph = small.spec.build_decoder(small.checkpoint, dtype=dtype)
    return Decoder(session(graph, path), small.checkpoint.decoder, batch, cache, dtype)


def random_ids(small: Tiny, steps: int = STEPS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    top = small.checkpoint.decoder.vocab_size
    image = small.spec.image_token_id(small.checkpoint.config)
    rows = [torch.randint(0, top, (n + steps,), generator=generator) for n in PROMPTS]
    return [torch.where(row == image, (row + 1) % top, row) for row in rows]


def embedding_of(small: Tiny) -> TokenEmbedding:
    ref = small.checkpoint.ref("embed_tokens.weight")
    return TokenEmbedding(ref.file, ref.offset, ref.shape, ref.dtype)


def eager(small: Tiny, ids: torch.Tensor, **inputs) -> np.ndarray:
    with torch.no_grad():
        return small.model(input_ids=ids[None], **inputs).logits[0].numpy()


@pytest.mark.parametrize("spare", [0, 23])
def test_ragged_prefill_and_decode(small, spare):
    ids = random_ids(small)
    table = embedding_of(small)
    decoder = plain_decoder(small, cache=max(PROMPTS) + STEPS + spare)
    found = decode(decoder, [table.lookup(row.numpy()) for row in ids], PROMPTS)
    for row, logits in zip(ids, found, strict=True):
        expected = eager(small, row)
        assert logits.shape == expected.shape
        assert relative_error(logits, expected) <= TOLERANCE


def test_images_between_tokens(small):
    """Token rows with a picture's embeddings in them, from the vision graph, as a host puts them together."""
    config, spec = small.checkpoint.config, small.spec
    tokens, side = spec.tokens_per_tile(config), spec.image_size(config)
    image = spec.image_token_id(config)
    tiles = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(2))
    tower = session(spec.build_vision(small.checkpoint), small.checkpoint.path / "vision.onnx")
    (pictures,) = tower.run(None, {"pixel_values": tiles.numpy()})

    ids = random_ids(small)
    places = {0: (2, 2), 2: (0, 1)}  # row → (where its image tokens begin, tiles)
    begin = 0
    embeds = []
    for b, row in enumerate(ids):
        at, count = places.get(b, (0, 0))
        ids[b] = row = torch.cat([row[:at], torch.full((count * tokens,), image), row[at:]])
        rows = embedding_of(small).lookup(row.numpy())
        chosen = pictures[begin : begin + count].reshape(-1, rows.shape[1])
        rows[row.numpy() == image] = chosen
        embeds.append(rows)
        begin += count
    prompts = [len(row) - STEPS for row in ids]
    found = decode(plain_decoder(small, cache=max(prompts) + STEPS + 3), embeds, prompts)
    begin = 0
    for b, row in enumerate(ids):
        count = places.get(b, (0, 0))[1]
        pixels = {"pixel_values": tiles[begin : begin + count]} if count else {}
        assert relative_error(found[b], eager(small, row, **pixels)) <= TOLERANCE
        begin += count


def test_bound_notices_a_wrong_position(qwen2):
    ids = random_ids(qwen2)[0]
    embeds = embedding_of(qwen2).lookup(ids.numpy())[None]
    at = np.arange(len(ids))
    decoder = plain_decoder(qwen2, cache=len(ids), batch=1)
    swapped = at.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    wrong = decoder.run(embeds, [0], at[None], positions=swapped[None, None])[0]
    assert relative_error(wrong, eager(qwen2, ids)) > 10 * TOLERANCE


def test_logits_at_picks_rows(qwen2):
    ids = random_ids(qwen2)[0]
    embeds = embedding_of(qwen2).lookup(ids.numpy())[None]
    expected = eager(qwen2, ids)
    decoder = plain_decoder(qwen2, cache=64, batch=1)
    picked = decoder.run(embeds, [0], [[4, 0, 4]])[0]
    assert relative_error(picked, expected[[4, 0, 4]]) <= TOLERANCE


def test_chunks_equal_one_prefill(qwen2):
    ids = random_ids(qwen2)[0]
    embeds = embedding_of(qwen2).lookup(ids.numpy())[None]
    decoder = plain_decoder(qwen2, cache=32, batch=1)
    cuts = [(0, 7), (7, 8), (8, 19)]
    parts = [decoder.run(embeds[:, a:b], [a], np.arange(b - a)[None])[0] for a, b in cuts]
    assert relative_error(np.concatenate(parts), eager(qwen2, ids)) <= TOLERANCE


def test_in_place_cache(qwen2):
    """Input and output cache bound to one buffer give the same logits as separate ones."""
    import onnxruntime as ort

    ids = random_ids(qwen2)[0]
    embeds = embedding_of(qwen2).lookup(ids.numpy())[None]
    decoder = plain_decoder(qwen2, cache=24, batch=1)
    separate = [decoder.run(embeds[:, a:b], [a], [[b - a - 1]])[0, 0] for a, b in [(0, 9), (9, 10), (10, 11)]]

    fresh = plain_decoder(qwen2, cache=24, batch=1)
    buffers = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in fresh.past.items()}
    for (a, b), expected in zip([(0, 9), (9, 10), (10, 11)], separate, strict=True):
        binding = fresh.session.io_binding()
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past", "present"), buffer)
        binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(embeds[:, a:b]))
        binding.bind_cpu_input("position_ids", np.arange(a, b)[None, None])
        binding.bind_cpu_input("write_indices", np.array([a]))
        binding.bind_cpu_input("logits_at", np.array([[b - a - 1]]))
        binding.bind_output("logits")
        fresh.session.run_with_iobinding(binding)
        assert np.array_equal(binding.get_outputs()[-1].numpy()[0, 0], expected)


@pytest.mark.parametrize("case", ["qwen2", "qwen3"])
def test_half_precision(case, folder):
    """fp16 loses at most twice what plain torch loses in fp16."""
    full = tiny("internvl", case, folder)
    half_path = folder / f"half-{case}"
    half_model = type(full.model).from_pretrained(full.checkpoint.path, dtype=torch.float16).eval()
    half_model.save_pretrained(half_path)
    from daco_rt.models import resolve_checkpoint

    half = Tiny(full.spec, half_model, resolve_checkpoint("internvl", half_path))
    ids = random_ids(full)
    decoder = plain_decoder(half, cache=32, dtype="fp16")
    table = embedding_of(half)
    found = decode(decoder, [table.lookup(row.numpy(), dtype="fp16") for row in ids], PROMPTS)
    assert decoder.last["logits"].dtype == np.float32
    exact = type(full.model).from_pretrained(half_path, dtype=torch.float32).eval()
    for row, logits in zip(ids, found, strict=True):
        with torch.no_grad():
            expected = exact(input_ids=row[None]).logits[0].numpy()
            plain = half_model(input_ids=row[None]).logits[0].float().numpy()
        assert relative_error(logits, expected) <= 2 * relative_error(plain, expected) + 2e-4


TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 128}  # fmt: skip
BACKBONES = {
    "mistral": ("MistralModel", {"sliding_window": None, "head_dim": 24}),
    "llama-linear": (
        "LlamaModel",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "llama-dynamic": (
        "LlamaModel",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "chunked": (
        "Qwen2_5_VLTextModel",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    ),
    "interleaved": (
        "Qwen3VLTextModel",
        {
            "head_dim": 24,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 3, 5],
                                "mrope_interleaved": True},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BACKBONES)
def test_other_backbones(name, tmp_path):
    """Text models that other families stand on, M-RoPE with three different axes and deepstack included."""
    class_name, extra = BACKBONES[name]
    kind = getattr(transformers, class_name)
    torch.manual_seed(3)
    model = kind._from_config(kind.config_class(**TEXT, **extra), attn_implementation="eager").eval()
    randomise(model)
    head = torch.randn(TEXT["vocab_size"], TEXT["hidden_size"])
    weights = stored({**model.state_dict(), "lm_head.weight": head}, tmp_path / "model.safetensors")
    config = DecoderConfig.from_hf(model.config.to_dict())
    length = 12
    positions = torch.randint(0, 40, (config.position_axes, 1, length)).sort(-1).values
    embeds = torch.randn(1, length, 64)
    deep = 2 if name == "interleaved" else 0
    features = torch.randn(deep, length, 64)
    places = positions if config.position_axes > 1 else positions[0]
    inputs = {"inputs_embeds": embeds, "position_ids": places}
    if deep:
        inputs |= {
            "visual_pos_masks": torch.ones(1, length, dtype=torch.bool),
            "deepstack_visual_embeds": list(features),
        }
    with torch.no_grad():
        expected = (model(**inputs).last_hidden_state @ head.T)[0].numpy()
    graph = build_decoder(config, weights, deepstack=deep)
    decoder = Decoder(session(graph, tmp_path / "decoder.onnx"), config, 1, 16)
    extra_feed = {f"deepstack.{i}": features[i][None].numpy() for i in range(deep)}
    found = decoder.run(embeds, [0], np.arange(length)[None], positions=positions, **extra_feed)[0]
    assert relative_error(found, expected) <= TOLERANCE


def test_graph_contract(small):
    """Names, shapes, dialect; weights referenced and not copied."""
    graph = small.spec.build_decoder(small.checkpoint)
    path = small.checkpoint.path / "contract.onnx"
    ir.save(graph, path)
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(str(path), load_external_data=False)
    c = small.checkpoint.decoder
    cache = [f"{z}.{i}" for i in range(c.num_layers) for z in "kv"]
    assert [i.name for i in proto.graph.input] == [
        "inputs_embeds", "position_ids", "write_indices", "logits_at", *(f"past_{n}" for n in cache)
    ]  # fmt: skip
    assert [o.name for o in proto.graph.output] == ["logits", *(f"present_{n}" for n in cache)]
    assert {(o.domain, o.version) for o in proto.opset_import} == {("", 24)}
    assert proto.ir_version == 11
    assert {node.domain for node in proto.graph.node} == {""}
    assert all(len(node.output) == 1 for node in proto.graph.node if node.op_type == "Attention")
    big = [t for t in proto.graph.initializer if np.prod(t.dims) > 1000]
    assert big
    for tensor in big:
        where = {e.key: e.value for e in tensor.external_data}
        assert where["location"] == "model.safetensors"
    names = {t.name for t in proto.graph.initializer}
    assert ("lm_head.weight" in names) is not c.tie_word_embeddings
    assert ("embed_tokens.weight" in names) is c.tie_word_embeddings


def test_locate_moves_the_reference(qwen2):
    place = ("weights/w.st", 64)
    graph = qwen2.spec.build_decoder(qwen2.checkpoint, dtype="fp16", locate=lambda ref: place)
    tensor = graph.graph.initializers["layers.0.mlp.up_proj.weight"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert (str(tensor.location), tensor.offset, tensor.length) == ("weights/w.st", 64, 96 * 64 * 2)


def test_wrong_dtype_is_not_misread(qwen2):
    with pytest.raises(CheckpointError, match=r"stored as F32, a graph in fp16"):
        qwen2.spec.build_decoder(qwen2.checkpoint, dtype="fp16")


def topk_node(d: int, m: int, policies: int, k_out: int, seed: int) -> tuple[SteerNode, dict]:
    rng = np.random.default_rng(seed)
    unit = rng.normal(size=(m, d)).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    values = {
        "enc": unit,
        "enc_bias": np.zeros(m, np.float32),
        "dec": unit,
        "gain": np.concatenate([np.ones((2, m)), np.zeros((policies - 2, m))]).astype(np.float32),
        "undesirable": np.arange(policies * m).reshape(policies, m) % 2 == 0,
        "shift": np.zeros((policies, d), np.float32),
        "limits": np.zeros((policies, 4), np.float32),
    }
    attributes = {"coder": "topk", "k": 4, "k_out": k_out, "plugin_namespace": "ai.daco"}
    slot_map = ir.tensor(np.array([0, 1, *range(2, policies)], np.int32))
    operands = {name: ir.tensor(value) for name, value in values.items()}
    return SteerNode("SteerSae", {**attributes, "plugin_version": "1"}, operands, slot_map, k_out), values


@pytest.mark.parametrize("k_out", [0, 3])
def test_steered_blocks(qwen2, k_out):
    """Steering edits the chosen blocks' outputs, reports under their names, and slot 0 changes nothing."""
    from daco_rt.ops import reference
    from daco_rt.ops.onnx_functions import steer_function

    d, policies = qwen2.checkpoint.decoder.hidden_size, 3
    nodes = {block: topk_node(d, 24, policies, k_out, seed=block) for block in (0, 2)}
    graph = qwen2.spec.build_decoder(
        qwen2.checkpoint,
        steer={block: node for block, (node, _) in nodes.items()},
        functions=[steer_function("SteerSae", coder="topk", k=4, k_out=k_out)],
    )
    path = qwen2.checkpoint.path / f"steered{k_out}.onnx"
    loaded = session(graph, path)
    onnx.checker.check_model(str(path))
    proto = onnx.load(str(path), load_external_data=False)
    steering = [node for node in proto.graph.node if node.domain == "ai.daco"]
    assert [(n.op_type, len(n.input), len(n.output)) for n in steering] == [("SteerSae", 12, 4)] * 2
    assert list(steering[1].input)[2:] == [
        "steer.2.enc", "steer.2.enc_bias", "steer.2.dec", "", "steer.2.gain", "", "steer.2.undesirable",
        "steer.2.shift", "steer.2.limits", "",
    ]  # fmt: skip
    kinds = ("doses", "support_index", "support_value") if k_out else ("doses",)
    reports = [f"{kind}.{block}" for block in (0, 2) for kind in kinds]
    assert [o.name for o in proto.graph.output][-len(reports) :] == reports
    assert proto.graph.input[4].name == "policy_slots"

    ids = random_ids(qwen2)[0]
    embeds = embedding_of(qwen2).lookup(ids.numpy())[None]
    at = np.arange(len(ids))[None]
    slots = np.zeros((1, len(ids)), np.int32)
    steered = Decoder(loaded, qwen2.checkpoint.decoder, 1, 24)
    plain = plain_decoder(qwen2, cache=24, batch=1).run(embeds, [0], at)
    assert np.array_equal(steered.run(embeds, [0], at, policy_slots=slots), plain)
    assert not steered.last["doses.0"].any()

    slots[0, 4:] = 2
    blocks = qwen2.model.get_submodule(qwen2.spec.blocks_path)
    hooks = []
    for block, (_, values) in nodes.items():

        def edit(module, inputs, output, values=values):
            out = reference.steer_sae(output.numpy(), slots, **values, coder="topk", k=4)
            return torch.from_numpy(out.z.astype(np.float32))

        hooks.append(blocks[block].register_forward_hook(edit))
    try:
        expected = eager(qwen2, ids)
    finally:
        for hook in hooks:
            hook.remove()
    found = steered.run(embeds, [0], at, policy_slots=slots)[0]
    assert steered.last["doses.2"][0, 4:].all() and not steered.last["doses.2"][0, :4].any()
    assert relative_error(found, expected) <= TOLERANCE
    assert relative_error(found, plain[0]) > 1e-3


def test_steering_is_checked(qwen2):
    d = qwen2.checkpoint.decoder.hidden_size
    node, _ = topk_node(d, 8, 3, 0, seed=0)
    with pytest.raises(ValueError, match=r"block 3 is outside the model's 0…2"):
        qwen2.spec.build_decoder(qwen2.checkpoint, steer={3: node})
    unknown = SteerNode("SteerSae", {}, {"gram": node.operands["enc"]}, node.slot_map)
    with pytest.raises(ValueError, match="SteerSae has no operand gram"):
        qwen2.spec.build_decoder(qwen2.checkpoint, steer={0: unknown})
    with pytest.raises(ValueError, match="'Steer' is unknown; known: SteerSae, SteerPursuit"):
        qwen2.spec.build_decoder(qwen2.checkpoint, steer={0: SteerNode("Steer", {}, {}, node.slot_map)})
