"""The commands of docs/evaluation.md for the paper's table, on a small model and small sets.

What is replaced is size and place: blocks, counts and limits of the two configurations, CUDA by the CPU. The
commands for MMMU need lm-evaluation-harness, so `make test-lmeval` runs them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from daco_rt.evaluate.layouts import write_jailbreakv, write_mm_safetybench, write_mmmu

pytest.importorskip("pyarrow")
ROOT = Path(__file__).resolve().parents[2]
SMALLER = {
    "internvl3.yaml": {
        "precision: bf16": "precision: fp32",
        "blocks: 15-19": "blocks: 2-3\nconcepts: {size: 48}",
        "count: 27": "count: 4",
        "k: 32": "k: 4\n  steps: 20\n  batch: 64",
        "policies: policies.yaml": "policies: policies-sae.yaml",  # 48 concepts lack some of its groups
    },
    "table.yaml": {
        "device: cuda": "device: cpu",
        "dtype: bfloat16": "dtype: float32",
        "max_new_tokens: 128": "max_new_tokens: 4",
        "limit: {dev: 200, test: 1000}": "limit: 3",
        "benign: {}": "benign: {limit: 3}",
        # On noise any method costs as much as any other, and nothing is a refusal.
        "budgets: [0.03, 0.1]": "budgets: [1000]",
        "      15: ../builds/internvl3/labelled/015\n": "      2: ../builds/internvl3/labelled/002\n",
        "      16: ../builds/internvl3/labelled/016\n": "      3: ../builds/internvl3/labelled/003\n",
        "      17: ../builds/internvl3/labelled/017\n": "",
        "      18: ../builds/internvl3/labelled/018\n": "",
        "      19: ../builds/internvl3/labelled/019\n": "",
        "kind: sae": "kind: sae\n    blocks: 2-3",
    },
}
MMMU_SMALLER = {
    "--device cuda": "--device cpu --limit 1 --gen_kwargs max_gen_toks=2",
    "dtype=bfloat16": "dtype=float32,max_tiles=1",
    "mmmu_val": "mmmu_val_science",
    "for variant in actadd@0.1 omp@0.4 daco@0.05": "for variant in daco@0.05",
}


def smaller(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert old in text, f"{old!r} is no longer there"
        text = text.replace(old, new)
    return text


def blocks() -> list[str]:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    section = page.split("## The paper's table with real weights")[1].split("\n## ")[0]
    found = re.findall(r"^```sh\n(.*?)^```", section, re.M | re.S)
    assert len(found) == 3
    return found


def sh(commands: str, folder: Path) -> str:
    """Run commands in bash with the `python` and `daco-rt` of this environment."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    for name, start in (("python", ""), ("daco-rt", " -m daco_rt.cli")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{start} "$@"\n')
        (tools / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-euc", commands],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "HF_DATASETS_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory, pocket) -> Path:
    """What the downloads leave in a clone, small, and the dictionary, SAEs and evaluation of the page."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "models").mkdir()
    (folder / "models" / "InternVL3-8B-hf").symlink_to(pocket.path)
    write_guard(folder / "models" / "Qwen3Guard-Gen-4B", pocket.path)
    write_mm_safetybench(folder / "data" / "MM-SafetyBench", form="hub")
    write_jailbreakv(folder / "data" / "JailBreakV-28K" / "JailBreakV_28K")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name, changes in SMALLER.items():
        file = folder / "configs" / name
        file.write_text(smaller(file.read_text(), changes))
    build, evaluate, _ = blocks()
    sh(smaller(build, {"--device cuda": "--device cpu"}), folder)
    sh(evaluate, folder)
    return folder


def write_guard(folder: Path, tokenizer: Path) -> None:
    """A generative guard that writes one word, whatever it reads."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)


@pytest.mark.slow
def test_safety_fluency_and_time_have_a_row_for_every_method(clone):
    report = json.loads((clone / "runs" / "table" / "report.json").read_text())
    text = json.dumps(report)
    found = chosen(clone)
    assert found.keys() == {"none", "system_prompt", "actadd", "omp", "daco"}
    for variant in found.values():
        assert variant in text
    place, daco = clone / "runs" / "table" / "test", found["daco"]
    for benchmark in ("mm_safetybench", "jailbreakv"):
        for judge in ("refusal", "guard"):
            verdicts = place / "verdicts" / judge / benchmark / f"{daco}-s0.jsonl"
            rows = [json.loads(line) for line in verdicts.read_text().splitlines()[1:]]
            assert len(rows) == 3
    assert (place / "timing" / f"{daco}.jsonl").is_file()
    answers = (place / "answers" / "mm_safetybench").glob("*.jsonl")
    texts = {
        file.stem: [json.loads(row)["text"] for row in file.read_text().splitlines()[1:]] for file in answers
    }
    assert texts["none-s0"] != texts[f"{daco}-s0"]
    run = json.loads((place / "run.json").read_text())
    assert run["benchmarks"]["jailbreakv"]["version"] == "28K full"


def chosen(clone: Path) -> dict[str, str]:
    """Method → the variant that runs on the test part."""
    record = json.loads((clone / "runs" / "table" / "chosen.json").read_text())
    (row,) = record["chosen"].values()
    return row


@pytest.mark.slow
def test_mmmu_runs_under_the_packs_of_the_evaluation(clone):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-evaluation-harness is not here; make test-lmeval brings it")
    write_mmmu(clone / "MMMU" / "MMMU")
    sh(smaller(blocks()[2], MMMU_SMALLER), clone)
    for variant in ("none", "system_prompt", "daco@0.05"):
        (file,) = (clone / "runs" / "table" / "mmmu" / variant).rglob("results_*.json")
        told = json.loads(file.read_text())
        assert 0 <= told["results"]["mmmu_val_science"]["acc,none"] <= 1
        assert told["config"]["policy"] == (variant if "@" in variant else "off")
