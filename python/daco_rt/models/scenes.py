"""scenes-internvl: a 5-million-parameter InternVL that sees and describes the pictures of `daco_rt.scenes`.

Its weights come with the package, trained by ``scripts/train_scenes.py`` of the repository; how that
went and how well it sees is in ``training.json`` beside them. It knows a hundred things and a few sentences,
and nothing else: what steering does to it can be counted, what that means for a large model cannot.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from daco_rt._files import sha256_file
from daco_rt.artifacts.tensors import from_array, write_safetensors
from daco_rt.errors import CheckpointError
from daco_rt.models.assembly import (
    ensure_built,
    internvl_config,
    is_whole,
    model_folder,
    qwen2_text_config,
    read_halves,
    write_json,
    write_processor,
)
from daco_rt.models.pocket import CHAT_TEMPLATE

NAME = "scenes-internvl"
LICENCE = "Apache-2.0"
DESCRIPTION = "describes scenes of one to three of a hundred things (6 blocks, d = 192); knows nothing else"
ASSETS = Path(__file__).parent / "assets" / "scenes"

WIDTH, INNER, BLOCKS, HEADS, KV_HEADS = 192, 512, 6, 4, 2
MAX_POSITIONS = 512
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""The first tokens; those of pictures follow in the order of `IMAGE_SPECIALS`."""
_END_OF_TEXT, _END, _IMAGE = 0, 2, 5


def ensure(name: str = NAME, *, progress: bool = True) -> Path:
    """Return the folder of scenes-internvl, building it on first use.

    Parameters
    ----------
    name : str
        ``"scenes-internvl"``.
    progress : bool
        Say on standard error that it is built.

    Returns
    -------
    pathlib.Path
        A Hugging Face checkpoint folder: ``config.json``, ``model.safetensors`` (fp32), tokenizer, processor.

    Raises
    ------
    CheckpointError
        If the package lacks its weights.
    ArtifactError
        If the disk refuses the data.

    Example
    -------
    >>> (ensure("scenes-internvl", progress=False) / "model.safetensors").exists()  # doctest: +SKIP
    True
    """
    if name != NAME:
        raise ValueError(f"ensure: name must be {NAME!r}, got {name!r}")
    recipe = _recipe()
    if not is_whole(model_folder(NAME), recipe) and progress:
        print(f"{NAME}: building {model_folder(NAME)} …", file=sys.stderr, flush=True)
    return ensure_built(NAME, recipe, _build)


def is_built() -> bool:
    """Whether a whole scenes-internvl lies in the cache."""
    return is_whole(model_folder(NAME), _recipe())


def write_frame(folder: Path, tokenizer: Path) -> None:
    """Write everything of the checkpoint but its weights: configuration, tokenizer, processor."""
    from tokenizers import Tokenizer

    text = qwen2_text_config(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        heads=(HEADS, KV_HEADS),
        vocab_size=Tokenizer.from_file(str(tokenizer)).get_vocab_size(),
        max_positions=MAX_POSITIONS,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        special_ids=(None, _END, _END_OF_TEXT),
    )
    write_json(folder / "config.json", internvl_config(text, _IMAGE))
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    write_processor(
        folder,
        chat_template=CHAT_TEMPLATE,
        begin=None,
        end="<|im_end|>",
        pad="<|endoftext|>",
        unknown=None,
        max_length=MAX_POSITIONS,
        end_ids=[_END],
        begin_id=None,
        pad_id=_END_OF_TEXT,
    )


def _recipe() -> dict[str, Any]:
    try:
        digests = {name: sha256_file(ASSETS / name) for name in ("tokenizer.json", "weights.safetensors")}
    except OSError as error:
        raise CheckpointError(
            f"{ASSETS} cannot be read ({error.strerror}); install the package again"
        ) from error
    return {"name": NAME, "version": 1, "sha256": digests}


def _build(folder: Path) -> None:
    write_frame(folder, ASSETS / "tokenizer.json")
    stored = read_halves(ASSETS / "weights.safetensors")
    write_safetensors(folder / "model.safetensors", ((name, from_array(array)) for name, array in stored))
