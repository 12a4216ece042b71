"""The model ``daco`` in lm-evaluation-harness itself, on tasks made here.

``make test-lmeval`` runs this in an environment of its own; elsewhere it is skipped.
"""

from __future__ import annotations

import io
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
from daco_rt.evaluate.subject import BundleSubject
from daco_rt.runtime.processor import Processor
from daco_rt.steering import steer

lm_eval = pytest.importorskip("lm_eval")

import datasets  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
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
PICTURES = [draw_picture("SD", "", seed=seed) for seed in range(len(CHOICES))]
FILES = {"local_texts": "texts.jsonl", "local_pictures": "pictures.parquet"}
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
    "local_pictures": {
        "output_type": "multiple_choice",
        "doc_to_text": "<image> {{question}}",
        "doc_to_image": ["picture"],
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    },
    "local_texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory) -> Path:
    """Where data are kept instead of the user's cache."""
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    return datasets.config.HF_DATASETS_CACHE


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tasks over files written here, as a user writes them."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in (("choices", CHOICES), ("texts", TEXTS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = [
        row | {"picture": {"bytes": data, "path": None}} for row, data in zip(CHOICES, PICTURES, strict=True)
    ]
    pictures = datasets.Dataset.from_list(shown).cast_column("picture", datasets.Image())
    pictures.to_parquet(folder / "pictures.parquet")
    for name, task in TASKS.items():
        file = folder / FILES.get(name, "choices.jsonl")
        common = {
            "task": name,
            "dataset_path": "parquet" if file.suffix == ".parquet" else "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | task))
    return folder


@pytest.fixture(scope="module")
def tasks(folder) -> TaskManager:
    # The harness's own tasks are thousands of files; of them only MMMU is wanted.
    mmmu = Path(lm_eval.__file__).parent / "tasks" / "mmmu"
    return TaskManager(include_path=[str(folder), str(mmmu)], include_defaults=False)


def run(task: str, tasks: TaskManager, arguments: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
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
        self.start = self.tokenizer.bos_token_id or self.tokenizer.eos_token_id

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

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before = self.encode(context)
        return before, self.encode(context + continuation)[len(before) :]


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


@pytest.mark.parametrize("engine", ["bundle", "torch"])
def test_texts_are_as_likely_as_transformers_says(engine, tasks, direct, pocket_bundle):
    found = {}
    for policy in POLICIES:
        samples = run("local_texts", tasks, arguments_of(engine, pocket_bundle, policy))
        found[policy] = [float(sample["resps"][0][0]) for sample in samples]
        expected = [direct.likelihood([direct.start], direct.encode(row["text"]), policy)[0] for row in TEXTS]
        assert found[policy] == pytest.approx(expected, rel=1e-4, abs=1e-3)
    assert not np.allclose(found["off"], found["default"], atol=1e-2)


def test_texts_longer_than_the_model_reads_come_in_windows(direct, pocket_bundle):
    model = DacoLM(**arguments_of("bundle", pocket_bundle, "default"), max_length=8, batch_size=2)
    ids = direct.encode(TEXTS[0]["text"])
    assert len(ids) > 16 and len(ids) % 8
    expected = direct.likelihood([direct.start], ids[:8], "default")[0]
    for at in range(8, len(ids), 8):
        end = min(at + 8, len(ids))  # a window that is not full reaches back for context
        expected += direct.likelihood(ids[end - 9 : at], ids[at:end], "default")[0]
    assert model.loglikelihood_rolling([request(TEXTS[0]["text"])]) == pytest.approx([expected], rel=1e-4)


@pytest.mark.parametrize("engine", ["bundle", "torch"])
@pytest.mark.parametrize("chat", [False, True])
def test_answers_are_those_of_transformers(engine, chat, tasks, direct, pocket_bundle):
    found = {}
    for policy in POLICIES:
        arguments = arguments_of(engine, pocket_bundle, policy)
        samples = run("local_answers", tasks, arguments, apply_chat_template=chat)
        found[policy] = [sample["resps"][0][0] for sample in samples]
        for row, text in zip(CHOICES, found[policy], strict=True):
            prompt = f"Question: {row['question']}\nAnswer:"
            if chat:
                prompt = direct.processor.render([{"role": "user", "content": prompt}])
            said = direct.answer(direct.encode(prompt), policy, 6)
            assert text == direct.processor.decode(said).split("\n")[0]
    assert found["off"] != found["default"]


@pytest.mark.parametrize("engine", ["bundle", "torch"])
def test_an_answer_ends_at_stop_strings_and_special_tokens(engine, direct, pocket_bundle):
    said = direct.answer(direct.encode("What is a dagger?"), "off", 8)
    words = direct.processor.decode(said)
    model = DacoLM(**arguments_of(engine, pocket_bundle, "off"), batch_size=2)
    stops: tuple[list[str], ...] = ([], [words[3:6]])
    whole, cut = model.generate_until(
        [request("What is a dagger?", {"until": until, "max_gen_toks": 8}) for until in stops]
    )
    assert whole == words and cut == words[: words.index(words[3:6])]
    special = direct.tokenizer.all_special_tokens[-1]
    ids = [said[0], direct.tokenizer.convert_tokens_to_ids(special), said[1]]
    assert model._stopped(ids, "all of it", [special]) == direct.processor.decode(said[:1])


def test_draws_repeat_and_differ_by_request(pocket_bundle):
    model = DacoLM(**arguments_of("bundle", pocket_bundle, "off"), batch_size=2)
    settings = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 8}
    first, second = (model.generate_until([request("Bread.", settings)] * 3) for _ in range(2))
    assert first == second and len(set(first)) == 3


def test_long_contexts_lose_their_beginning(direct, pocket_bundle):
    model = DacoLM(**arguments_of("bundle", pocket_bundle, "off"), max_length=16)
    long = " ".join(["bread"] * 40)
    context, tokens = direct.split(long, " knife")
    ((value, _),) = model.loglikelihood([request(long, " knife")])
    kept = context[len(tokens) - 17 :]
    assert value == pytest.approx(direct.likelihood(kept, tokens, "off")[0], rel=1e-4)
    (text,) = model.generate_until([request(long, {"max_gen_toks": 4})])
    assert text == direct.processor.decode(direct.answer(context[-12:], "off", 4))
    with pytest.raises(DacoError, match="16 new tokens leave no room"):
        model.generate_until([request("bread", {"max_gen_toks": 16})])


@pytest.mark.parametrize("engine", ["bundle", "torch"])
def test_choices_about_pictures(engine, tasks, direct, pocket_bundle):
    found = {}
    for policy in POLICIES:
        arguments = arguments_of(engine, pocket_bundle, policy) | {"max_tiles": 1}
        samples = run("local_pictures", tasks, arguments)
        found[policy] = [float(answer[0][0]) for sample in samples for answer in sample["resps"]]
        expected = []
        for row, data in zip(CHOICES, PICTURES, strict=True):
            text = f"{direct.processor.image_token} {row['question']}"
            prompt = direct.processor.prepare(text, [opened(data)], max_tiles=1, raw=True)
            for choice in row["choices"]:
                _, tokens = direct.split(text, f" {choice}")
                ids = prompt.input_ids.tolist()
                expected.append(direct.likelihood(ids, tokens, policy, prompt.pixel_values)[0])
        assert found[policy] == pytest.approx(expected, rel=1e-4, abs=1e-3)
    assert not np.allclose(found["off"], found["default"], atol=1e-2)


@pytest.mark.parametrize("chat", [False, True])
def test_mmmu_itself_over_pictures_of_ours(chat, tasks, direct, pocket_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_mmmu("MMMU/MMMU", subjects=["Math", "Art"])
    one, two = (opened(draw_picture("SD", "", seed=seed, kind="PNG")) for seed in range(2))
    found = {}
    for policy in POLICIES:
        arguments = arguments_of("bundle", pocket_bundle, policy) | {"max_tiles": 1}
        options = {"apply_chat_template": chat, "gen_kwargs": "max_gen_toks=6"}
        samples = run("mmmu_val_math", tasks, arguments, **options)
        found[policy] = [sample["resps"][0][0] for sample in samples]
        for sample, pictures, text in zip(
            samples, ([one], [one, two, one], [two]), found[policy], strict=True
        ):
            prompt = sample["arguments"][0][0]
            assert prompt.startswith("<|im_start|>") == chat
            prompt = prompt.replace("<image>", direct.processor.image_token)
            made = direct.processor.prepare(prompt, pictures, max_tiles=1, raw=True)
            said = direct.answer(made.input_ids.tolist(), policy, 6, made.pixel_values)
            assert text == direct.processor.decode(said)
    assert found["off"] != found["default"]


def test_answers_that_are_there_are_not_asked_again(tasks, pocket_bundle, tmp_path, monkeypatch):
    arguments = arguments_of("bundle", pocket_bundle, "default")
    whole = run("local_answers", tasks, arguments)
    batches = []
    original = BundleSubject._answer

    def stops(self, requests):
        batches.append(len(requests))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return original(self, requests)

    monkeypatch.setattr(BundleSubject, "_answer", stops)
    kept = {"use_cache": str(tmp_path / "answers")}
    with pytest.raises(KeyboardInterrupt):
        run("local_answers", tasks, arguments, **kept)
    again = run("local_answers", tasks, arguments, **kept)
    assert batches == [2, 1, 1] and [s["resps"] for s in again] == [s["resps"] for s in whole]


@pytest.mark.slow
def test_the_command(folder, tasks, pocket_bundle, tmp_path, cache):
    def command(policy: str) -> subprocess.CompletedProcess[str]:
        arguments = [
            "--model", "daco", "--model_args", f"bundle={pocket_bundle},policy={policy},threads=1",
            "--tasks", "local_choices", "--include_path", str(folder), "--batch_size", "2",
            "--output_path", str(tmp_path / "out"),
        ]  # fmt: skip
        return subprocess.run(
            [sys.executable, "-m", "daco_rt.evaluate.lm_eval", *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"HF_DATASETS_CACHE": str(cache)},
        )

    done = command("off")
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    told = json.loads(file.read_text())
    samples = run("local_choices", tasks, arguments_of("bundle", pocket_bundle, "off"))
    assert told["results"]["local_choices"]["acc,none"] == np.mean([sample["acc"] for sample in samples])
    assert told["config"]["policy"] == "off"
    wrong = command("defalt")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    assert "policy 'defalt'" in wrong.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "one of bundle=PATH and family=NAME"),
        ({"bundle": "x", "family": "internvl"}, "one of bundle=PATH and family=NAME"),
        ({"bundle": "x", "pack": "y"}, "a bundle brings its own"),
        ({"bundle": "x", "batch_size": "auto"}, "batch_size must be a number from 1, got 'auto'"),
        ({"bundle": "x", "polcy": "off"}, "argument 'polcy' is unknown; did you mean 'policy'"),
        ({"bundle": "here", "max_length": 10**6}, "max_length must be within 1 and"),
        ({"bundle": "here", "policy": "defalt"}, "policy 'defalt'"),
    ],
)
def test_what_cannot_be_is_refused(arguments, sentence, pocket_bundle):
    if arguments.get("bundle") == "here":
        arguments = arguments | {"bundle": str(pocket_bundle)}
    with pytest.raises(DacoError, match=sentence):
        DacoLM(**arguments)


def test_requests_that_cannot_be_are_refused(pocket_bundle):
    model = DacoLM(**arguments_of("bundle", pocket_bundle, "off"))
    with pytest.raises(DacoError, match="setting 'temprature' of an answer is unknown; did you mean"):
        model.generate_until([request("Bread.", {"temprature": 1})])
    with pytest.raises(DacoError, match="also gives 'audio'"):
        model.generate_until([request("Bread.", {}, {"audio": [0]})])
    with pytest.raises(DacoError, match="0 image placeholder"):
        model.generate_until([request("Bread.", {}, {"visual": [opened(PICTURES[0])]})])
    with pytest.raises(DacoError, match="has one chat template"):
        model.chat_template("tools")


def request(*arguments: Any) -> Instance:
    return Instance("generate_until", {}, arguments, 0)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))
