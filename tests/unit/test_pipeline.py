"""Builds: configurations that are refused, steps that run, are skipped, go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from daco_rt._files import sha256_file
from daco_rt.errors import DacoError
from daco_rt.pipeline import build, plan, read_config
from daco_rt.pipeline.steps import Step

GOOD = """
version: 1
model: pocket-internvl
blocks: 2-3
concepts: {size: 24}
stimuli: {count: 4}
sae: {blocks: 3, k: 4, steps: 20, batch: 64, lr: 1}
packs:
  default: {policies: p.yaml}
  latents: {policies: p.yaml, source: sae}
"""


def write(folder: Path, text: str) -> Path:
    (folder / "c.yaml").write_text(text)
    return folder / "c.yaml"


def test_a_config_is_read_with_its_defaults(tmp_path: Path):
    config = read_config(write(tmp_path, GOOD))
    assert config.blocks == (2, 3)
    assert config.concepts.table == "built-in" and config.concepts.size == 24
    assert config.stimuli.count == 4 and config.stimuli.minimum == 4
    assert config.sae is not None and config.sae.blocks == (3,)
    # A whole number serves where a number is wanted.
    assert config.sae.training.lr == 1.0 and config.sae.training.k == 4
    assert [(name, pack.source) for name, pack in config.packs.items()] == [
        ("default", "dictionary"),
        ("latents", "sae"),
    ]
    assert config.file("p.yaml") == tmp_path / "p.yaml"


@pytest.mark.parametrize(
    "name", ["smol", "smol-small", "smol-saes", "smol-saes-held", "smol-scenes", "internvl3"]
)
def test_the_configs_of_the_repository_are_good(name: str):
    root = Path(__file__).resolve().parents[2]
    config = read_config(root / "configs" / f"{name}.yaml")
    for pack in config.packs.values():
        assert config.file(pack.policies).is_file()


@pytest.mark.parametrize(
    "change, said",
    [
        (("version: 1", "version: 2"), "version must be 1, got 2"),
        (
            ("model: pocket-internvl", "model: 7"),
            "a folder, a hub id or a built-in name, got 7",
        ),
        (("model: pocket-internvl\n", ""), "model is missing"),
        (("model:", "precision: fp8\nmodel:"), "precision 'fp8' is unknown; known: auto, bf16"),
        (("stimuli:", "harvest: {texts: false}\nstimuli:"), "texts is false and there are no pairs"),
        (("blocks: 2-3", "blocks: 3-2"), "blocks must be numbers"),
        (("concepts:", "concept:"), "key 'concept' is unknown; did you mean 'concepts'?"),
        (("size: 24", "sise: 24"), "concepts: key 'sise' is unknown; did you mean 'size'?"),
        (("size: 24", "size: many"), "size must be an integer, got 'many'"),
        (("size: 24", "size: true"), "size must be an integer, got True"),
        (("blocks: 3, k", "blocks: 5, k"), "block 5 is not among the build's blocks [2, 3]"),
        (("k: 4", "position: wrd"), "sae: position 'wrd' is unknown; did you mean 'word'?"),
        (("stimuli:", "harvest: {position: wrd}\nstimuli:"), "harvest: position 'wrd' is unknown"),
        (("k: 4", "k: 0"), "sae: k must be an integer of at least 1, got 0"),
        (("steps: 20", "setps: 20"), "did you mean 'steps'?"),
        (("source: sae", "source: sea"), "source 'sea' is unknown; did you mean 'sae'?"),
        (("default: {policies: p.yaml}", "../x: {policies: p.yaml}"), "must be a plain word"),
        (("default: {policies: p.yaml}", "default: {}"), "pack 'default': policies is missing"),
        (("  default: {", "  latents: {"), "'latents' comes twice"),
        (("version: 1", "version: ["), "cannot be read as YAML"),
    ],
)
def test_bad_configs_are_refused(tmp_path: Path, change: tuple[str, str], said: str):
    assert change[0] in GOOD
    with pytest.raises(DacoError) as error:
        read_config(write(tmp_path, GOOD.replace(*change)))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_annotate_and_sae_packs_need_saes(tmp_path: Path):
    without = "\n".join(line for line in GOOD.splitlines() if not line.startswith("sae:"))
    with pytest.raises(DacoError, match="pack 'latents': its source is sae, but there is no section sae"):
        read_config(write(tmp_path, without))
    with pytest.raises(DacoError, match="annotate labels SAEs"):
        read_config(write(tmp_path, without + "\nannotate: {eta: 0.2}\n"))


def test_files_that_are_not_there_are_found_before_anything_runs(tmp_path: Path):
    config = read_config(write(tmp_path, GOOD))
    with pytest.raises(DacoError, match=r"step pack default needs .*p\.yaml, which does not exist"):
        build(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Kitchen:
    """Three small steps in a row that write files, and count how often they ran."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[tuple[str, bool]] = []
        self.settings = {"a": {"n": 1}, "b": {"n": 1}, "c": {"n": 1}}
        self.extra = folder / "extra.txt"
        self.extra.write_text("salt")
        self.fail = ""
        monkeypatch.setattr("daco_rt.pipeline.run.steps_of", lambda _config, _host: self.steps())

    def steps(self) -> list[Step]:
        def step(name: str, output: str, inputs: tuple[str, ...], files: tuple[Path, ...] = ()) -> Step:
            def run(at: Path, resume: bool) -> str:
                self.runs.append((name, resume))
                made = at / output
                if made.suffix:
                    # The result of step a does not depend on its second setting.
                    made.write_text(f"{name} {self.settings[name]['n']}")
                else:
                    made.mkdir(exist_ok=True)
                    (made / "part.json").write_text(f"{self.settings[name]['n']}")
                    (made / "rows.bin").write_bytes(bytes(100))
                if self.fail == name:
                    raise DacoError("the pan is hot")
                return f"{name} done"

            return Step(name, output, inputs, files, self.settings[name], run)

        return [
            step("a", "a.txt", ()),
            step("b", "deep/b", ("a.txt",), (self.extra,)),
            step("c", "c.txt", ("deep/b",)),
        ]

    def ran(self) -> list[str]:
        names = [name for name, _ in self.runs]
        self.runs.clear()
        return names


@pytest.fixture
def kitchen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kitchen:
    return Kitchen(tmp_path, monkeypatch)


def test_only_what_changed_runs_again(tmp_path: Path, kitchen: Kitchen):
    config, out = read_config(write(tmp_path, GOOD)), tmp_path / "out"
    assert [row.state for row in plan(config, out)] == ["to do"] * 3
    assert not out.exists()
    build(config, out)
    assert kitchen.ran() == ["a", "b", "c"]
    assert [row.state for row in build(config, out).steps] == ["up to date"] * 3
    assert kitchen.ran() == []

    kitchen.settings["b"]["n"] = 2
    assert [row.state for row in plan(config, out)] == ["up to date", "to do", "to do"]
    build(config, out)
    assert kitchen.ran() == ["b", "c"]

    kitchen.extra.write_text("pepper")
    build(config, out)
    # b comes out as before, so c is left alone.
    assert kitchen.ran() == ["b"]

    kitchen.settings["a"]["other"] = 5
    build(config, out)
    assert kitchen.ran() == ["a"]

    (out / "c.txt").write_text("tampered")
    build(config, out)
    assert kitchen.ran() == ["c"]

    (out / "deep" / "b" / "part.json").unlink()
    build(config, out, until="b")
    assert kitchen.ran() == ["b"]

    build(config, out, force=True)
    assert kitchen.ran() == ["a", "b", "c"]


@pytest.mark.parametrize("damage", ["cut short", "flipped", "gone", "more"])
def test_damage_to_any_file_of_a_result_is_found(tmp_path: Path, kitchen: Kitchen, damage: str):
    config, out = read_config(write(tmp_path, GOOD)), tmp_path / "out"
    build(config, out)
    rows = out / "deep" / "b" / "rows.bin"
    if damage == "cut short":
        os.truncate(rows, 99)
    elif damage == "flipped":
        rows.write_bytes(bytes(50) + b"x" + bytes(49))
    elif damage == "gone":
        rows.unlink()
    else:
        (rows.parent / "left.bin").write_bytes(b"")
    assert [row.state for row in plan(config, out)] == ["up to date", "to do", "to do"]
    kitchen.ran()
    build(config, out)
    # It comes out as it was, so what was made of it stays.
    assert kitchen.ran() == ["b"] and {file.name for file in rows.parent.iterdir()} == {
        "part.json",
        rows.name,
    }


def test_a_copied_build_is_up_to_date_and_an_untouched_one_is_not_read(
    tmp_path: Path, kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch
):
    config, out = read_config(write(tmp_path, GOOD)), tmp_path / "out"
    build(config, out)
    for place in (out, tmp_path / "copy"):
        if place != out:
            shutil.copytree(out, place, copy_function=shutil.copyfile)
        read: list[Path] = []
        monkeypatch.setattr(
            "daco_rt.pipeline.run.sha256_file", lambda file, read=read: read.append(file) or sha256_file(file)
        )
        assert {row.state for row in build(config, place).steps} == {"up to date"}
        # Files from elsewhere have no stamp.
        assert (set(read) == {kitchen.extra}) == (place == out)


def test_an_unfinished_step_goes_on_and_one_of_other_settings_starts_afresh(tmp_path: Path, kitchen: Kitchen):
    config, out = read_config(write(tmp_path, GOOD)), tmp_path / "out"
    kitchen.fail = "b"
    with pytest.raises(DacoError, match="the pan is hot"):
        build(config, out)
    kitchen.fail = ""
    assert [row.state for row in plan(config, out)] == ["up to date", "goes on", "to do"]
    (out / "deep" / "b" / "left.json").write_text("half")
    build(config, out)
    assert kitchen.runs == [("a", False), ("b", False), ("b", True), ("c", False)]
    assert (out / "deep" / "b" / "left.json").exists()

    kitchen.runs.clear()
    kitchen.fail = "b"
    kitchen.settings["b"]["n"] = 2
    with pytest.raises(DacoError):
        build(config, out)
    kitchen.fail = ""
    kitchen.settings["b"]["n"] = 3
    build(config, out)
    assert kitchen.runs == [("b", False), ("b", False), ("c", False)]
    assert not (out / "deep" / "b" / "left.json").exists()


def test_unknown_steps_and_damaged_states_are_refused(tmp_path: Path, kitchen: Kitchen):
    config, out = read_config(write(tmp_path, GOOD)), tmp_path / "out"
    with pytest.raises(DacoError, match="there is no step 'd'; known: a, b, c"):
        build(config, out, until="d")
    build(config, out)
    (out / "build.json").write_text("{")
    with pytest.raises(DacoError, match=r"build\.json cannot be read .* remove it"):
        build(config, out)


def test_two_builds_do_not_share_a_folder(tmp_path: Path, kitchen: Kitchen):
    config, out = read_config(write(tmp_path, GOOD)), tmp_path / "out"
    out.mkdir()
    held = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time\n"
            f"lock = open({str(out / '.lock')!r}, 'w')\n"
            "fcntl.flock(lock, fcntl.LOCK_EX)\n"
            "print('held', flush=True)\n"
            "time.sleep(60)\n",
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert held.stdout is not None and held.stdout.readline() == b"held\n"
        with pytest.raises(DacoError, match="another build is at work"):
            build(config, out)
        assert kitchen.ran() == []
    finally:
        os.kill(held.pid, signal.SIGKILL)
        held.wait()
    # The lock went with its holder.
    build(config, out)
    assert kitchen.ran() == ["a", "b", "c"]
    assert set(json.loads((out / "build.json").read_bytes())["steps"]) == {"a", "b", "c"}
