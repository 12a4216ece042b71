"""Where the built-in checkpoints live, how one is put together, and how it is known to be whole.

A finished folder carries ``build.json``: the recipe it came from and the size and SHA-256 of every
file. Reuse costs milliseconds: files that still have the size and time of writing are trusted, any
other one is hashed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from daco_rt._files import atomic_directory, sha256_file
from daco_rt.errors import CheckpointError
from daco_rt.models.seeded import IMAGE_TOKENS, VISION_CONFIG

RECORD = "build.json"
IMAGE_SPECIALS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def cache_root() -> Path:
    """Return the folder for built checkpoints: ``$DACO_RT_CACHE`` or ``~/.cache/daco_rt``."""
    named = os.environ.get("DACO_RT_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "daco_rt"


def model_folder(name: str) -> Path:
    """Return where the checkpoint ``name`` lies once built."""
    return cache_root() / "models" / name


def ensure_built(name: str, recipe: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """Return the folder of ``name``, calling ``build(folder)`` first if it is missing, old or damaged.

    Parameters
    ----------
    name : str
        Name of the checkpoint.
    recipe : mapping
        JSON values that decide the result; another recipe means another build.
    build : callable
        Fills an empty folder. An error leaves the former folder in place, or none.

    Returns
    -------
    pathlib.Path
    """
    folder = model_folder(name)
    if is_whole(folder, recipe):
        return folder
    with atomic_directory(folder, overwrite=True) as partial:
        build(partial)
        files = {}
        for path in sorted(p for p in partial.iterdir() if p.is_file()):
            info = path.stat()
            files[path.name] = {
                "bytes": info.st_size,
                "mtime_ns": info.st_mtime_ns,
                "sha256": sha256_file(path),
            }
        write_json(partial / RECORD, {"recipe": dict(recipe), "files": files})
    return folder


def is_whole(folder: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether ``folder`` holds every file of a finished build of ``recipe``, unchanged."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        if record["recipe"] != json.loads(json.dumps(dict(recipe))):
            return False
        for name, known in record["files"].items():
            path = folder / name
            info = path.stat()
            if info.st_size != known["bytes"]:
                return False
            if info.st_mtime_ns != known["mtime_ns"] and sha256_file(path) != known["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_halves(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the fp16 tensors of a file in the package as fp32, in which the CPU computes.

    Raises
    ------
    CheckpointError
        If the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - this is no dict
                yield name, file.get_tensor(name).astype(np.float32)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); install the package again") from error


def internvl_config(text: Mapping[str, Any], image_token_id: int) -> dict[str, Any]:
    """Return the ``config.json`` of an InternVL with the seeded tower and the text model ``text``."""
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "dtype": "float32",
        "downsample_ratio": 0.5,
        "image_seq_length": IMAGE_TOKENS,
        "image_token_id": image_token_id,
        "projector_hidden_act": "gelu",
        "text_config": {"architectures": ["Qwen2ForCausalLM"], **text},
        "tie_word_embeddings": True,
        "vision_config": dict(VISION_CONFIG),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


def qwen2_text_config(
    *,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    heads: tuple[int, int],
    vocab_size: int,
    max_positions: int,
    rope_theta: float,
    rms_norm_eps: float,
    special_ids: tuple[int | None, int, int],
) -> dict[str, Any]:
    """Return a Qwen2 text configuration with tied embeddings.

    ``heads`` is (query, key-value); ``special_ids`` is (begin, end, pad).
    """
    begin, end, pad = special_ids
    return {
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": begin,
        "dtype": "float32",
        "eos_token_id": end,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": intermediate_size,
        "layer_types": ["full_attention"] * num_hidden_layers,
        "max_position_embeddings": max_positions,
        "max_window_layers": num_hidden_layers,
        "num_attention_heads": heads[0],
        "num_hidden_layers": num_hidden_layers,
        "num_key_value_heads": heads[1],
        "pad_token_id": pad,
        "rms_norm_eps": rms_norm_eps,
        "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab_size,
    }


def write_processor(
    folder: Path,
    *,
    chat_template: str,
    begin: str | None,
    end: str,
    pad: str,
    unknown: str | None,
    max_length: int,
    end_ids: Sequence[int],
    begin_id: int | None,
    pad_id: int,
) -> None:
    """Write the tokenizer, image processor, chat template and generation files beside ``tokenizer.json``."""
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    named = {"bos_token": begin, "eos_token": end, "pad_token": pad, "unk_token": unknown}
    tokens = {key: token for key, token in named.items() if token is not None}
    write_json(
        folder / "tokenizer_config.json",
        {
            **tokens,
            "clean_up_tokenization_spaces": False,
            "extra_special_tokens": IMAGE_SPECIALS,
            "model_max_length": max_length,
            "processor_class": "InternVLProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    size = VISION_CONFIG["image_size"]
    image = {
        "crop_to_patches": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "GotOcr2ImageProcessor",
        "image_std": [0.229, 0.224, 0.225],
        "max_patches": 4,
        "min_patches": 1,
        "processor_class": "InternVLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": size[0], "width": size[1]},
    }
    write_json(folder / "preprocessor_config.json", image)
    write_json(
        folder / "processor_config.json",
        {"image_processor": image, "image_seq_length": IMAGE_TOKENS, "processor_class": "InternVLProcessor"},
    )
    write_json(
        folder / "generation_config.json",
        {
            **({} if begin_id is None else {"bos_token_id": begin_id}),
            "eos_token_id": list(end_ids),
            "pad_token_id": pad_id,
        },
    )
