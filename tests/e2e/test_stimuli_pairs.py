"""``daco-rt stimuli --corpus``: from a TSV and a folder of pictures to a table of pairs, as a user runs
it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from daco_rt.cli import main
from daco_rt.concepts import WordConcept, save_table
from daco_rt.corpus import load_image, load_pairs, metadata

pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra 'corpus')")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from corpus_models import save_embedder
from corpus_samples import picture

PROBLEMS = {"line is not caption and url": 1, "picture broken": 1}
NAMES = ("dagger", "soup", "truck", "house", "lake")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A concept table, forty pairs of which one picture is broken, and a tiny CLIP."""
    path = tmp_path_factory.mktemp("stimuli")
    save_table((WordConcept(f"{name}.n.01", name, topic="artifact") for name in NAMES), path / "table.jsonl")
    (path / "images").mkdir()
    lines = []
    for i in range(40):
        picture(i, (16 + i, 20)).save(path / "images" / f"{i}.png")
        lines.append(
            f"a {('old', 'red', 'big', 'new')[i // 5 % 4]} {NAMES[i % 5]} {'x' * (i // 20)}\thttp://x/{i}\n"
        )
    (path / "images" / "7.png").write_bytes(b"broken")
    (path / "t.tsv").write_text("".join(lines) + "no address\n")
    save_embedder(path / "clip", "clip")
    save_embedder(path / "bert", "bert")
    return path


def run(place: Path, output: Path, *options: str) -> int:
    corpus = ["--corpus", f"cc3m:{place / 't.tsv'}", "--images", str(place / "images")]
    return main(["stimuli", str(place / "table.jsonl"), *corpus, "--output", str(output), *options])


def test_pairs_by_joint_distance(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "p.parquet"
    options = ("--embedder", str(place / "clip"), "--count", "5", "--minimum", "2", "--json")
    assert run(place, output, *options) == 0
    said = json.loads(capsys.readouterr().out)
    table = load_pairs(output)
    assert said["pairs"] == table.num_rows > 0 and said["problems"] == PROBLEMS
    rows = table.to_pylist()
    assert "7" not in {row["pair"] for row in rows}
    for sign in (1, -1):
        assert all(
            row["score"] > 0 and 0 < row["image_similarity"] < 1 for row in rows if row["sign"] == sign
        )
    by_concept: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_concept.setdefault(row["concept"], []).append(row)
    for name, found in ((NAMES[i], found) for i, found in by_concept.items()):
        near = [row["score"] for row in found if row["sign"] > 0]
        far = [row["score"] for row in found if row["sign"] < 0]
        assert near == sorted(near) and max(near) < min(far) and {row["name"] for row in found} == {name}
    assert load_image(table, rows[0]["image"]).size[0] == 16 + int(rows[0]["pair"])
    assert metadata(table)["corpus"]["kind"] == "cc3m"
    assert (tmp_path / "p.embeddings").is_dir() and not (tmp_path / "p.retrieval").exists()
    assert "picture broken" in (tmp_path / "p.problems.jsonl").read_text()
    before = output.read_bytes()
    assert run(place, output, *options) == 2 and "already exists" in capsys.readouterr().err
    assert run(place, output, *options, "--force") == 0 and output.read_bytes() == before
    assert json.loads(capsys.readouterr().out)["problems"] == PROBLEMS
    other = ("--embedder", str(place / "clip"), "--embeddings", str(tmp_path / "p.embeddings"))
    assert run(place, tmp_path / "q.parquet", *other, "--minimum", "2", "--gloss", "--seed", "3") == 0
    assert "wrote" in capsys.readouterr().out


def test_an_interrupted_run_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from daco_rt.corpus import retrieve

    options = ("--embedder", str(place / "clip"), "--count", "5", "--minimum", "2")
    assert run(place, tmp_path / "whole.parquet", *options) == 0

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(retrieve, "nearest_pairs", interrupted)
        assert run(place, tmp_path / "p.parquet", *options) == 130
    assert not (tmp_path / "p.parquet").exists() and (tmp_path / "p.embeddings" / "complete.json").is_file()
    capsys.readouterr()
    assert run(place, tmp_path / "p.parquet", *options) == 0
    assert load_pairs(tmp_path / "p.parquet").equals(load_pairs(tmp_path / "whole.parquet"))


def test_pairs_by_words(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "p.parquet"
    assert run(place, output, "--retriever", "lexical", "--minimum", "2") == 0
    said = capsys.readouterr().out
    assert "skipped: 1 × picture broken" in said and "of 5 concepts" in said
    table = load_pairs(output)
    assert {(row["start"] >= 0) == (row["sign"] > 0) for row in table.to_pylist()} == {True}


def test_text_alone_with_a_sentence_embedder(place: Path, tmp_path: Path):
    text = tmp_path / "t.txt"
    text.write_text(
        "".join(line.split("\t")[0] + "\n" for line in (place / "t.tsv").read_text().splitlines())
    )
    arguments = [
        "stimuli",
        str(place / "table.jsonl"),
        "--corpus",
        f"text:{text}",
        "--embedder",
        str(place / "bert"),
    ]
    assert main([*arguments, "--minimum", "2", "--output", str(tmp_path / "p.parquet")]) == 0
    rows = load_pairs(tmp_path / "p.parquet").to_pylist()
    assert {row["image"] for row in rows} == {""} and {row["image_similarity"] for row in rows} == {None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --embedder"),
        (("--embedder", "{bert}"), "embeds texts only"),
        (("--embedder", "./none"), "is not a folder"),
        (("--embedder", "{clip}", "--prompt", "a {thing}"), "no template"),
        (("--embedder", "{clip}", "--device", "nonsense"), "device"),
        (("--embedder", "{clip}", "--batch", "0"), "batch must be at least 1"),
        (("--retriever", "lexical", "--embedder", "{clip}"), "--embedder is of the clip retriever"),
        (("--retriever", "lexical", "--count", "0"), "minimum of pairs"),
        (("--kind", "sentence"), "of texts"),
        (("--naming", "md4"), "did you mean 'md5'"),
        (("--caption-column", "x"), "takes no option"),
        (("--output", "p.jsonl"), "ending in .parquet"),
    ],
)
def test_bad_input_ends_with_one_sentence(
    place: Path, tmp_path: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    filled = [
        option.format(clip=place / "clip", bert=place / "bert") if option[0] == "{" else option
        for option in options
    ]
    assert run(place, tmp_path / "p.parquet", *filled) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said and said.startswith("daco-rt: error: ")
    assert not list(tmp_path.glob("*.parquet"))


def test_options_of_pairs_need_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["stimuli", "built-in", "--output", str(tmp_path / "t.jsonl"), "--seed", "3"]) == 2
    assert "--seed is of pairs" in capsys.readouterr().err
