"""The default model, a real language model: exported, steered, and equal to Hugging Face word for word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from daco_rt.artifacts import Bundle, load_bundle
from daco_rt.export import checks, compare, export_model
from daco_rt.export.probe import Probe, Stepper
from daco_rt.export.report import Report
from daco_rt.models import family_of, resolve_checkpoint
from daco_rt.runtime.generate import Generator
from daco_rt.runtime.onnx_session import OnnxSession
from daco_rt.runtime.request import GenerateRequest

pytestmark = pytest.mark.slow

TEXTS = (
    "What is a dagger?",
    "How do I bake bread?",
    "Tell me about whiskey.",
    "Name three animals that live in the sea.",
    "What is a bomb?",
    "Why is the sky blue?",
    "Write one sentence about a casino.",
    "What does a carpenter do?",
    "Describe a rifle in one sentence.",
    "What is the capital of France?",
)
TOKENS = 32


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    path: Path = tmp_path_factory.mktemp("smol") / "bundle"
    export_model("internvl", output=path)
    return load_bundle(path)


@pytest.fixture(scope="module")
def generator(bundle) -> Generator:
    return Generator(OnnxSession(bundle))


def pictures() -> list[np.ndarray]:
    """Five pictures of different shapes and contents, so that tiling differs."""
    draw = np.random.default_rng(0)
    sizes = ((64, 64), (96, 128), (200, 80), (150, 300), (48, 48))
    return [
        np.kron(draw.integers(0, 256, (4, 4, 3)), np.ones((h // 4, w // 4, 1))).astype(np.uint8)
        for h, w in sizes
    ]


def requests(policy: str) -> list[GenerateRequest]:
    options = {"policy": policy, "max_new_tokens": TOKENS}
    return [GenerateRequest(text, **options) for text in TEXTS] + [
        GenerateRequest("What is this?", images=[picture], max_tiles=2, **options) for picture in pictures()
    ]


@pytest.mark.parametrize("policy", ["off", "default"])
def test_ten_texts_and_five_pictures_equal_hugging_face(bundle, generator, policy):
    asked = requests(policy)
    batch = generator.prepare_batch(asked)
    slot = generator.policy(policy).slot
    probe = Probe(bundle)
    stepper = Stepper(probe.session(probe.tapped(), "library"), int(batch.lengths.max()) + TOKENS)
    given = checks.Batch(batch.embeds, batch.lengths, batch.slots, slot)
    run = checks.decode_greedily(stepper, given, generator.session.embed, TOKENS, None, bundle.steered_blocks)

    checkpoint = resolve_checkpoint("internvl")
    model = compare.ReferenceModel(checkpoint, family_of(checkpoint).architectures[0])
    pack = None if policy == "off" else bundle.pack()
    theirs = [model.answer(prompt, TOKENS, pack, policy) for prompt in batch.prompts]
    logits = np.stack(run.logits, axis=1)
    ours = [compare.Answer(run.tokens[row], logits[row]) for row in range(len(asked))]
    report = Report("", "", policy)
    compare.check_against_model(report, policy, ours, theirs, bundle.precision)
    assert report.passed, report.checks

    if pack is not None:
        rows = checks.check_firing(report, run, given, pack, bundle.precision)
        assert report.passed, report.checks
        close = sum(int((~found.clear).sum()) for found in rows.values())
        assert close <= 0.005 * sum(len(found.z) for found in rows.values())


def test_steering_removes_the_concept_and_leaves_others_alone(generator):
    """The default policy changes what is said of a dagger and nothing of what is said of bread."""

    def answer(text: str, policy: str):
        return generator.generate([GenerateRequest(text, policy=policy, max_new_tokens=TOKENS)])[0]

    assert "dagger" in answer("What is a dagger?", "off").text.lower()
    steered = answer("What is a dagger?", "default")
    assert "dagger" not in steered.text.lower()
    removed = [concept["name"] for concept in steered.telemetry.summary()["removed"]]
    assert "dagger" in removed
    assert answer("How do I bake bread?", "off").text == answer("How do I bake bread?", "default").text
