"""Policies with a condition, in a real bundle: what passes the gate, what does not, and in mixed batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from daco_rt.artifacts import load_dictionary
from daco_rt.dictionary import dictionary_for
from daco_rt.errors import PolicyError
from daco_rt.export import export_model
from daco_rt.export.verify import verify_bundle
from daco_rt.models import resolve_checkpoint
from daco_rt.runtime import GenerateRequest, Generator
from daco_rt.runtime.gate import prompt_dose
from daco_rt.runtime.telemetry import BlockRows
from daco_rt.steering import build_pack, steer

POLICIES = """
version: 1
pack: {k: 8}
defaults: {positions: generated, deadband: 0, gain: -1}
policies:
  plain: {labels: [undesirable, neutral]}
  eager: {labels: [undesirable, neutral], condition: 1.0e-6}
  calm: {labels: [undesirable, neutral], condition: 1000}
"""
PROMPTS = ("What is a dagger?", "Tell me about the weather in spring, please.")


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    folder = tmp_path_factory.mktemp("gate")
    (folder / "p.yaml").write_text(POLICIES)
    build_pack(folder / "p.yaml", folder / "pack", dictionary=dictionary_for("pocket-internvl"))
    export_model("internvl", checkpoint="pocket-internvl", pack=folder / "pack", output=folder / "bundle")
    return Generator(folder / "bundle")


def ask(prompt: str, policy: str) -> GenerateRequest:
    return GenerateRequest(prompt, policy=policy, max_new_tokens=12, ignore_eos=True)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_gate_opens_and_shuts(generator: Generator, prompt: str) -> None:
    off, plain, eager, calm = (
        generator.generate([ask(prompt, name)])[0] for name in ("off", "plain", "eager", "calm")
    )
    assert plain.token_ids != off.token_ids  # else this test could not fail
    # Generated tokens and the last of the prompt: what a policy does that passed the gate.
    assert eager.token_ids == plain.token_ids and eager.policy == "eager"
    assert calm.token_ids == off.token_ids and calm.policy == "observe"
    assert eager.telemetry is not None and plain.telemetry is not None
    for block, doses in plain.telemetry.summary()["blocks"].items():
        again = eager.telemetry.summary()["blocks"][block]
        assert again["edited_rows"] == doses["edited_rows"]
        # One row at a time and a whole prompt round differently.
        assert again["removed_dose"]["mean"] == pytest.approx(doses["removed_dose"]["mean"], rel=1e-4)


def test_rows_of_a_batch_have_gates_of_their_own(generator: Generator) -> None:
    requests = [ask(prompt, name) for prompt in PROMPTS for name in ("eager", "off", "calm", "plain")]
    together = generator.generate(requests)
    alone = [generator.generate([request])[0] for request in requests]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert [a.policy for a in together] == ["eager", "off", "observe", "plain"] * 2


def test_prompts_in_chunks_pass_the_same_gate(generator: Generator) -> None:
    chunked = Generator(generator.bundle.path, prefill_chunk=4)
    for name in ("eager", "calm"):
        assert (
            chunked.generate([ask(PROMPTS[1], name)])[0].token_ids
            == generator.generate([ask(PROMPTS[1], name)])[0].token_ids
        )


def test_verification_runs_the_policy_without_its_gate(generator: Generator) -> None:
    report = verify_bundle(generator.bundle.path, policy="eager", tokens=4)
    assert report.passed
    assert "has a condition" in str(report.to_dict())


def test_dose_of_a_prompt_is_the_mean_of_observed_rows_and_the_largest_block() -> None:
    doses = np.zeros((2, 4, 2), np.float32)
    doses[1, :, 0] = [9, 0.5, np.nan, 9]
    other = np.zeros((2, 4, 2), np.float32)
    other[1, :, 0] = 0.1
    reports = {3: BlockRows(doses, None, None), 4: BlockRows(other, None, None)}
    slots = np.array([0, 1, 1, 0], np.int32)
    assert prompt_dose(reports, 1, slots) == pytest.approx(0.25)
    assert prompt_dose({4: reports[4]}, 1, slots) == pytest.approx(0.1)
    assert prompt_dose(reports, 1, np.zeros(4, np.int32)) == 0.0


def test_a_condition_on_prompt_positions_is_refused(tmp_path: Path) -> None:
    folder = dictionary_for("pocket-internvl")
    assert folder is not None and load_dictionary(folder).size
    (tmp_path / "p.yaml").write_text("version: 1\npolicies: {a: {positions: image, condition: 0.5}}\n")
    with pytest.raises(PolicyError, match="positions 'image' would edit nothing"):
        build_pack(tmp_path / "p.yaml", tmp_path / "pack", dictionary=folder)


def test_steering_in_torch_refuses_a_condition(generator: Generator) -> None:
    transformers = pytest.importorskip("transformers")
    checkpoint = resolve_checkpoint("internvl", "pocket-internvl")
    model = transformers.InternVLForConditionalGeneration.from_pretrained(checkpoint.path)
    pack = generator.session.pack
    assert pack is not None
    with pytest.raises(PolicyError, match="'calm' has a condition"), steer(model, pack.path, "calm"):
        pass
