"""Policies, packs, and steering of a Hugging Face model.

- :class:`PolicySpec` says in words what a policy edits;
- :func:`compile_pursuit_pack`, :func:`compile_sae_pack`, :func:`compile_actadd_pack`,
  :func:`compile_affine_pack` turn policies and a dictionary, SAEs or directions into a pack;
- :func:`steer` runs a torch model under a pack (loads torch on first use).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from daco_rt.steering.compile import compile_actadd_pack, compile_pursuit_pack
from daco_rt.steering.compile_affine import compile_affine_pack
from daco_rt.steering.compile_sae import compile_sae_pack
from daco_rt.steering.policy import PolicySpec

if TYPE_CHECKING:
    from daco_rt.steering.hooks import Steering, steer

__all__ = [
    "PolicySpec",
    "Steering",
    "compile_actadd_pack",
    "compile_affine_pack",
    "compile_pursuit_pack",
    "compile_sae_pack",
    "steer",
]


def __getattr__(name: str) -> Any:
    if name in ("Steering", "steer"):
        from daco_rt.steering import hooks

        return getattr(hooks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
