"""What Inspect finds when it looks for plug-ins: the provider ``daco`` and one task for each benchmark.

::

    inspect eval daco_rt/strongreject -T path=build/deps/harm-prompts \\
        --model daco/bundles/smol-internvl -M policy=default

Every task takes ``part``, ``dev``, ``split_seed`` and ``questions`` (most questions, spread over categories),
and ``judges``: names separated by commas. The log holds the data's version, licence and SHA-256.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio.to_thread
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset
from inspect_ai.dataset import Sample as InspectSample
from inspect_ai.model import ChatMessageUser, ContentImage, ContentText, modelapi
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState, generate

from daco_rt.errors import DacoError, did_you_mean
from daco_rt.evaluate.benchmarks import load_benchmark
from daco_rt.evaluate.judges import Judge, make_judge
from daco_rt.evaluate.samples import Sample

_METRICS: dict[str, Any] = {name: [mean(), stderr()] for name in ("unsafe", "safe", "unjudged", "refused")}


@modelapi(name="daco")
def daco() -> type:
    """The provider: a bundle, or a checkpoint in torch, under a policy."""
    from daco_rt.evaluate.inspect_model import DacoModel

    return DacoModel


def _score_by(make: Callable[[], Judge]) -> Scorer:
    """A scorer that asks a judge; unsafe, safe and unjudged are 0 or 1 and add up to 1."""
    judges: list[Judge] = []

    async def score(state: TaskState, target: Target) -> Score:
        if not judges:
            judges.append(make())
        sample = _sample(state)
        (verdict,) = await anyio.to_thread.run_sync(judges[0].judge, [sample], [state.output.completion])
        value: dict[str, str | int | float | bool | None] = {
            "unsafe": int(verdict.unsafe is True),
            "safe": int(verdict.unsafe is False),
            "unjudged": int(verdict.unsafe is None),
            "refused": int(verdict.refused is True),
        }
        return Score(value=value, explanation=verdict.reason, metadata=verdict.to_json())

    return score


@scorer(metrics=_METRICS)
def refusal(count_rest_as_unsafe: bool = False) -> Scorer:
    """Refusals by patterns."""
    return _score_by(lambda: make_judge("refusal", {"count_rest_as_unsafe": count_rest_as_unsafe}))


@scorer(metrics=_METRICS)
def lexicon(table: str | None = None) -> Scorer:
    """Undesirable concepts that an answer names; "unsafe" is naming any."""
    return _score_by(lambda: make_judge("lexicon", {} if table is None else {"table": table}))


@scorer(metrics=_METRICS)
def guard(path: str = "", **options: Any) -> Scorer:
    """A guard model from a folder or the hub."""
    return _score_by(lambda: make_judge("guard", {**_path(path), **options}))


@scorer(metrics=_METRICS)
def endpoint(url: str = "", model: str = "", cache: str = "verdicts.cache.jsonl", **options: Any) -> Scorer:
    """A chat model behind an OpenAI-compatible endpoint."""
    return _score_by(lambda: make_judge("endpoint", {"url": url, "model": model, "cache": cache, **options}))


@scorer(metrics=_METRICS)
def scene_telling() -> Scorer:
    """Unsafe things that an answer about a scene names."""
    return _score_by(lambda: make_judge("scenes", {}))


SCORERS: dict[str, Callable[..., Scorer]] = {
    "refusal": refusal, "lexicon": lexicon, "guard": guard, "endpoint": endpoint,
    "scene_telling": scene_telling,
}  # fmt: skip


@task
def mm_safetybench(
    path: str,
    methods: str = "SD,SD_TYPO,TYPO",
    scenarios: str | None = None,
    allow_missing: bool = False,
    **common: Any,
) -> Task:
    """MM-SafetyBench: harmful wishes as pictures with text; of all scenarios unless some are named."""
    options = {"methods": _list(methods), "scenarios": None if scenarios is None else _list(scenarios)}
    return _task("mm_safetybench", path, {**options, "allow_missing": allow_missing}, common)


@task
def jailbreakv(
    path: str,
    table: str = "mini",
    formats: str | None = None,
    pictures: bool = True,
    allow_missing: bool = False,
    **common: Any,
) -> Task:
    """JailBreakV-28K: jailbreak texts with pictures; the mini table unless ``table=full``, all formats unless
    some are named, without the pictures where ``pictures=false``.
    """
    options = {"table": table, "formats": None if formats is None else _list(formats), "pictures": pictures}
    return _task("jailbreakv", path, {**options, "allow_missing": allow_missing}, common)


@task
def redteam_2k(path: str, **common: Any) -> Task:
    """RedTeam-2K: the plain requests behind JailBreakV-28K."""
    return _task("redteam_2k", path, {}, common)


@task
def strongreject(path: str, table: str = "full", **common: Any) -> Task:
    """StrongREJECT: plain harmful requests."""
    return _task("strongreject", path, {"table": table}, common)


@task
def harmbench(path: str, table: str = "test", functional: str = "standard,contextual", **common: Any) -> Task:
    """HarmBench's text behaviours."""
    return _task("harmbench", path, {"table": table, "functional": _list(functional)}, common)


@task
def benign(kinds: str = "everyday,look-alike", **common: Any) -> Task:
    """Harmless questions of our own: the price of a method."""
    return _task("benign", None, {"kinds": _list(kinds)}, common)


@task
def concepts(forms: str = "named,paraphrase,unlisted", **common: Any) -> Task:
    """Questions of our own that make a model name an undesirable concept."""
    return _task("concepts", None, {"forms": _list(forms)}, common)


@task
def scenes(path: str, kinds: str = "unsafe,harmless", question: str | None = None, **common: Any) -> Task:
    """Pictures of which everything is known; score with the judge scene_telling."""
    asked = {} if question is None else {"question": question}
    return _task("scenes", path, {"kinds": _list(kinds), **asked}, common)


_COMMON = ("part", "dev", "split_seed", "questions", "judges", "max_tokens", "judge_options")


def _task(name: str, path: str | None, options: dict[str, Any], common: dict[str, Any]) -> Task:
    for key in common:
        if key not in _COMMON:
            raise DacoError(f"task {name}: argument '{key}' is unknown{did_you_mean(key, _COMMON)}")
    part = common.get("part", "test")
    dev, seed = float(common.get("dev", 0.3)), int(common.get("split_seed", 0))
    questions = common.get("questions")
    benchmark = load_benchmark(name, path, **options).part(
        part, dev=dev, seed=seed, limit=None if questions is None else int(questions)
    )
    card = benchmark.card
    scorers = []
    for judge in _list(common.get("judges", "refusal,lexicon")):
        if judge not in SCORERS:
            raise DacoError(f"task {name}: judge '{judge}' is unknown{did_you_mean(judge, SCORERS)}")
        scorers.append(SCORERS[judge](**dict(common.get("judge_options") or {}).get(judge, {})))
    return Task(
        dataset=MemoryDataset(
            [_inspect_sample(s) for s in benchmark.samples], name=f"{card.name} {card.version}"
        ),
        solver=generate(max_tokens=int(common.get("max_tokens", 128))),
        scorer=scorers,
        version=card.version,
        metadata={"dataset": card.to_json(), "part": part, "dev": dev, "split_seed": seed},
    )


def _inspect_sample(sample: Sample) -> InspectSample:
    content: list[Any] = [] if sample.image is None else [ContentImage(image=str(sample.image))]
    return InspectSample(
        id=sample.id,
        input=[ChatMessageUser(content=[*content, ContentText(text=sample.prompt)])]
        if content
        else sample.prompt,
        target="refusal" if sample.harmful else "answer",
        metadata={
            "category": sample.category,
            "form": sample.form,
            "reference": sample.reference,
            "harmful": sample.harmful,
            "facts": dict(sample.facts),
        },
    )


def _sample(state: TaskState) -> Sample:
    told = state.metadata
    return Sample(
        str(state.sample_id),
        told["category"],
        state.input_text,
        form=told["form"],
        reference=told["reference"],
        harmful=told["harmful"],
        facts=told["facts"],
    )


def _path(path: str) -> dict[str, str]:
    return {"path": path} if path else {}


def _list(text: Any) -> list[str]:
    return [part.strip() for part in text.split(",")] if isinstance(text, str) else list(text)
