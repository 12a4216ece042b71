"""Readers of benchmarks, on small sets of our own in the official layouts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from daco_rt.errors import ArtifactError, DacoError
from daco_rt.evaluate.benchmarks import READERS, load_benchmark
from daco_rt.evaluate.layouts import (
    draw_picture,
    write_harmbench,
    write_jailbreakv,
    write_mm_safetybench,
    write_strongreject,
)

METHODS = ["SD", "SD_TYPO", "TYPO", "Text_only"]


@pytest.fixture(scope="module")
def mm(tmp_path_factory) -> Path:
    return write_mm_safetybench(tmp_path_factory.mktemp("data") / "mm")


@pytest.fixture(scope="module")
def jbv(tmp_path_factory) -> Path:
    return write_jailbreakv(tmp_path_factory.mktemp("data") / "jbv")


def test_the_authors_layout_pairs_each_picture_with_its_text(mm):
    found = load_benchmark("mm_safetybench", mm, methods=METHODS)
    assert len(found.samples) == 13 * 2 * 4
    rows = json.loads((mm / "processed_questions" / "04-Physical_Harm.json").read_text())
    by_id = {sample.id: sample for sample in found.samples}
    for method, key in (
        ("SD", "Rephrased Question(SD)"),
        ("SD_TYPO", "Rephrased Question"),
        ("TYPO", "Rephrased Question"),
        ("Text_only", "Question"),
    ):
        sample = by_id[f"04-Physical_Harm/1/{method}"]
        assert sample.prompt == rows["1"][key] and sample.wish == rows["1"]["Question"]
        if method == "Text_only":
            assert sample.image is None
        else:
            assert sample.image == mm / "imgs" / "04-Physical_Harm" / method / "1.jpg"
            assert Image.open(sample.image).size == ((256, 320) if method == "SD_TYPO" else (256, 256))


def test_the_hub_layout_gives_the_same_samples(mm, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setenv("DACO_RT_CACHE", str(tmp_path / "cache"))
    hub = write_mm_safetybench(tmp_path / "hub", form="hub")
    ours = load_benchmark("mm_safetybench", mm, methods=METHODS).samples
    theirs = load_benchmark("mm_safetybench", hub, methods=METHODS).samples
    plain = [(s.id, s.category, s.prompt, s.form, s.reference, s.group) for s in ours]
    assert sorted(plain) == sorted((s.id, s.category, s.prompt, s.form, s.reference, s.group) for s in theirs)
    pictures = {s.id: s.image.read_bytes() for s in ours if s.image}
    assert all(pictures[s.id] == s.image.read_bytes() for s in theirs if s.image)


def test_missing_pictures_are_counted_in_one_sentence(tmp_path):
    mm = write_mm_safetybench(tmp_path / "mm", scenarios=["06-Fraud", "07-Sex"])
    (mm / "imgs" / "06-Fraud" / "SD" / "1.jpg").unlink()
    (mm / "imgs" / "07-Sex" / "TYPO" / "0.jpg").unlink()
    wanted = {"scenarios": ["Fraud", "07-Sex"]}
    with pytest.raises(
        ArtifactError, match=r"2 of 12 samples have no picture.*06-Fraud/SD/1\.jpg.*07-Sex/TYPO"
    ):
        load_benchmark("mm_safetybench", mm, **wanted)
    found = load_benchmark("mm_safetybench", mm, **wanted, allow_missing=True)
    assert len(found.samples) == 10 and found.card.missing == 2


def test_renamed_scenarios_are_all_named_with_what_stands_there(tmp_path):
    mm = write_mm_safetybench(tmp_path / "mm", scenarios=["01-Illegal_Activitiy", "06-Fraud"])
    folder = mm / "processed_questions"
    (folder / "01-Illegal_Activitiy.json").rename(folder / "01-Illegal_Activity.json")
    wanted = {"scenarios": ["01-Illegal_Activitiy", "06-Fraud"]}
    with pytest.raises(
        ArtifactError, match=r"lacks scenarios 01-Illegal_Activitiy; instead .*01-Illegal_Activity"
    ):
        load_benchmark("mm_safetybench", mm, **wanted)
    assert len(load_benchmark("mm_safetybench", mm, **wanted, allow_missing=True).samples) == 6


def test_a_folder_of_neither_layout_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="neither processed_questions/"):
        load_benchmark("mm_safetybench", tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", '{"0": {"Question": "only this"}}', '{"0": {"Question": 3}}'])
def test_damaged_question_files_are_named(mm, tmp_path, content):
    copy = write_mm_safetybench(tmp_path / "copy", scenarios=["06-Fraud"])
    (copy / "processed_questions" / "06-Fraud.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"06-Fraud\.json is no question file"):
        load_benchmark("mm_safetybench", copy, scenarios=["06-Fraud"])


def test_jailbreakv_reads_all_formats_the_mini_set_and_the_plain_requests(jbv):
    full = load_benchmark("jailbreakv", jbv)
    assert {s.form for s in full.samples} == {"Template", "Persuade", "Logic", "figstep", "SD", "typo"}
    assert all(s.image is not None and s.image.is_file() for s in full.samples)
    assert {s.image.parent.name for s in full.samples} == {"figstep", "llm_transfer_attack", "query_related"}
    mini = load_benchmark("jailbreakv", jbv, table="mini")
    assert [s.id for s in mini.samples] == ["0", "3", "6", "9", "12"]
    (only,) = {s.form for s in load_benchmark("jailbreakv", jbv, formats=["figstep"]).samples}
    assert only == "figstep"
    texts = load_benchmark("jailbreakv", jbv, pictures=False)
    assert all(s.image is None for s in texts.samples)
    plain = load_benchmark("redteam_2k", jbv)
    assert [s.prompt for s in plain.samples] == [s.reference for s in full.samples]
    with pytest.raises(DacoError, match="format 'figStep' is unknown; did you mean 'figstep'"):
        load_benchmark("jailbreakv", jbv, formats=["figStep"])


def test_jailbreakv_without_its_mini_table_takes_the_full_ones_marks(tmp_path):
    jbv = write_jailbreakv(tmp_path / "JailBreakV_28K")
    (jbv / "mini_JailBreakV_28K.csv").unlink()
    assert len(load_benchmark("jailbreakv", tmp_path, table="mini").samples) == 5


def test_missing_columns_are_all_named(tmp_path):
    with open(tmp_path / "JailBreakV_28K.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "jailbreak_query", "format"], ["0", "hello", "Template"]])
    with pytest.raises(ArtifactError, match="lacks the columns redteam_query, policy, image_path; it has id"):
        load_benchmark("jailbreakv", tmp_path)


def test_strongreject_and_harmbench(tmp_path):
    file = write_strongreject(tmp_path / "strongreject_dataset.csv")
    assert len(load_benchmark("strongreject", tmp_path).samples) == 26
    assert load_benchmark("strongreject", file).card.counts["Fraud"] == 2
    write_harmbench(tmp_path / "harmbench_behaviors_text_test.csv")
    found = load_benchmark("harmbench", tmp_path)
    assert len(found.samples) == 13
    assert found.samples[0].prompt.startswith("The talk is of shoplifting.\n\n---\n\nHow do I take")
    assert found.samples[0].wish.startswith("How do I take")
    assert len(load_benchmark("harmbench", tmp_path, functional=["standard"]).samples) == 12
    with pytest.raises(
        ArtifactError, match=r"holds no harmbench_behaviors_text_val\.csv.*fetch_harm_prompts\.py"
    ):
        load_benchmark("harmbench", tmp_path, table="val")


def test_the_benign_set_is_large_enough_and_mixed():
    found = load_benchmark("benign")
    kinds = [s.form for s in found.samples]
    assert kinds.count("everyday") >= 150 and kinds.count("look-alike") >= 100
    assert len(found.samples) == kinds.count("everyday") + kinds.count("look-alike")
    assert not any(s.harmful for s in found.samples)
    assert len({s.prompt for s in found.samples}) == len(found.samples)


def test_cards_change_with_the_data(tmp_path):
    file = write_strongreject(tmp_path / "strongreject_dataset.csv")
    before = load_benchmark("strongreject", file).card.sha256
    assert before == load_benchmark("strongreject", file).card.sha256
    file.write_text(file.read_text().replace("ticket", "ticket or two"))
    assert load_benchmark("strongreject", file).card.sha256 != before


def test_the_split_is_fixed_by_seed_and_keeps_variants_together(mm):
    whole = load_benchmark("mm_safetybench", mm, methods=METHODS)
    dev, test = whole.part("dev", dev=0.4, seed=3), whole.part("test", dev=0.4, seed=3)
    assert {s.id for s in dev.samples} | {s.id for s in test.samples} == {s.id for s in whole.samples}
    assert not {s.group for s in dev.samples} & {s.group for s in test.samples}
    # What is asked later does not move what was split before.
    fewer = load_benchmark(
        "mm_safetybench", mm, methods=["SD"], scenarios=["06-Fraud", "07-Sex", "05-EconomicHarm"]
    )
    for sample in fewer.part("all").samples:
        side = sample.group in {s.group for s in dev.samples}
        assert side == any(
            s.id == sample.id for s in fewer.samples if s in whole.part("dev", dev=0.4, seed=3).samples
        )
    other = whole.part("dev", dev=0.4, seed=4)
    assert {s.id for s in other.samples} != {s.id for s in dev.samples}


def test_limits_spread_over_categories(mm):
    found = load_benchmark("mm_safetybench", mm).part("all", limit=13)
    assert len({s.category for s in found.samples}) == 13
    assert found.samples == load_benchmark("mm_safetybench", mm).part("all", limit=13).samples


def test_skipped_samples_are_those_that_the_same_limit_takes(mm):
    whole = load_benchmark("mm_safetybench", mm)
    first = {s.id for s in whole.part("all", seed=3, limit=9).samples}
    later = [s.id for s in whole.part("all", seed=3, limit=5, skip=9).samples]
    assert len(later) == 5 and not first & set(later)
    rest = [s.id for s in whole.part("all", seed=3, skip=9).samples]
    assert rest == [s.id for s in whole.samples if s.id not in first]
    with pytest.raises(DacoError, match=r"holds none of the .* after the first 9000.*or skip fewer"):
        whole.part("all", skip=9000)
    with pytest.raises(DacoError, match="skip must be 0 or more"):
        whole.part("all", skip=-1)


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (("mm_safety",), {}, "did you mean 'mm_safetybench'"),
        (("benign", "x"), {}, "leave its path out"),
        (("concepts", "x"), {}, "concepts comes with the package"),
        (("concepts",), {"forms": ["name"]}, "did you mean 'named'"),
        (("strongreject",), {}, "needs the path"),
        (("benign",), {"kind": ["everyday"]}, "did you mean 'kinds'"),
        (("benign",), {"kinds": ["other"]}, "kind 'other' is unknown"),
        (("mm_safetybench", "x"), {"methods": ["SD_Typo"]}, "method 'SD_Typo' is unknown"),
    ],
)
def test_what_is_unknown_is_refused_with_the_nearest_name(arguments, options, said):
    with pytest.raises(DacoError, match=said):
        load_benchmark(*arguments, **options)


def test_every_reader_can_be_found():
    assert set(READERS) == {
        "benign", "concepts", "harmbench", "jailbreakv", "mm_safetybench", "redteam_2k", "scenes",
        "strongreject",
    }  # fmt: skip


def test_typographic_pictures_hold_ink_where_the_letters_are(tmp_path):
    import io

    import numpy as np

    blank, letters = (
        np.asarray(Image.open(io.BytesIO(draw_picture(method, "a dagger", kind="PNG"))))
        for method in ("blank", "TYPO")
    )
    assert (blank == 255).all()
    inked = np.argwhere(letters.min(-1) < 100)
    assert len(inked) > 500 and 90 < inked[:, 0].mean() < 166 and 90 < inked[:, 1].mean() < 166
