"""Pack folders: damage is named, old packs survive a failed write, and the module stays light."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pack_arguments import arguments

from daco_rt.artifacts import load_pack, read_header, save_pack
from daco_rt.artifacts.concept import read_concepts
from daco_rt.artifacts.manifest import encode_manifest
from daco_rt.errors import ArtifactError, PolicyError


def rewrite(path: Path, name: str, data: bytes) -> None:
    """Replace bytes inside steering.safetensors and mend the hashes, as a careless other writer would."""
    file = path / "steering.safetensors"
    ref = read_header(file)[name]
    raw = bytearray(file.read_bytes())
    raw[ref.offset : ref.offset + len(data)] = data
    file.write_bytes(raw)
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest.pop("checksum")
    manifest["files"]["steering.safetensors"]["sha256"] = hashlib.sha256(raw).hexdigest()
    (path / "manifest.json").write_bytes(encode_manifest(manifest))


def test_loading_checks_values_too(tmp_path: Path) -> None:
    path = save_pack(tmp_path / "p", **arguments()).path
    rewrite(path, "block.3.dec", np.float32(np.nan).tobytes())
    with pytest.raises(ArtifactError, match=r"block 3: 'dec' holds a value that is nan at \[0, 0\]"):
        load_pack(path)
    load_pack(path, verify=False)
    rewrite(path, "block.3.dec", np.float32(0).tobytes())
    rewrite(path, "block.1.undesirable", b"\x02")
    with pytest.raises(ArtifactError, match="'undesirable' holds a value that is neither 0 nor 1"):
        load_pack(path)
    rewrite(path, "block.1.undesirable", b"\x01")
    rewrite(path, "slot_map", np.int32(2).tobytes())
    with pytest.raises(ArtifactError, match="slot 0 to 0"):
        load_pack(path, verify=False)


@pytest.mark.parametrize("name", ["steering.safetensors", "concepts.jsonl", "manifest.json"])
def test_a_flipped_byte_names_its_file(tmp_path: Path, name: str) -> None:
    path = save_pack(tmp_path / "p", **arguments()).path
    good = (path / name).read_bytes()
    for index in range(0, len(good) - 1, max(1, len(good) // 40)):
        bad = bytearray(good)
        bad[index] ^= 0x04
        (path / name).write_bytes(bad)
        with pytest.raises(ArtifactError, match=name):
            load_pack(path)
    (path / name).write_bytes(good)
    load_pack(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": 99}, "k = 99 is larger"),
        ({"coder": "omp"}, "coder of sae"),
        ({"op": "pursuit", "coder": "omp"}, "unknown operand 'dec'"),
        ({"op": ["sae"]}, "op must be"),
        ({"dim": 13}, r"are \(9, 12, 4, 'fp32'\), manifest.json says \(9, 13, 4, 'fp32'\)"),
        ({"blocks": [1], "median_norm": {"1": 1.0}}, "unexpected tensor 'block.3."),
        ({"blocks": [1, 2, 3]}, "median_norm"),
        ({"blocks": [3, 1]}, "unique ascending"),
        ({"blocks": None}, "missing or of another type"),
        ({"policies": [{"name": "x"}]}, "missing or of another type"),
        ({"policies": [{"name": "x", "slot": "2", "positions": "all", "blocks": [1]}]}, "must have a slot"),
        ({"default_policy": "x"}, "default policy 'x' does not exist"),
        ({"model": {}}, "model identity must hold hidden_size"),
        ({"median_norm": [1]}, "missing or of another type"),
    ],
)
def test_a_manifest_that_contradicts_the_tensors(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = save_pack(tmp_path / "p", **arguments()).path
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest.pop("checksum")
    (path / "manifest.json").write_bytes(encode_manifest({**manifest, **changes}))
    with pytest.raises((ArtifactError, PolicyError), match=words):
        load_pack(path)


def test_bad_concept_lines_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "concepts.jsonl"
    for line in (
        '{"index": 1',
        '{"name": "x"}',
        '{"index": "1", "name": "x"}',
        '{"index": 1, "name": 3}',
        "[1]",
        "",
    ):
        file.write_text('{"index": 0, "name": "a"}\n' + line + "\n" + '{"index": 2, "name": "c"}\n')
        with pytest.raises(ArtifactError, match=r"concepts\.jsonl, line 2"):
            read_concepts(file, 5)
    file.write_text("")
    assert read_concepts(file, 5) == ()


def test_overwrite(tmp_path: Path) -> None:
    save_pack(tmp_path / "p", **arguments())
    with pytest.raises(ArtifactError, match="already exists; pass --force"):
        save_pack(tmp_path / "p", **arguments(seed=5))
    old = load_pack(tmp_path / "p")
    kept = old.operands(1)["enc"]
    save_pack(tmp_path / "p", **arguments(seed=5), overwrite=True)
    new = load_pack(tmp_path / "p")
    assert new.operands(1)["enc"].tobytes() != kept.tobytes()
    # A pack that is mapped when it is replaced goes on reading what it mapped.
    assert kept.tobytes() == arguments()["operands"][1]["enc"].tobytes()
    assert os.listdir(tmp_path) == ["p"]


def test_a_process_that_hits_its_file_limit_keeps_the_old_pack(tmp_path: Path) -> None:
    code = """
        import resource, sys
        sys.path.insert(0, sys.argv[2])
        from pack_arguments import arguments
        from daco_rt.artifacts import save_pack
        from daco_rt.errors import DacoError
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            save_pack(sys.argv[1], **arguments(seed=9, m=40), overwrite=True)
        except DacoError as error:
            print(error)
    """
    save_pack(tmp_path / "p", **arguments())
    done = subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(code), tmp_path / "p", Path(__file__).parent],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "cannot write" in done.stdout and "file too large" in done.stdout and done.stdout.count("\n") == 1
    assert load_pack(tmp_path / "p").atoms == 9
    assert os.listdir(tmp_path) == ["p"]


def test_importing_artifacts_is_light() -> None:
    code = """
        import sys, daco_rt.artifacts
        print([name for name in ("torch", "transformers", "onnx", "onnxruntime") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
