"""Generation over an exported bundle: parity with Hugging Face, batching, streaming, policies, telemetry."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from daco_rt._native import library_path
from daco_rt.artifacts import Concept, Policy, load_bundle, save_pack
from daco_rt.errors import DacoError, PolicyError
from daco_rt.export import export_model
from daco_rt.models import model_identity, resolve_checkpoint
from daco_rt.runtime.generate import Generator, run_generate
from daco_rt.runtime.onnx_session import OnnxSession
from daco_rt.runtime.positions import right_padded, token_slots
from daco_rt.runtime.request import GenerateRequest
from daco_rt.runtime.sampling import Sampling

MODEL = "pocket-internvl"
ATOMS = 24


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack over random unit directions, steering blocks 0 and 2; the first half is undesirable."""
    checkpoint = resolve_checkpoint("internvl", MODEL)
    rng = np.random.default_rng(0)
    slots, width = 4, checkpoint.decoder.hidden_size
    operands = {}
    for block in (0, 2):
        atoms = rng.normal(size=(ATOMS, width)).astype(np.float32)
        atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
        gain = np.ones((slots, ATOMS), np.float32)
        gain[2, : ATOMS // 2] = 0
        gain[3, ATOMS // 2 :] = 0
        undesirable = np.zeros((slots, ATOMS), bool)
        undesirable[1:, : ATOMS // 2] = True
        operands[block] = {
            "enc": atoms.copy(),
            "enc_bias": np.zeros(ATOMS, np.float32),
            "dec": atoms,
            "gain": gain,
            "undesirable": undesirable,
            "shift": np.zeros((slots, width), np.float32),
            "limits": np.zeros((slots, 4), np.float32),
        }
    path = tmp_path_factory.mktemp("packs") / "random"
    save_pack(
        path,
        model=model_identity(checkpoint),
        op="sae",
        coder="topk",
        k=4,
        k_out=4,
        operands=operands,
        policies=[Policy("default", 2, "generated", (0, 2)), Policy("everywhere", 3, "all", (2,))],
        default_policy="default",
        median_norm={0: 1.0, 2: 1.0},
        concepts=[Concept(i, f"c{i}", "undesirable" if i < ATOMS // 2 else "neutral") for i in range(ATOMS)],
    )
    return path


@pytest.fixture(scope="module")
def bundle(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "fp32"
    export_model("internvl", checkpoint=MODEL, pack=pack, output=path, max_length=512)
    return path


@pytest.fixture(scope="module")
def generator(bundle: Path) -> Generator:
    return Generator(bundle, library="off")


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (80, 160, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def mixed(picture: np.ndarray) -> list[GenerateRequest]:
    """Unequal prompts, lengths and policies, with and without pictures."""
    return [
        GenerateRequest("What is a dagger?", max_new_tokens=16),
        GenerateRequest(
            "And these?", images=[picture, picture[:, :60]], max_new_tokens=9, policy="everywhere"
        ),
        GenerateRequest("hi", max_new_tokens=20, policy="off"),
        GenerateRequest("Tell me more about bread and knives.", max_new_tokens=3, policy="observe"),
    ]


def test_greedy_answers_equal_hugging_face(generator: Generator, picture: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    from transformers import InternVLForConditionalGeneration

    model = InternVLForConditionalGeneration.from_pretrained(
        resolve_checkpoint("internvl", MODEL).path, dtype=torch.float32
    ).eval()
    requests = [
        GenerateRequest("What is a dagger?", policy="off", max_new_tokens=24),
        GenerateRequest("What is this?", images=[picture], policy="off", max_new_tokens=24),
        GenerateRequest("hi", policy="off", max_new_tokens=24),
        GenerateRequest("Compare.", images=[picture[:40], picture], policy="off", max_new_tokens=24),
    ]
    said: set[int] = set()
    for request, answer in zip(requests, generator.generate(requests), strict=True):
        prompt = generator.processor.prepare(request.prompt, request.images)
        pixels = {}
        if prompt.pixel_values is not None:
            pixels["pixel_values"] = torch.from_numpy(prompt.pixel_values)
        ids = torch.from_numpy(prompt.input_ids)[None]
        expected = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, **pixels
        )[0, prompt.length :].tolist()
        assert answer.token_ids == expected
        said |= set(expected)
    assert len(said) > 20  # constant answers would prove little


def test_a_batch_answers_as_each_request_alone(generator: Generator, mixed: list[GenerateRequest]) -> None:
    together = generator.generate(mixed)
    alone = [generator.generate([r])[0] for r in mixed]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert [a.text for a in together] == [a.text for a in alone]
    assert [len(a.token_ids) for a in together] == [16, 9, 20, 3]
    assert together[1].image_tokens == 6 * 16 and together[0].image_tokens == 0


def test_compacting_and_chunked_prompts_change_no_token(
    generator: Generator, mixed: list[GenerateRequest]
) -> None:
    expected = generator.generate(mixed)
    other = Generator(generator.session, compact=True, prefill_chunk=7, batch_size=3)
    for ours, theirs in zip(other.generate(mixed), expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        if theirs.telemetry is None:
            assert ours.telemetry is None
            continue
        assert ours.telemetry is not None
        assert ours.telemetry.positions == theirs.telemetry.positions
        assert ours.telemetry.token_ids == theirs.telemetry.token_ids
        for block in theirs.telemetry.blocks:
            np.testing.assert_allclose(
                ours.telemetry.rows(block).doses, theirs.telemetry.rows(block).doses, atol=1e-4
            )


def test_rows_under_off_do_not_feel_their_neighbours(generator: Generator) -> None:
    session = generator.session
    prompts = ["What is a dagger?", "hi", "Where is the bread?"]
    batch = generator.prepare_batch([GenerateRequest(p, policy="off") for p in prompts])
    policies = {"off": (0, 0, 0), "mixed": (0, 2, 3)}
    logits: dict[str, list[np.ndarray]] = {}
    for name, slots in policies.items():
        cache = session.new_cache(3, 128)
        rules = ["all"] * 3
        attention = right_padded(batch.lengths, batch.embeds.shape[1])
        step = session.prefill(cache, batch.embeds, token_slots(slots, rules, attention), batch.lengths)
        logits[name] = [step.logits.copy()]
        for token in range(100, 106):
            step = session.decode(cache, np.full(3, token), np.array(slots))
            logits[name].append(step.logits.copy())
    for off, mixed in zip(logits["off"], logits["mixed"], strict=True):
        assert np.array_equal(off[0], mixed[0])
        assert not np.array_equal(off[1], mixed[1])
        assert not np.array_equal(off[2], mixed[2])


def test_observing_changes_no_logit_and_reports(generator: Generator) -> None:
    off, seen = generator.generate(
        [GenerateRequest("What is a dagger?", policy=p, max_new_tokens=8) for p in ("off", "observe")]
    )
    assert off.token_ids == seen.token_ids and off.telemetry is None
    assert seen.telemetry is not None
    # Every token but the first of the prompt, and every decoded one that was fed back.
    assert seen.telemetry.positions == list(range(1, seen.prompt_tokens + 7))
    for block in (0, 2):
        doses = seen.telemetry.rows(block).doses
        assert (doses[:, 1] == 0).all() and (doses[:, 0] > 0).any()
        assert not any(c.removed for row in seen.telemetry.active(block) for c in row)
    assert seen.telemetry.sentence().startswith("observed: c")


def test_telemetry_has_a_row_for_every_generated_token(generator: Generator) -> None:
    (answer,) = generator.generate([GenerateRequest("What is a dagger?", max_new_tokens=12)])
    telemetry = answer.telemetry
    assert telemetry is not None and answer.policy == "default"
    first = answer.prompt_tokens - 1
    assert telemetry.positions == list(range(first, first + 12))
    assert telemetry.token_ids[1:] == answer.token_ids[:-1]
    for block in (0, 2):
        rows, active = telemetry.rows(block), telemetry.active(block)
        for doses, concepts in zip(rows.doses, active, strict=True):
            # k_out = k, so the support is the whole code and its undesirable part adds up to the dose.
            assert len(concepts) <= 4
            assert {c.label == "undesirable" for c in concepts if c.removed} <= {True}
            assert any(c.removed for c in concepts) == (doses[0] > 0) == (doses[1] > 0)
            assert [c.strength for c in concepts] == sorted((c.strength for c in concepts), reverse=True)
    summary = telemetry.summary()
    assert summary["rows"] == 12 and summary["removed"][0]["rows"] <= 12
    document = json.loads(json.dumps(answer.to_json(tokens=True, token_text=generator.processor.token_text)))
    assert [t["produced"] for t in document["telemetry"]["tokens"]] == list(range(12))
    assert document["telemetry"]["removed"][0]["name"] in telemetry.sentence()


def test_a_policy_of_one_block_reports_that_block(generator: Generator) -> None:
    (answer,) = generator.generate([GenerateRequest("hi", policy="everywhere", max_new_tokens=4)])
    assert answer.telemetry is not None and answer.telemetry.blocks == (2,)
    assert answer.telemetry.positions == list(range(1, answer.prompt_tokens + 3))


def test_streamed_pieces_add_up(generator: Generator, mixed: list[GenerateRequest]) -> None:
    pieces: dict[int, list[str]] = {i: [] for i in range(len(mixed))}
    answers = generator.generate(mixed, on_text=lambda i, text: pieces[i].append(text))
    for i, answer in enumerate(answers):
        assert "".join(pieces[i]) == answer.text == generator.processor.decode(answer.token_ids)
        assert len(pieces[i]) > 1


def test_a_stop_string_ends_an_answer_across_tokens(generator: Generator) -> None:
    request = GenerateRequest("What is a dagger?", policy="off", max_new_tokens=20)
    (whole,) = generator.generate([request])
    # From inside one token into the next: the last two characters of one piece and the first of another.
    pieces: list[str] = []
    generator.generate([request], on_text=lambda _, text: pieces.append(text))
    at = next(i for i in range(3, len(pieces) - 1) if len(pieces[i]) > 2)
    stop = pieces[at][-2:] + pieces[at + 1][:2]
    shown: list[str] = []
    (cut,) = generator.generate(
        [replace(request, stop=[stop, "never"])], on_text=lambda _, t: shown.append(t)
    )
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)] == "".join(shown)
    assert len(cut.token_ids) < len(whole.token_ids)
    assert whole.finish_reason == "length"


def test_end_of_answer_tokens(bundle: Path) -> None:
    generator = Generator(bundle, library="off")
    request = GenerateRequest("What is a dagger?", policy="off", max_new_tokens=20)
    (whole,) = generator.generate([request])
    end = whole.token_ids[5]
    generator.processor.eos_token_ids = frozenset({end})
    (cut,), (full,) = generator.generate([request]), generator.generate([replace(request, ignore_eos=True)])
    assert cut.finish_reason == "eos"
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(end) + 1]
    assert full.token_ids == whole.token_ids


def test_draws_depend_on_the_request_alone(generator: Generator) -> None:
    warm = Sampling(temperature=1.5, top_k=50, top_p=0.95, repetition_penalty=1.1)
    requests = [
        GenerateRequest(p, sampling=warm, seed=seed, max_new_tokens=10)
        for p, seed in (("hi", 1), ("hi", 2), ("What is a dagger?", 1), ("hi", 1))
    ]
    together = [a.token_ids for a in generator.generate(requests)]
    assert together == [generator.generate([r])[0].token_ids for r in requests]
    assert together[0] == together[3] != together[1]


def test_threads_share_a_generator(generator: Generator, mixed: list[GenerateRequest]) -> None:
    expected = [a.token_ids for a in generator.generate(mixed)]
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda _: generator.generate(mixed), range(4)))
    assert all([a.token_ids for a in answers] == expected for answers in runs)


def test_no_torch_is_needed(bundle: Path, generator: Generator) -> None:
    code = f"""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else find(name, package)
sys.modules["torch"] = None
import numpy
from daco_rt.runtime import run_generate
picture = numpy.zeros((64, 64, 3), numpy.uint8)
answer = run_generate({str(bundle)!r}, "What is this?", images=[picture], max_new_tokens=6, library="off")
print("tokens", *answer.token_ids)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    request = GenerateRequest("What is this?", images=[np.zeros((64, 64, 3), np.uint8)], max_new_tokens=6)
    expected = generator.generate([request])[0].token_ids
    assert run.stdout.splitlines()[-1] == " ".join(map(str, ["tokens", *expected]))


def test_half_precision_stays_close(bundle: Path, pack: Path, picture: np.ndarray, tmp_path: Path) -> None:
    export_model("internvl", checkpoint=MODEL, pack=pack, output=tmp_path / "fp16", precision="fp16")
    full, half = Generator(bundle, library="off"), Generator(tmp_path / "fp16", library="off")
    assert half.session.dtype == np.float16
    request = [GenerateRequest("What is this?", images=[picture], policy="off")]
    logits = []
    for generator in (full, half):
        batch = generator.prepare_batch(request)
        cache = generator.session.new_cache(1, 128)
        logits.append(generator.session.prefill(cache, batch.embeds, batch.slots, batch.lengths).logits)
    assert logits[1].dtype == np.float32
    (answer,) = half.generate([GenerateRequest("hi", max_new_tokens=4)])
    assert answer.telemetry is not None and len(answer.telemetry.positions) == 4
    assert np.abs(logits[0] - logits[1]).max() < 2e-2 * np.abs(logits[0]).max()


def test_library_and_functions_give_the_same_answers(bundle: Path, mixed: list[GenerateRequest]) -> None:
    try:
        library_path("onnxruntime")
    except DacoError as error:
        pytest.skip(str(error))
    native, functions = (Generator(bundle, library=name) for name in ("require", "off"))  # type: ignore[arg-type]
    assert native.session.info.operator == "native" and functions.session.info.operator == "functions"
    for ours, theirs in zip(native.generate(mixed), functions.generate(mixed), strict=True):
        assert ours.token_ids == theirs.token_ids


def test_a_bundle_without_vision(picture: np.ndarray, pack: Path, tmp_path: Path) -> None:
    export_model("internvl", checkpoint=MODEL, pack=pack, output=tmp_path / "blind", vision=False)
    blind = Generator(tmp_path / "blind", library="off")
    (answer,) = blind.generate([GenerateRequest("hi", max_new_tokens=3)])
    assert len(answer.token_ids) == 3
    with pytest.raises(DacoError, match="without its vision tower"):
        blind.generate([GenerateRequest("What is this?", images=[picture])])


def test_what_cannot_be_answered_is_refused(
    generator: Generator, bundle: Path, picture: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, *args: object, **options: object) -> None:
        with pytest.raises(DacoError, match=match):
            run_generate(generator, *args, **options)  # type: ignore[arg-type]

    refused("did you mean 'default'", "hi", policy="defualt")
    refused("holds 512", "hi", max_new_tokens=600)
    refused("shorten the prompt", "dagger " * 600)
    (tmp_path / "photo.txt").write_text("no pixels here")
    refused("photo.txt is not an image that Pillow can read", "hi", images=[tmp_path / "photo.txt"])
    refused("missing.png", "hi", images=[tmp_path / "missing.png"])
    refused("1 image placeholder", "see <IMG_CONTEXT>")
    refused("more image entries", [{"role": "user", "content": [{"type": "image"}]}])

    session = generator.session
    cache = session.new_cache(1, 64)
    with pytest.raises(PolicyError, match=r"\[4\] are not in this bundle"):
        session.prefill(cache, np.zeros((1, 2, 192), np.float32), np.array([[0, 4]]), [2])

    needy = replace(load_bundle(bundle), library_required=True)
    with pytest.raises(DacoError, match="no portable form"):
        OnnxSession(needy, library="off")
    monkeypatch.setattr("daco_rt._native.library_path", _absent)
    with pytest.raises(DacoError, match="is needed by"):
        OnnxSession(needy)
    with pytest.raises(DacoError, match="was asked for"):
        OnnxSession(bundle, library="require")
    assert OnnxSession(bundle).info.operator == "functions"


def _absent(name: str) -> Path:
    raise DacoError(f"the {name} library is not built")
