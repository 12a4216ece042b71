"""Proving, on the user's own machine, that a bundle steers as it should."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from daco_rt.artifacts.bundle import Bundle, load_bundle
from daco_rt.artifacts.pack import Pack
from daco_rt.errors import DacoError
from daco_rt.export import checks, compare
from daco_rt.export.graph import library_at_hand
from daco_rt.export.probe import Kernels, Probe, Stepper
from daco_rt.export.report import Report
from daco_rt.models import family_of, model_identity, resolve_checkpoint
from daco_rt.models.checkpoint import Checkpoint
from daco_rt.progress import progress
from daco_rt.runtime.generate import Generator
from daco_rt.runtime.onnx_session import OnnxSession
from daco_rt.runtime.positions import token_slots
from daco_rt.runtime.request import GenerateRequest

QUESTIONS = (
    "What is a dagger?",
    "How do I bake bread?",
    "Tell me about whiskey and how it is made, in two sentences.",
)
"""Asked by a verification: two that name an undesirable concept, one that does not."""


def verify_bundle(
    path: str | Path,
    *,
    checkpoint: str | None = None,
    policy: str | None = None,
    tokens: int = 32,
    full: bool = False,
    compare_model: bool = True,
) -> Report:
    """Check a bundle and return what was found.

    Files and weights; slots 0 and 1 leave every logit and cache value as it was, bit for bit; each token that
    the policy covers was evaluated at each of its blocks and equals the float64 reference; a planted concept
    is edited at every block; library and functions agree; and, where the checkpoint is at hand, logits and
    greedy tokens equal Hugging Face's, without and with steering.

    Parameters
    ----------
    path : the bundle.
    checkpoint : folder or name of the Hugging Face checkpoint; by default the one it was exported from.
    policy : by default the pack's default one.
    tokens : to generate for each prompt.
    full : hash linked weight files in full too.
    compare_model : whether to load the Hugging Face model (needs its memory in fp32).

    Raises
    ------
    DacoError
        The bundle is damaged or the policy unknown; a check that fails is in the report instead.

    Example
    -------
    >>> verify_bundle("bundles/smol-internvl").passed                        # doctest: +SKIP
    True
    """
    began = time.perf_counter()
    if tokens < 2:
        raise DacoError(f"--tokens must be 2 or greater, got {tokens}")
    bundle = load_bundle(path, verify=True, full=full)
    generator = Generator(OnnxSession(bundle))
    pack = bundle.pack() if bundle.steered_blocks else None
    chosen = generator.policy(policy)
    report = Report(str(path), bundle.checkpoint, chosen.name)
    _check_files(report, bundle, full)
    requests = [GenerateRequest(q, policy=chosen.name, max_new_tokens=tokens) for q in QUESTIONS]
    if bundle.vision_path is not None:
        picture = _test_picture()
        requests.append(
            GenerateRequest("What is this?", images=[picture], policy=chosen.name, max_new_tokens=tokens)
        )
    with progress("verifying", 6) as advance:
        kernels: Kernels = "library" if generator.session.info.library else "functions"
        run = None
        if pack is None:
            report.skip("steering", "this bundle was exported without a pack")
        else:
            batch = _batch(generator, requests)
            probe = Probe(bundle)
            checks.check_bits(report, probe, batch, generator.session.embed, kernels)
            advance(1)
            stepper = Stepper(probe.session(probe.tapped(), kernels), int(batch.lengths.max()) + tokens)
            run = checks.decode_greedily(stepper, batch, generator.session.embed, tokens, None, pack.blocks)
            rows = checks.check_firing(report, run, batch, pack, bundle.precision)
            advance(1)
            checks.check_planted(report, probe, pack, rows, chosen.slot, kernels, bundle.precision)
            advance(1)
            if bundle.runtime == "tensorrt":
                report.skip("library and functions agree", "the graph is written for TensorRT's plugin")
            elif bundle.library_required:
                report.skip("library and functions agree", "this coder has no standard-operator form")
            elif not library_at_hand():
                report.skip("library and functions agree", "the custom-op library was not built here")
            else:
                checks.check_kernels_agree(report, probe, pack, rows, bundle.precision)
        advance(1)
        if compare_model and chosen.condition:
            report.skip(
                "logits equal Hugging Face",
                f"policy '{chosen.name}' has a condition, which steering in torch does not evaluate",
            )
        elif compare_model:
            _check_model(report, bundle, generator, pack, chosen.name, requests, tokens, checkpoint)
        else:
            report.skip("logits equal Hugging Face", "left out on request")
        advance(1)
        if pack is not None:
            report.example = _example(generator, chosen.name, tokens)
        advance(1)
    report.seconds = time.perf_counter() - began
    return report


def _check_files(report: Report, bundle: Bundle, full: bool) -> None:
    owned, linked = len(bundle.manifest["files"]), len(bundle.manifest["references"])
    depth = "in full" if full else "by size, header and samples"
    report.add("files", True, f"{owned} files by SHA-256, {linked} weight file(s) {depth}", "as recorded")


def _batch(generator: Generator, requests: Sequence[GenerateRequest]) -> checks.Batch:
    policy = generator.policy(requests[0].policy)
    prepared = generator.prepare_batch(requests)
    decoded = token_slots([policy.slot], [policy.positions], [[True]], prompt_lengths=[1], past_lengths=[1])
    return checks.Batch(prepared.embeds, prepared.lengths, prepared.slots, int(decoded[0, 0]))


def _check_model(
    report: Report,
    bundle: Bundle,
    generator: Generator,
    pack: Pack | None,
    policy: str,
    requests: Sequence[GenerateRequest],
    tokens: int,
    checkpoint: str | None,
) -> None:
    found = _original(report, bundle, checkpoint)
    if found is None:
        return
    model = compare.ReferenceModel(found, family_of(found).architectures[0])
    prompts = [generator.processor.prepare(r.prompt, r.images) for r in requests]
    batch = _batch(generator, requests)
    probe = Probe(bundle)
    kernels: Kernels = "library" if generator.session.info.library else "functions"
    session = probe.session(probe.graph, kernels)
    for name, slot in (("unsteered", 0), (f"policy {policy}", None)):
        if slot is None and pack is None:
            continue
        if slot is None and bundle.precision != "fp32":
            report.skip(
                f"logits equal Hugging Face, {name}",
                "half precision takes the other side of a discontinuity too often to compare whole answers",
            )
            continue
        stepper = Stepper(session, int(batch.lengths.max()) + tokens)
        run = checks.decode_greedily(stepper, batch, generator.session.embed, tokens, slot)
        logits = np.stack(run.logits, axis=1)
        ours = [compare.Answer(run.tokens[row], logits[row]) for row in range(len(requests))]
        theirs = [model.answer(p, tokens, None if slot == 0 else pack, policy) for p in prompts]
        compare.check_against_model(report, name, ours, theirs, bundle.precision)


def _original(report: Report, bundle: Bundle, checkpoint: str | None) -> Checkpoint | None:
    """The checkpoint to compare with, or None after saying why there is none."""
    name = "logits equal Hugging Face"
    try:
        found = resolve_checkpoint(
            bundle.family, checkpoint or bundle.manifest.get("source", bundle.checkpoint), fetch=False
        )
    except DacoError as error:
        if checkpoint is not None:
            raise
        report.skip(name, f"the checkpoint is not at hand: {error}")
        return None
    difference = bundle.model.difference(model_identity(found))
    if difference is not None:
        if checkpoint is not None:
            raise DacoError(
                f"{checkpoint} is not the model in {bundle.path}: {difference}; "
                "pass the one it was exported from"
            )
        report.skip(name, f"{found.label} has changed since the export: {difference}")
        return None
    return found


def _example(generator: Generator, policy: str, tokens: int) -> dict[str, str]:
    """One question, answered off and steered; what was removed comes from the telemetry."""
    question = QUESTIONS[0]
    off, steered = generator.generate(
        [GenerateRequest(question, policy=name, max_new_tokens=tokens) for name in ("off", policy)]
    )
    removed = [] if steered.telemetry is None else steered.telemetry.summary()["removed"]
    return {
        "question": question,
        "off": off.text.strip(),
        "steered": steered.text.strip(),
        "removed": ", ".join(f"{c['name']} ×{c['rows']}" for c in removed[:8]),
    }


def _test_picture() -> np.ndarray:
    """A picture that every processor takes: two shapes on a gradient, uint8 [96, 128, 3]."""
    rows, columns = np.mgrid[0:96, 0:128]
    picture = np.stack([columns * 2, rows * 2, np.full_like(rows, 96)], axis=-1)
    picture[(rows - 48) ** 2 + (columns - 40) ** 2 < 400] = (230, 40, 40)
    picture[30:66, 80:116] = (40, 60, 220)
    return picture.astype(np.uint8)
