"""The model ``daco`` in lm-evaluation-harness itself, on tasks made here.

``make test-lmeval`` runs this in an environment of its own; elsewhere it is skipped.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from daco_rt.errors import DacoError
from daco_rt.evaluate.layouts import draw_picture, write_mmmu
from daco_rt.runtime.processor import Processor
from daco_rt.steering import steer

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager  # noqa: E402

from daco_rt.evaluate.lm_eval import DacoLM  # noqa: E402  (registers itself)

POLICIES = ("off", "default")
CHOICES = [
    {"question": "What cuts bread?", "choices": ["a knife", "a river"], "gold": 0},
    {"question": "What is a dagger?", "choices": ["a weapon", "a fruit", "a small green apple"], "gold": 0},
    {"question": "Pick a letter", "choices": ["A", "B", "C"], "gold": 1},
]
TEXTS = [
    {"text": "The shop opens at nine. A dagger lies in its window."},
    {"text": "Rain fell on the old town for two days, and the river rose slowly over the meadow."},
    {"text": "Bread."},
]
TASKS: dict[str, dict[str, Any]] = {
    "local_choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    },
    "local_answers": {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "local_texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> TaskManager:
    """Tasks over files written here, as a user writes them."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in (("choices", CHOICES), ("texts", TEXTS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        file = folder / ("texts.jsonl" if name == "local_texts" else "choices.jsonl")
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | task))
    return TaskManager(include_path=str(folder))


def run(
    task: str, tasks: TaskManager | None, arguments: dict[str, Any], **options: Any
) -> list[dict[str, Any]]:
    """Run a task in the harness and return its samples in their order."""
    found = lm_eval.simple_evaluate(
        "daco",
        model_args=arguments,
        tasks=[task],
        task_manager=tasks,
        batch_size=2,
        bootstrap_iters=0,
        **options,
    )
    (samples,) = found["samples"].values()
    return sorted(samples, key=lambda sample: sample["doc_id"])


class Direct:
    """The same numbers from transformers, one request and one token at a time."""

    def __init__(self, checkpoint: Path, pack: Path) -> None:
        from transformers import AutoModelForImageTextToText

        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.pack = pack
        self.processor = Processor(checkpoint)
        self.tokenizer = self.processor.tokenizer

    def walk(
        self, ids: list[int], policy: str, pick: Callable[[int, np.ndarray], int | None], pixels: Any = None
    ) -> None:
        """Feed a prompt, then each token that ``pick`` returns for (step, logits)."""
        given = torch.tensor([ids])
        extra = {} if pixels is None else {"pixel_values": torch.from_numpy(pixels)}
        cache, step = None, 0
        steered = nullcontext() if policy == "off" else steer(self.model, self.pack, policy)
        with torch.no_grad(), steered:
            while True:
                out = self.model(input_ids=given, past_key_values=cache, use_cache=True, **extra)
                cache, extra = out.past_key_values, {}
                token = pick(step, out.logits[0, -1].double().numpy())
                if token is None:
                    return
                given, step = torch.tensor([[token]]), step + 1

    def likelihood(
        self, context: list[int], tokens: list[int], policy: str, pixels: Any = None
    ) -> tuple[float, bool]:
        total, greedy = 0.0, True

        def pick(step: int, logits: np.ndarray) -> int | None:
            nonlocal total, greedy
            shifted = logits - logits.max()
            total += shifted[tokens[step]] - math.log(np.exp(shifted).sum())
            greedy &= int(logits.argmax()) == tokens[step]
            return tokens[step] if step + 1 < len(tokens) else None

        self.walk(context, policy, pick, pixels)
        return total, greedy

    def answer(self, context: list[int], policy: str, most: int, pixels: Any = None) -> list[int]:
        said: list[int] = []

        def pick(step: int, logits: np.ndarray) -> int | None:
            said.append(int(logits.argmax()))
            ended = said[-1] in self.processor.eos_token_ids or len(said) == most
            return None if ended else said[-1]

        self.walk(context, policy, pick, pixels)
        return said

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        encode = lambda text: self.tokenizer(text)["input_ids"]  # noqa: E731
        return encode(context), encode(context + continuation)[len(encode(context)) :]


@pytest.fixture(scope="module")
def direct(pocket, pocket_bundle) -> Direct:
    return Direct(pocket.path, pocket_bundle / "pack")


def arguments_of(engine: str, bundle: Path, policy: str) -> dict[str, Any]:
    if engine == "bundle":
        return {"bundle": str(bundle), "policy": policy, "threads": 1}
    return {
        "family": "internvl", "checkpoint": "pocket-internvl", "pack": str(bundle / "pack"), "policy": policy
    }  # fmt: skip


@pytest.mark.parametrize("engine", ["bundle", "torch"])
def test_choices_are_as_likely_as_transformers_says(engine, tasks, direct, pocket_bundle):
    found = {}
    for policy in POLICIES:
        samples = run("local_choices", tasks, arguments_of(engine, pocket_bundle, policy))
        found[policy] = [float(answer[0][0]) for sample in samples for answer in sample["resps"]]
        greedy = [answer[0][1] for sample in samples for answer in sample["resps"]]
        expected = [
            direct.likelihood(*direct.split(row["question"], f" {choice}"), policy)
            for row in CHOICES
            for choice in row["choices"]
        ]
        assert found[policy] == pytest.approx([value for value, _ in expected], rel=1e-4, abs=1e-3)
        assert [str(g) == "True" for g in greedy] == [g for _, g in expected]
        best = [
            int(np.argmax([expected.pop(0)[0] for _ in row["choices"]])) == row["gold"] for row in CHOICES
        ]
        assert [sample["acc"] for sample in samples] == best
    assert not np.allclose(found["off"], found["default"], atol=1e-2)
