"""Runs under the Python of an environment with sae-lens; daco_rt is not there.

usage: saelens_worker.py codes FOLDER ROWS.npy OUT.npz     what an SAE folder makes of rows
       saelens_worker.py save KIND FOLDER ROWS.npy OUT.npz  the same for a new SAE, saved to FOLDER
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

KINDS = {
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "topk": (TopKSAE, TopKSAEConfig, {"k": 5}),
    "topk-rescaled": (TopKSAE, TopKSAEConfig, {"k": 5, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
    "no-pre-bias": (TopKSAE, TopKSAEConfig, {"k": 5, "apply_b_dec_to_input": False}),
    "layer-norm": (StandardSAE, StandardSAEConfig, {"normalize_activations": "layer_norm"}),
}


def make(kind: str, dim: int, latents: int) -> SAE:
    cls, config, options = KINDS[kind]
    metadata = SAEMetadata(hook_name="blocks.3.hook_resid_post", model_name="test")
    sae = cls(config(d_in=dim, d_sae=latents, metadata=metadata, **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if name == "threshold":
                parameter.abs_()
    return sae


def main() -> None:
    if sys.argv[1] == "codes":
        sae = SAE.load_from_disk(sys.argv[2])
    else:
        sae = make(sys.argv[2], np.load(sys.argv[4]).shape[1], 40)
        sae.save_model(sys.argv[3])
    rows = torch.tensor(np.load(sys.argv[-2]))
    with torch.no_grad():
        codes = sae.encode(rows)
        codes = codes.to_dense() if codes.is_sparse else codes
        np.savez(sys.argv[-1], codes=codes.numpy(), decoded=sae.decode(codes).numpy())


main()
