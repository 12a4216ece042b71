"""Tiny embedders: real Hugging Face classes with seeded random weights, saved as a checkpoint would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from corpus_samples import CAPTIONS

_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_PICTURE = {**_TEXT, "image_size": 16, "patch_size": 8}
_SPECIAL = ["<pad>", "<unk>", "<bos>", "<eos>"]


def tokenizer() -> Any:
    """A word tokenizer of the sample captions that closes every text with <eos>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for caption in CAPTIONS for word in caption.lower().replace(",", "").split()})
    words += ["photo", "of", "picture", "soup", "cocaine", "honesty", "x"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(_SPECIAL + words))}, "<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )


def save_embedder(folder: Path, kind: str = "clip") -> Path:
    """Save a tiny "clip", "siglip" or "bert" with tokenizer and, of the first two, image processor."""
    import torch
    import transformers as hf

    tokens = tokenizer()
    text: dict[str, Any] = {
        **_TEXT,
        "vocab_size": len(tokens),
        "max_position_embeddings": 12,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    torch.manual_seed(7)
    if kind == "clip":
        text["projection_dim"] = 24
        config = hf.CLIPConfig(
            text_config=text, vision_config={**_PICTURE, "projection_dim": 24}, projection_dim=24
        )
        model: Any = hf.CLIPModel(config)
        size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    elif kind == "siglip":
        model = hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=_PICTURE))
        size = {"size": {"height": 16, "width": 16}}
        from transformers.models.siglip.image_processing_pil_siglip import (
            SiglipImageProcessorPil as Processor,
        )
    else:
        model, size, Processor = hf.BertModel(hf.BertConfig(**text)), {}, None
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    if Processor is not None:
        Processor(**size).save_pretrained(folder)
    return folder
