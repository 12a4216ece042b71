"""Steering a Hugging Face model: which tokens are edited, by how much, and that nothing is left behind."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
import transformers

from daco_rt.artifacts import Concept, load_sae, save_dictionary, save_sae
from daco_rt.errors import PolicyError, UnsupportedError
from daco_rt.models import families, model_identity, resolve_checkpoint
from daco_rt.ops import reference
from daco_rt.steering import PolicySpec, compile_actadd_pack, compile_pursuit_pack, compile_sae_pack, steer
from daco_rt.steering.host import identity_of

BLOCK = 1
IMAGE, VOCAB, WIDTH = 7, 160, 64
PROMPT = [3, IMAGE, IMAGE, IMAGE, IMAGE, 20, 21, 22]
RULES = ("all", "generated", "prompt", "image", "text")


@pytest.fixture(scope="module")
def model():
    kind = transformers.InternVLForConditionalGeneration
    torch.manual_seed(0)
    config = kind.config_class(**families()["internvl"].tiny_configs()["qwen2"])
    made = kind._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    made.generation_config.pad_token_id = 0
    made.generation_config.eos_token_id = None
    return made


@pytest.fixture(scope="module")
def dictionary(model, tmp_path_factory):
    rng = np.random.default_rng(0)
    n = 40
    labels = ["undesirable", "desirable", "neutral", "undesirable"]
    return save_dictionary(
        tmp_path_factory.mktemp("dictionary") / "d",
        model=identity_of(model),
        atoms={block: rng.normal(size=(n, WIDTH)).astype(np.float16) for block in (0, BLOCK)},
        means={block: rng.normal(size=WIDTH).astype(np.float32) * 0.01 for block in (0, BLOCK)},
        median_norm={0: 4.0, BLOCK: 5.0},
        concepts=[Concept(i, f"concept{i}", labels[i % 4], "odd" if i % 2 else "even") for i in range(n)],
    )


@pytest.fixture(scope="module")
def pack(dictionary, tmp_path_factory):
    """One policy a rule, all strong: no deadband, and a shift so that every covered row must move."""
    return compile_pursuit_pack(
        dictionary,
        tmp_path_factory.mktemp("pack") / "p",
        policies=[PolicySpec(rule, positions=rule, gamma=0.2) for rule in RULES],
        blocks=[BLOCK],
        k=6,
        deadband=0.0,
        dtype="fp32",
        k_out=4,
    )


@contextlib.contextmanager
def watched(model, block=BLOCK):
    """Collect what the block gave and what the next one got; enter before ``steer``."""
    layers = model.model.language_model.layers
    given, taken = [], []
    handles = [
        layers[block].register_forward_hook(lambda *a: given.append(a[2].detach().clone())),
        layers[block + 1].register_forward_pre_hook(lambda _, a: taken.append(a[0].detach().clone())),
    ]
    try:
        yield given, taken
    finally:
        for handle in handles:
            handle.remove()


def moved(given, taken):
    """Which rows steering changed, for each pass."""
    return [
        (a.view(torch.int32) != b.view(torch.int32)).any(-1).numpy()
        for a, b in zip(given, taken, strict=True)
    ]


def batch(*rows, side="right"):
    width = max(map(len, rows))
    ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, where], mask[i, where] = row, 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def pixels(inputs, model):
    tiles = int((inputs["input_ids"] == IMAGE).sum()) // model.config.image_seq_length
    generator = torch.Generator().manual_seed(1)
    return {**inputs, "pixel_values": torch.randn(tiles, 3, 32, 32, generator=generator)}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", RULES)
def test_exactly_the_policys_tokens_are_edited(model, pack, rule, side):
    inputs = pixels(batch(PROMPT, PROMPT[:6], side=side), model)
    ids, real = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy().astype(bool)
    rank = real.cumsum(1) - 1
    image = ids == IMAGE
    covered = {
        "all": real,
        "prompt": real,
        "image": image,
        "text": real & ~image,
        "generated": real & (rank == real.sum(1, keepdims=True) - 1),
    }[rule]
    with watched(model) as seen, steer(model, pack, rule) as steering:
        model(**inputs)
    expected = covered & real & (rank > 0)
    np.testing.assert_array_equal(moved(*seen)[0], expected)
    assert steering.fired == {BLOCK: int(expected.sum())}


@pytest.mark.parametrize("name", ["off", "observe"])
def test_off_and_observe_change_no_bit(model, pack, name):
    inputs = pixels(batch(PROMPT, PROMPT[:6]), model)
    plain = model(**inputs).logits
    with steer(model, pack, name, telemetry=True) as steering:
        same = model(**inputs).logits
    assert torch.equal(plain.view(torch.int32), same.view(torch.int32))
    doses = steering.records[BLOCK][0].doses
    assert (doses[..., 1] == 0).all()
    assert (doses[..., 0] > 0).any() == (name == "observe")


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_edit_is_the_references(model, pack, backend):
    inputs = batch(PROMPT[5:] * 3)
    with (
        watched(model) as (given, taken),
        steer(model, pack, "all", backend=backend, telemetry=True) as steering,
    ):
        model(**inputs)
    z = given[0].numpy()
    slots = np.full(z.shape[:2], pack.policy("all").slot, np.int32)
    slots[:, 0] = 0
    o = pack.operands(BLOCK)
    want = reference.steer_pursuit(
        z, slots, o["analysis"], o["bias"], o["atoms"], coder="omp", k=pack.k, k_out=pack.k_out,
        **{name: o[name] for name in ("gain", "undesirable", "shift", "limits")},
    )  # fmt: skip
    scale = np.linalg.norm(z, axis=-1).max()
    assert np.abs(taken[0].numpy() - want.z).max() <= 1e-5 * scale
    record = steering.records[BLOCK][0]
    np.testing.assert_allclose(record.doses.numpy(), want.doses, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(record.support_index.numpy(), want.support_index)


def test_generate_steers_the_last_prompt_token_and_every_decoded_one(model, pack):
    rows, new = [[5, 30, 31, 32, 33], [5, 40]], 6
    inputs = batch(*rows, side="left")
    with watched(model) as seen, steer(model, pack, "generated") as steering:
        together = model.generate(**inputs, max_new_tokens=new, do_sample=False)
    passes = moved(*seen)
    assert [p.shape[1] for p in passes] == [5] + [1] * (new - 1)
    np.testing.assert_array_equal(passes[0], [[False] * 4 + [True]] * 2)
    assert all(p.all() for p in passes[1:])
    assert steering.fired[BLOCK] == 2 * new
    for row, text in zip(rows, together.tolist(), strict=True):
        with steer(model, pack, "generated"):
            alone = model.generate(**batch(row), max_new_tokens=new, do_sample=False)
        assert alone[0, len(row) :].tolist() == text[5:]


def test_generate_without_a_cache_steers_the_same_tokens(model, pack):
    inputs = batch([5, 30, 31, 32, 33])
    with steer(model, pack, "generated"):
        cached = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with watched(model) as seen, steer(model, pack, "generated"):
        fresh = model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)
    assert cached.tolist() == fresh.tolist()
    for i, rows in enumerate(moved(*seen)):
        np.testing.assert_array_equal(rows, [[False] * 4 + [True] * (i + 1)])


def test_a_second_prompt_starts_anew(model, pack):
    with watched(model) as seen, steer(model, pack, "generated"):
        model(**batch([5, 30, 31]))
        model(**batch([5, 30, 31, 32, 33], [6, 7]))
    np.testing.assert_array_equal(moved(*seen)[1], [[0, 0, 0, 0, 1], [0, 1, 0, 0, 0]])


def test_each_row_has_its_own_policy(model, pack):
    inputs = pixels(batch(PROMPT, PROMPT, PROMPT), model)
    with watched(model) as seen, steer(model, pack, ["off", "image", "generated"]) as steering:
        model(**inputs)
    image = np.asarray(PROMPT) == IMAGE
    last = np.arange(len(PROMPT)) == len(PROMPT) - 1
    np.testing.assert_array_equal(moved(*seen)[0], [image & False, image, last])
    assert steering.policies == ("off", "image", "generated")


def test_set_slots_overrides_positions(model, pack):
    slots = torch.zeros(1, 5, dtype=torch.int64)
    slots[0, 2] = pack.policy("image").slot
    with watched(model) as seen, steer(model, pack) as steering:
        steering.set_slots(slots)
        model(**batch([5, 30, 31, 32, 33]))
        with pytest.raises(PolicyError, match=r"\[1, 5\].*\[1, 3\]"):
            model(**batch([5, 30, 31]))
        steering.set_slots(None)
        model(**batch([5, 30, 31]))
        with pytest.raises(PolicyError, match="from 0 to 6"):
            steering.set_slots(slots + 9)
        with pytest.raises(PolicyError, match="integers"):
            steering.set_slots(slots.float())
    first, second = moved(*seen)
    np.testing.assert_array_equal(first, [[0, 0, 1, 0, 0]])
    np.testing.assert_array_equal(second, [[0, 1, 1]])


def test_hooks_are_gone_after_an_error(model, pack):
    layers = model.model.language_model.layers
    plain = model(**batch([5, 30, 31])).logits

    def hooks():
        parts = [model, *layers]
        return [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in parts]

    before = hooks()
    with pytest.raises(RuntimeError, match="stop"), steer(model, pack):
        assert hooks() != before
        raise RuntimeError("stop")
    assert hooks() == before
    with pytest.raises(PolicyError, match=r"2 policies.*1 rows"), steer(model, pack, ["all", "off"]):
        model(**batch([5, 30, 31]))
    assert hooks() == before
    assert torch.equal(plain, model(**batch([5, 30, 31])).logits)


def test_an_error_inside_the_model_leaves_steering_usable(model, pack):
    with steer(model, pack, "all") as steering:
        with pytest.raises(IndexError):
            model(**batch([5, VOCAB + 50]))
        model(**batch([5, 30, 31]))
    assert steering.fired[BLOCK] == 2


def test_refusals(model, pack, dictionary, tmp_path):
    def enter(*args, **kwargs):
        with steer(*args, **kwargs):
            pass

    with pytest.raises(PolicyError, match="did you mean 'generated'"):
        enter(model, pack, "generatd")
    with pytest.raises(PolicyError, match="no block 0"):
        enter(model, pack, blocks=[0])
    with steer(model, pack), pytest.raises(PolicyError, match="steered already"):
        enter(model, pack, "off")
    with pytest.raises(ValueError, match="backend"):
        enter(model, pack, backend="fast")
    with pytest.raises(PolicyError, match="empty"):
        enter(model, pack, [])
    with pytest.raises(UnsupportedError, match="no decoder blocks"):
        enter(torch.nn.Linear(2, 2), pack)

    text = model.config.text_config
    other = transformers.Qwen2ForCausalLM(text)
    with pytest.raises(PolicyError, match="other weights"):
        enter(other, pack)
    other.model.load_state_dict(model.model.language_model.state_dict())
    with pytest.raises(PolicyError, match="image tokens, this model has none"):
        enter(other, pack, "image")
    with steer(other.eval(), pack, "all") as steering:  # the same text weights in another class
        other(**batch([5, 30, 31]))
    assert steering.fired[BLOCK] == 2
    narrow = transformers.Qwen2Config(**{**text.to_dict(), "hidden_size": 32})
    small = transformers.Qwen2ForCausalLM(narrow)
    with pytest.raises(PolicyError, match=r"hidden size 64.*has 32"):
        enter(small, pack)


def test_identity_is_that_of_the_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    assert identity_of(model) == model_identity(resolve_checkpoint("internvl", tmp_path / "m"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    unknown = transformers.StableLmConfig(vocab_size=20, num_key_value_heads=2, **sizes)
    assert identity_of(transformers.StableLmForCausalLM(unknown)) is None


def test_calls_that_would_go_unsteered_are_refused(model, pack):
    inputs = batch([5, 30, 31])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with steer(model, pack, "image"), pytest.raises(PolicyError, match="need input_ids"):
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    with steer(model, pack, "all"):
        with pytest.raises(PolicyError, match="outside a forward pass"):
            model.model(**inputs)
        with pytest.raises(UnsupportedError, match="attention_mask"):
            model(input_ids=inputs["input_ids"], attention_mask=torch.ones(1, 1, 3, 3))
    with torch.enable_grad(), steer(model, pack, "all"), pytest.raises(NotImplementedError, match="grad"):
        model(**inputs)


def test_inputs_embeds_alone_are_steered(model, pack):
    inputs = batch([5, 30, 31])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with steer(model, pack, "all"):
        a = model(**inputs).logits
        b = model(inputs_embeds=embeds).logits
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(model, dictionary, tmp_path, dtype):
    pack = compile_pursuit_pack(
        dictionary, tmp_path / "p", policies=[PolicySpec("default", gamma=0.2)], blocks=[BLOCK], k=6,
        dtype="bf16", deadband=0.0,
    )  # fmt: skip
    half = type(model)(model.config).to(dtype).eval()
    half.load_state_dict(model.state_dict())
    inputs = batch([5, 30, 31, 32])
    outputs = []
    for backend in ("native", "reference"):
        with watched(half) as (_, taken), steer(half, pack, backend=backend):
            half(**inputs)
        assert taken[0].dtype == dtype
        outputs.append(taken[0].float())
    torch.testing.assert_close(*outputs, rtol=2e-2, atol=2e-2)


def test_sae_and_vector_packs(model, dictionary, tmp_path):
    rng = np.random.default_rng(4)
    m = 48
    save_sae(
        tmp_path / "sae",
        model=identity_of(model),
        block=BLOCK,
        coder="topk",
        k=5,
        weights={
            "W_enc": rng.normal(size=(WIDTH, m)).astype(np.float32),
            "W_dec": rng.normal(size=(m, WIDTH)).astype(np.float32),
            "b_enc": np.zeros(m, np.float32),
            "b_dec": np.zeros(WIDTH, np.float32),
        },
        annotation=[Concept(i, f"latent{i}", "undesirable") for i in range(m)],
    )
    norms = {BLOCK: 5.0}
    packs = [
        compile_sae_pack(
            {BLOCK: load_sae(tmp_path / "sae")}, tmp_path / "s", median_norm=norms, dtype="fp32"
        ),
        compile_actadd_pack(
            {BLOCK: rng.normal(size=WIDTH)}, tmp_path / "a", model=identity_of(model), median_norm=norms
        ),
    ]
    for pack in packs:
        outputs = []
        for backend in ("native", "reference"):
            with watched(model) as seen, steer(model, pack.path, backend=backend, telemetry=True) as steering:
                model(**batch([5, 30, 31]))
            np.testing.assert_array_equal(moved(*seen)[0], [[0, 1, 1]])
            outputs.append(seen[1][0])
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
        assert len(steering.records[BLOCK]) == 1
    shift = (seen[1][0] - seen[0][0])[0, 1].norm()
    assert shift == pytest.approx(0.1 * 5.0, rel=1e-4)
