"""pocket-internvl: a 5-million-parameter InternVL of seeded noise, made in a fraction of a second.

It says nothing sensible. It exists so that every path, from processor to steered answer, can be run
anywhere, at once and always with the same bytes.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from daco_rt.artifacts.tensors import from_array, write_safetensors
from daco_rt.errors import CheckpointError
from daco_rt.models.assembly import (
    ensure_built,
    internvl_config,
    is_whole,
    model_folder,
    qwen2_text_config,
    write_json,
    write_processor,
)
from daco_rt.models.seeded import fan_in, near_normal, vision_tensors

NAME = "pocket-internvl"
LICENCE = "Apache-2.0"
DESCRIPTION = "seeded noise in InternVL's shape (6 blocks, d = 192), for tests and trying commands out"

WIDTH, INNER, BLOCKS, HEADS, KV_HEADS, VOCABULARY = 192, 512, 6, 4, 2, 2000
MAX_POSITIONS = 2048
_SEED = 7
_EMBEDDING_STD = 0.25
_END_OF_TEXT, _BEGIN, _END, _IMAGE = 0, 1, 2, 5
_TOKENIZER = Path(__file__).parent / "assets" / "pocket" / "tokenizer.json"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def ensure(name: str = NAME, *, progress: bool = True) -> Path:
    """Return the folder of pocket-internvl, building it on first use.

    Parameters
    ----------
    name : str
        ``"pocket-internvl"``.
    progress : bool
        Say on standard error that it is built.

    Returns
    -------
    pathlib.Path
        A Hugging Face checkpoint folder: ``config.json``, ``model.safetensors`` (fp32), tokenizer, processor.

    Raises
    ------
    CheckpointError
        If the package lacks its tokenizer.
    ArtifactError
        If the disk refuses the data.

    Example
    -------
    >>> (ensure("pocket-internvl", progress=False) / "model.safetensors").exists()
    True
    """
    if name != NAME:
        raise ValueError(f"ensure: name must be {NAME!r}, got {name!r}")
    recipe = _recipe()
    if not is_whole(model_folder(NAME), recipe) and progress:
        print(f"{NAME}: building {model_folder(NAME)} …", file=sys.stderr, flush=True)
    return ensure_built(NAME, recipe, _build)


def is_built() -> bool:
    """Whether a whole pocket-internvl lies in the cache."""
    return is_whole(model_folder(NAME), _recipe())


def _recipe() -> dict[str, object]:
    try:
        tokenizer = hashlib.sha256(_TOKENIZER.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"{_TOKENIZER} cannot be read ({error.strerror}); install the package again"
        ) from error
    return {"name": NAME, "version": 1, "seed": _SEED, "tokenizer_sha256": tokenizer}


def _build(folder: Path) -> None:
    text = qwen2_text_config(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        heads=(HEADS, KV_HEADS),
        vocab_size=VOCABULARY,
        max_positions=MAX_POSITIONS,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        special_ids=(None, _END, _END_OF_TEXT),
    )
    write_json(folder / "config.json", internvl_config(text, _IMAGE))
    (folder / "tokenizer.json").write_bytes(_TOKENIZER.read_bytes())
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
    norm = _EMBEDDING_STD * math.sqrt(WIDTH)
    tensors = [*_text_tensors(), *vision_tensors(WIDTH, norm, seed=_SEED)]
    write_safetensors(folder / "model.safetensors", ((name, from_array(array)) for name, array in tensors))


def _text_tensors() -> Iterator[tuple[str, np.ndarray]]:
    root = "language_model.model."
    # Small beside what six blocks add: with tied embeddings a stream full of its own token only echoes it.
    name = root + "embed_tokens.weight"
    yield name, near_normal(name, (VOCABULARY, WIDTH), _EMBEDDING_STD, seed=_SEED)
    head = WIDTH // HEADS
    for layer in range(BLOCKS):
        block = f"{root}layers.{layer}."
        for part, rows, gain in (
            # Sharper than unit attention scores, so that positions differ in what they gather.
            ("q_proj", HEADS * head, 1.5),
            ("k_proj", KV_HEADS * head, 1.5),
            ("v_proj", KV_HEADS * head, 1.0),
        ):
            yield (
                (weight := f"{block}self_attn.{part}.weight"),
                fan_in(weight, (rows, WIDTH), gain=gain, seed=_SEED),
            )
            yield (bias := f"{block}self_attn.{part}.bias"), near_normal(bias, (rows,), 0.1, seed=_SEED)
        for part, shape in (
            ("self_attn.o_proj", (WIDTH, HEADS * head)),
            ("mlp.gate_proj", (INNER, WIDTH)),
            ("mlp.up_proj", (INNER, WIDTH)),
            ("mlp.down_proj", (WIDTH, INNER)),
        ):
            yield (weight := f"{block}{part}.weight"), fan_in(weight, shape, seed=_SEED)
        for part in ("input_layernorm", "post_attention_layernorm"):
            yield (weight := f"{block}{part}.weight"), 1 + near_normal(weight, (WIDTH,), 0.1, seed=_SEED)
    yield (weight := root + "norm.weight"), 1 + near_normal(weight, (WIDTH,), 0.1, seed=_SEED)
