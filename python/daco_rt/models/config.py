"""Which decoder a Hugging Face text configuration describes, in the words of our graph.

One frozen record, :class:`DecoderConfig`, holds everything the parametric decoder needs. Whatever it cannot
express (a sliding window, an unknown rotary scaling, another activation) is refused by name when the record
is made, so that a graph is never built that silently computes something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from daco_rt.errors import CheckpointError, UnsupportedError

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps", "rope_theta",
          "max_position_embeddings")  # fmt: skip

# What each text model takes for a key that its config.json leaves out. Older saved configurations hold only
# the differences from these values, so guessing from the tensors instead would be wrong for e.g. the epsilon.
_QWEN_VL = (8192, 29568, 80, 64, 8, None, 152064, 1e-5, 1e6, 32768)
_DEFAULTS: dict[str, dict[str, Any]] = {
    name: dict(zip(_SIZES, row, strict=True))
    for name, row in {
        "llama": (4096, 11008, 32, 32, None, None, 32000, 1e-6, 1e4, 2048),
        "mistral": (4096, 14336, 32, 32, 8, None, 32000, 1e-6, 1e4, 131072),
        "qwen2": (4096, 22016, 32, 32, 32, None, 151936, 1e-6, 1e4, 32768),
        "qwen3": (4096, 22016, 32, 32, 32, 128, 151936, 1e-6, 1e4, 32768),
        "qwen2_vl": _QWEN_VL,
        "qwen2_vl_text": _QWEN_VL,
        "qwen2_5_vl": _QWEN_VL,
        "qwen2_5_vl_text": _QWEN_VL,
        "qwen3_vl_text": (4096, 22016, 32, 32, 32, 128, 151936, 1e-6, 5e5, 128000),
    }.items()
}
_MROPE_SECTIONS = {"qwen2_vl": (16, 24, 24), "qwen2_5_vl": (16, 24, 24), "qwen3_vl": (24, 20, 20)}
_SCALING_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of one decoder-only language model.

    ``num_heads`` query heads share ``num_kv_heads`` key/value heads of width ``head_dim``. ``position_axes``
    is P of the graph input ``position_ids`` [P, B, S]: 1, or 3 when ``mrope_section`` splits the rotary
    frequencies among time, height and width. ``rope_scaling`` holds the numbers that ``rope_type`` needs
    (empty for ``"default"``). ``max_positions`` is the length the model was trained for, not a cache size.

    Example
    -------
    >>> c = DecoderConfig.from_hf({"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4})
    >>> c.head_dim, c.qkv_bias, c.qk_norm
    (16, True, False)
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    rope_theta: float = 1e4
    rope_type: str = "default"
    rope_scaling: dict[str, float] = field(default_factory=dict)
    mrope_section: tuple[int, ...] | None = None
    mrope_interleaved: bool = False
    tie_word_embeddings: bool = False
    position_axes: int = 1
    max_positions: int = 0
    model_type: str = ""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, tie_word_embeddings: bool | None = None) -> DecoderConfig:
        """Read a Hugging Face *text* configuration (the ``text_config`` of a multimodal ``config.json``).

        ``tie_word_embeddings`` overrides the configuration's own flag: in a multimodal checkpoint the outer
        configuration and the stored tensors decide, not the inner flag. Both spellings of the rotary settings
        are read (``rope_parameters``; ``rope_theta`` with ``rope_scaling``).

        Raises ``UnsupportedError`` naming the feature this decoder does not implement, ``CheckpointError``
        for sizes that contradict each other.
        """
        kind = str(config.get("model_type", ""))
        if kind not in _DEFAULTS:
            raise UnsupportedError(
                f"text model type {kind!r} has no decoder here; supported: {', '.join(sorted(_DEFAULTS))}"
            )
        values = {key: _pick(config, key, default) for key, default in _DEFAULTS[kind].items()}
        heads = _positive_int(values, "num_attention_heads")
        width = _positive_int(values, "hidden_size")
        if values["num_key_value_heads"] is None:
            values["num_key_value_heads"] = heads
        if values["head_dim"] is None:
            values["head_dim"] = width // heads
        kv_heads, head_dim = _positive_int(values, "num_key_value_heads"), _positive_int(values, "head_dim")
        if heads % kv_heads or head_dim % 2:
            raise CheckpointError(
                f"config.json gives {heads} attention heads, {kv_heads} key/value heads and head_dim"
                f" {head_dim}; the heads must be a multiple of the key/value heads and head_dim even"
            )
        _refuse_variants(config, kind)
        rope = _rope(config, kind, values, head_dim)
        # Llama's and Qwen3's ``attention_bias`` covers all four projections; Qwen2 always has one on q, k, v.
        bias = bool(config.get("attention_bias")) and kind in ("llama", "qwen3", "qwen3_vl_text")
        tied = tie_word_embeddings
        if tied is None:
            tied = config.get("tie_word_embeddings", False)
        return cls(
            hidden_size=width,
            intermediate_size=_positive_int(values, "intermediate_size"),
            num_layers=_positive_int(values, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=_positive_int(values, "vocab_size"),
            rms_norm_eps=float(values["rms_norm_eps"]),
            qkv_bias=kind.startswith("qwen2") or bias,
            o_bias=bias,
            qk_norm=kind.startswith("qwen3"),
            tie_word_embeddings=bool(tied),
            max_positions=_positive_int(values, "max_position_embeddings"),
            model_type=kind,
            **rope,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DecoderConfig:
        """Inverse of :meth:`to_dict`; raises ``CheckpointError`` for a missing or unknown key."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise CheckpointError(
                f"decoder configuration has unknown keys {', '.join(unknown)}; a newer version wrote it"
            )
        section = values.get("mrope_section")
        try:
            return cls(**{**values, "mrope_section": None if section is None else tuple(section)})
        except TypeError as error:
            raise CheckpointError(f"decoder configuration is incomplete: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for an artifact's manifest."""
        values = asdict(self)
        values["mrope_section"] = None if self.mrope_section is None else list(self.mrope_section)
        return values

    def inverse_frequencies(self) -> np.ndarray:
        """Rotary frequencies, fp32 [head_dim / 2], scaling of ``rope_type`` applied.

        Every step rounds to fp32 as the reference implementation does: a frequency off by one unit in the
        last place turns into a visible angle after some thousand positions.
        """
        exponent = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        base = np.power(np.float64(self.rope_theta), exponent.astype(np.float64)).astype(np.float32)
        freq = (np.float32(1.0) / base).astype(np.float32)
        if self.rope_type == "linear":
            return freq / np.float32(self.rope_scaling["factor"])
        if self.rope_type == "llama3":
            return _llama3(freq, self.rope_scaling)
        return freq

    def section_selector(self) -> np.ndarray:
        """Which position axis turns which frequency: fp32 [P, head_dim / 2] of zeros and ones.

        Chunked sections lie one after the other; interleaved ones deal frequencies to the axes in turn and
        leave the rest to the first axis. Columns sum to one.
        """
        half = self.head_dim // 2
        if self.mrope_section is None:
            return np.ones((1, half), np.float32)
        owner = np.zeros(half, np.int64)
        if self.mrope_interleaved:
            for axis in (1, 2):
                owner[axis : 3 * self.mrope_section[axis] : 3] = axis
        else:
            owner = np.repeat(np.arange(len(self.mrope_section)), self.mrope_section)
        return (owner == np.arange(self.position_axes)[:, None]).astype(np.float32)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name → shape of every tensor of the decoder, the embedding table included."""
        d, ff, q, kv = (self.hidden_size, self.intermediate_size, self.num_heads * self.head_dim,
                        self.num_kv_heads * self.head_dim)  # fmt: skip
        block: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (d,),
            "post_attention_layernorm.weight": (d,),
            "mlp.gate_proj.weight": (ff, d),
            "mlp.up_proj.weight": (ff, d),
            "mlp.down_proj.weight": (d, ff),
        }
        for name, rows, columns, bias in (
            ("q", q, d, self.qkv_bias), ("k", kv, d, self.qkv_bias), ("v", kv, d, self.qkv_bias),
            ("o", d, q, self.o_bias),
        ):  # fmt: skip
            block[f"self_attn.{name}_proj.weight"] = (rows, columns)
            if bias:
                block[f"self_attn.{name}_proj.bias"] = (rows,)
        if self.qk_norm:
            block["self_attn.q_norm.weight"] = block["self_attn.k_norm.weight"] = (self.head_dim,)
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocab_size, d)}
        for i in range(self.num_layers):
            shapes.update({f"layers.{i}.{name}": shape for name, shape in block.items()})
        shapes["norm.weight"] = (d,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, d)
        return shapes


def _pick(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = config.get(key)
    return default if value is None else value


def _positive_int(values: Mapping[str, Any], key: str) -> int:
    value = values[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {key} must be a positive integer, got {value!r}")
    return value


def _refuse_variants(config: Mapping[str, Any], kind: str) -> None:
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedError(
            f"hidden_act {activation!r} of the text model is not implemented; expected 'silu'"
        )
    if config.get("mlp_bias"):
        raise UnsupportedError("mlp_bias is not implemented; expected an MLP without biases")
    if kind == "mistral":
        # Mistral has no switch: a window that is there is active, and so is the default of an absent key.
        if (window := config.get("sliding_window", 4096)) is not None:
            raise UnsupportedError(f"sliding_window {window} is not implemented; only full attention is")
    elif config.get("use_sliding_window"):
        raise UnsupportedError("use_sliding_window is not implemented; only full attention is")
    kinds = sorted({str(k) for k in config.get("layer_types") or ()} - {"full_attention"})
    if kinds:
        raise UnsupportedError(f"layer_types {', '.join(kinds)} not implemented; only full_attention is")


def _rope(config: Mapping[str, Any], kind: str, values: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """The rotary fields of :class:`DecoderConfig` from either spelling of the settings."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    name = str(rope.get("rope_type", rope.get("type", "default")))
    # "mrope" is the older name of "default" with sections. "dynamic" stretches the frequencies only beyond
    # max_position_embeddings and equals "default" up to there, which is as long as any cache gets.
    if name in ("mrope", "dynamic"):
        name = "default"
    if name not in _SCALING_KEYS:
        raise UnsupportedError(
            f"rope_type {name!r} is not implemented; supported: {', '.join(sorted(_SCALING_KEYS))}"
        )
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise UnsupportedError(f"partial_rotary_factor {partial} is not implemented; expected 1.0")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UnsupportedError("rope_parameters that differ between layer types are not implemented")
    if name == "llama3":
        rope.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    if missing := [key for key in _SCALING_KEYS[name] if key not in rope]:
        raise CheckpointError(f"config.json: rope_type {name!r} needs {', '.join(missing)}, which is missing")
    section = rope.get("mrope_section", _MROPE_SECTIONS.get(kind.removesuffix("_text")))
    if section is not None and (len(section) != 3 or sum(section) != head_dim // 2):
        raise CheckpointError(
            f"config.json: mrope_section {list(section)} must be three lengths that add up to head_dim / 2 ="
            f" {head_dim // 2}"
        )
    return {
        "rope_theta": float(rope.get("rope_theta", values["rope_theta"])),
        "rope_type": name,
        "rope_scaling": {key: float(rope[key]) for key in _SCALING_KEYS[name]},
        "mrope_section": None if section is None else tuple(int(n) for n in section),
        # Qwen3-VL interleaves whether or not its configuration says so.
        "mrope_interleaved": section is not None
        and bool(rope.get("mrope_interleaved", kind == "qwen3_vl_text")),
        "position_axes": 1 if section is None else 3,
    }


def _llama3(freq: np.ndarray, scaling: Mapping[str, float]) -> np.ndarray:
    """Llama 3.1's scaling: long waves are stretched by ``factor``, short ones kept, the rest blended."""
    f32 = np.float32
    low, high, factor, trained = (f32(scaling[key]) for key in (
        "low_freq_factor", "high_freq_factor", "factor", "original_max_position_embeddings"))  # fmt: skip
    wave = (f32(2 * math.pi) / freq).astype(f32)
    blend = (trained / wave - low) / (high - low)
    blended = (1 - blend) * freq / factor + blend * freq
    short = np.where(wave < trained / high, freq, blended)
    return np.where(wave > trained / low, freq / factor, short).astype(f32)
