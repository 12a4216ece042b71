"""From texts to a labelled SAE and a pack by commands alone, on the pocket model."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daco_rt.artifacts import load_dictionary, load_sae
from daco_rt.cli import main
from daco_rt.concepts import everyday_concepts, make_stimuli, save_stimuli
from daco_rt.dictionary import dictionary_for
from daco_rt.models import pocket
from daco_rt.sae.store import open_store

pytestmark = pytest.mark.slow

QUICK = ["--steps", "30", "--batch", "64", "--k", "4", "--checkpoint-every", "10", "--texts-per-shard", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("sae")
    words = ("dagger", "whiskey", "garden", "river", "bomb", "violin", "bread", "casino")
    lines = [f"<|im_start|>Yesterday we talked about the {w} and the {v}." for w in words for v in words]
    (path / "texts.txt").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DACO_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
        pocket.ensure(progress=False)
        yield path


def run(folder: Path, capsys: Any, *arguments: str) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        status = main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def done(folder: Path, capsys: Any, *arguments: str) -> Any:
    status, out, err = run(folder, capsys, *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


def test_texts_to_saes_to_labels(folder: Path, capsys: Any):
    source = [
        "--checkpoint",
        "pocket-internvl",
        "--texts",
        "texts.txt",
        "--store",
        "store",
        "--blocks",
        "2-3",
    ]
    written = done(folder, capsys, "sae", *source, "--output", "saes", *QUICK)
    assert [Path(row["path"]).name for row in written] == ["block-002", "block-003"]
    assert all({"explained_variance", "l0", "dead_fraction"} <= row.keys() for row in written)
    # A second block of the same store needs no model; live training needs no store.
    again = done(
        folder, capsys, "sae", "--store", "store", "--blocks", "3", "--output", "random", "--init", "random",
        "--latents", "64", *QUICK,
    )  # fmt: skip
    assert len(again) == 1 and load_sae(folder / "random" / "block-003").encoder.shape[0] == 64
    live = [*source[:4], "--blocks", "3", "--output", "live", *QUICK]
    assert len(done(folder, capsys, "sae", *live)) == 1

    jump = done(
        folder,
        capsys,
        "sae",
        "--convert",
        "saes/block-003",
        "--store",
        "store",
        "--output",
        "jump",
        "--rows",
        "200",
    )
    assert jump[0]["loss"] == pytest.approx(jump[0]["ev_topk"] - jump[0]["ev_jumprelu"])
    assert load_sae(folder / "jump").coder == "jumprelu"

    concepts = ["--dictionary", str(dictionary_for("pocket-internvl"))]
    counts = done(folder, capsys, "annotate", "saes/block-003", *concepts, "--eta", "0.0,0.2")["counts"]
    assert counts[0]["undesirable"] >= counts[1]["undesirable"]
    found = done(folder, capsys, "annotate", "jump", *concepts, "--eta", "0.1", "--output", "labelled")
    assert found["written"]["undesirable"] > 0
    assert load_sae(folder / "labelled").annotation
    # A built-in dictionary may be named, and the rule decides what is counted.
    by_name = ["annotate", "saes/block-003", "--dictionary", "pocket-internvl", "--eta", "0.0,0.2"]
    assert done(folder, capsys, *by_name)["counts"] == counts
    assert done(folder, capsys, *by_name, "--rule", "nearest")["counts"] != counts


def test_rows_where_a_dictionary_is_read(folder: Path, capsys: Any):
    texts = ["--texts", "stimuli.jsonl.gz", "--position", "word"]
    made = make_stimuli(everyday_concepts()[:30], count=4)
    save_stimuli(made.stimuli, folder / texts[1])
    source = ["--checkpoint", "pocket-internvl", "--blocks", "3"]
    done(
        folder, capsys, "sae", *source, *texts, "--store", "words", "--output", "held", "--hold",
        "--latents", "512", *QUICK,
    )  # fmt: skip
    assert open_store(folder / "words").rows(3) == len(made.stimuli)
    dictionary = load_dictionary(dictionary_for("pocket-internvl"))
    rows = load_sae(folder / "held" / "block-003").decoder[: dictionary.size]
    atoms = dictionary.atoms(3).astype(np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    assert np.allclose(rows, atoms, atol=1e-6)

    bad = {
        ("--texts", "texts.txt", "--position", "word"): "texts.txt",
        ("--position", "word"): "give --texts of daco-rt stimuli",
        ("--texts", texts[1], "--position", "words"): "position 'words' is unknown; did you mean 'word'?",
        ("--texts", texts[1], "--position", "image"): "position 'image' finds no place in any of the",
    }
    for arguments, said in bad.items():
        status, _, error = run(folder, capsys, "sae", *source, *arguments, "--output", "x", *QUICK)
        assert status == 2 and said in error and error.count("\n") == 1, error
        assert not (folder / "x").exists()
    with_store = ["--store", "words", "--position", "word", "--output", "x", *QUICK]
    status, _, error = run(folder, capsys, "sae", *with_store)
    assert status == 2 and "a store has its rows, so leave it out" in error


def test_a_flipped_byte_in_a_store_is_found_before_training(folder: Path, capsys: Any):
    shutil.copytree(folder / "store", folder / "flipped")
    shard = folder / "flipped" / "block-003" / "00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0x40
    shard.write_bytes(data)
    concepts = ["--dictionary", "pocket-internvl"]
    status, _, error = run(folder, capsys, "sae", "--store", "flipped", "--output", "x", *concepts, *QUICK)
    assert status == 2 and "00001.safetensors is missing or damaged" in error
    assert not (folder / "x").exists()


def test_resume_returns_the_finished_ones(folder: Path, capsys: Any):
    common = ["sae", "--store", "store", "--blocks", "2", "--output", "saes", *QUICK]
    concepts = ["--dictionary", str(dictionary_for("pocket-internvl"))]
    status, _, error = run(folder, capsys, *common, *concepts)
    assert status == 2 and "already exists; pass --force" in error
    before = (folder / "saes" / "block-002" / "manifest.json").read_bytes()
    assert done(folder, capsys, *common, *concepts, "--resume")
    assert (folder / "saes" / "block-002" / "manifest.json").read_bytes() == before


def test_sweep_by_a_command(folder: Path, capsys: Any):
    pytest.importorskip("matplotlib")
    (folder / "score.py").write_text(
        "import json, sys\n"
        "from daco_rt.artifacts import load_pack\n"
        "print('words before the last line')\n"
        "if sys.argv[1] == 'off':\n"
        "    print(json.dumps({'safety': 0.1, 'capability': 1.0}))\n"
        "else:\n"
        "    pack = load_pack(sys.argv[1])\n"
        "    count = int(pack.operands(pack.blocks[0])['undesirable'][2].sum())\n"
        "    print(json.dumps({'safety': count, 'capability': 1 - count / 1000}))\n"
    )
    sweep = [
        "annotate", "saes/block-003", "--dictionary", str(dictionary_for("pocket-internvl")),
        "--eta", "0.1,0.3",
        "--score", f"{sys.executable} score.py", "--results", "sweep.jsonl", "--figure", "sweep.png",
        "--keep-capability", "0.5", "--output", "chosen",
    ]  # fmt: skip
    found = done(folder, capsys, *sweep)
    assert len(found["points"]) == 3 and found["chosen"]["eta"] == 0.1
    assert found["points"][1]["safety"] == found["points"][1]["undesirable"]
    assert found["written"]["undesirable"] == found["points"][1]["undesirable"]
    assert (folder / "sweep.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sae", "--output", "x"], "nothing to train on"),
        (["sae", "--output", "x", "--texts", "texts.txt", "--store", "store"], "give --checkpoint"),
        (["sae", "--output", "x", "--checkpoint", "pocket"], "give --blocks"),
        (["sae", "--output", "x", "--store", "nowhere"], "holds no store.json"),
        (
            ["sae", "--output", "x", "--store", "store", "--blocks", "3-"],
            "--blocks: '3-' is no list of blocks",
        ),
        (["sae", "--output", "x", "--store", "store", "--blocks", "9"], "no block 9; available: 2, 3"),
        (["sae", "--output", "x", "--store", "store"], "no dictionary to start from"),
        (["sae", "--output", "x", "--store", "store", "--k", "0"], "k must be an integer of at least 1"),
        (["sae", "--output", "x", "--convert", "saes/block-003"], "give --store"),
        (
            ["annotate", "saes/block-003", "--dictionary", "DICTIONARY", "--eta", "0.1,0.2", "--output", "y"],
            "several --eta need --score",
        ),
        (
            ["annotate", "saes/block-003", "--dictionary", "DICTIONARY", "--eta", "0.1", "--score", "true"],
            "got 'nothing'",
        ),
        (
            ["annotate", "saes/block-003", "--dictionary", "DICTIONARY", "--eta", "0.1", "--score", "./none"],
            "--score: './none' cannot be run (No such file or directory)",
        ),
        (
            ["annotate", "saes/block-003", "--dictionary", "DICTIONARY", "--eta", "0.1,1.5"],
            "eta is a cosine and must be from -1 to 1, got 1.5",
        ),
    ],
)
def test_bad_input_is_one_sentence(folder: Path, capsys: Any, arguments: list[str], message: str):
    concepts = str(dictionary_for("pocket-internvl"))
    words = [concepts if word == "DICTIONARY" else word for word in arguments]
    status, _, error = run(folder, capsys, *words)
    assert status == 2 and message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n \n", "holds no text"),
        ("latin.txt", b"\xff\xfe", "is not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"no": 1}\n', "line 2: expected"),
        ("bad.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"no": 1}\n'), "line 2: expected"),
        ("cut.txt.gz", gzip.compress(b"a text that was cut short")[:-9], "cannot be read as texts"),
    ],
)
def test_bad_texts_are_named(folder: Path, capsys: Any, name: str, content: bytes, message: str):
    (folder / name).write_bytes(content)
    status, _, error = run(
        folder, capsys, "sae", "--output", "x", "--checkpoint", "pocket", "--blocks", "2", "--texts", name
    )
    assert status == 2 and message in error
