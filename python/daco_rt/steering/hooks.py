"""Steering a Hugging Face model in torch, with the same operator and the same rules as an exported bundle."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from daco_rt.artifacts import Pack, load_pack
from daco_rt.errors import PolicyError
from daco_rt.ops import Steered, reference
from daco_rt.runtime.policies import Chosen, choose_policy
from daco_rt.steering.host import check_fits, host_of, to_numpy, to_torch
from daco_rt.steering.slots import SlotTracker
from daco_rt.steering.tables import GRAM_LIMIT

# Text models under steering. Two sets of hooks on one model would edit each other's edits.
_STEERED: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


class Steering:
    """What :func:`steer` hands out: what happened so far, and a way to choose tokens by hand.

    Attributes
    ----------
    pack : Pack
        The pack in use, reduced to the blocks that are steered.
    policies : tuple of str
        Names of the policies in use: one, or one a row.
    fired : dict of int to int
        block → rows evaluated so far under a slot other than "off".
    records : dict of int to list of Steered
        block → one entry a forward pass, with telemetry only: ``doses`` fp32 [B, S, 2], ``support_index``
        int32 and ``support_value`` fp32 [B, S, k_out]; its ``z`` is empty.
    """

    def __init__(self, pack: Pack, policies: tuple[str, ...], tracker: SlotTracker) -> None:
        self.pack = pack
        self.policies = policies
        self.fired: dict[int, int] = dict.fromkeys(pack.blocks, 0)
        self.records: dict[int, list[Steered]] = {block: [] for block in pack.blocks}
        self._tracker = tracker

    def set_slots(self, slots: Any | None) -> None:
        """Steer exactly these tokens in every following pass, whatever the policy's positions say.

        Parameters
        ----------
        slots : int tensor or array [B, S], slots of the pack (0 off, 1 observe, 2 and up its policies);
            ``None`` returns to the policy's positions.

        Raises
        ------
        PolicyError
            A slot is not in the pack, or the shape is not [B, S].
        """
        if slots is None:
            self._tracker.plan(None)
            return
        table = to_numpy(slots) if isinstance(slots, torch.Tensor) else np.asarray(slots)
        count = self.pack.slots_count
        if table.ndim != 2 or not np.issubdtype(table.dtype, np.integer):
            raise PolicyError(
                f"set_slots: slots must be integers of shape [batch, tokens], got {table.dtype} "
                f"{list(table.shape)}"
            )
        if ((table < 0) | (table >= count)).any():
            raise PolicyError(
                f"set_slots: slots must be from 0 to {count - 1}, got {table.min()} to {table.max()}"
            )
        self._tracker.plan(table.astype(np.int32))


@contextlib.contextmanager
def steer(
    model: torch.nn.Module,
    pack: Pack | str | Path,
    policy: str | Sequence[str] | None = None,
    *,
    blocks: Sequence[int] | None = None,
    telemetry: bool = False,
    backend: Literal["native", "reference"] = "native",
    gram: bool | None = None,
) -> Iterator[Steering]:
    """Steer every forward pass of a Hugging Face model, ``generate`` included, inside a ``with`` block.

    Parameters
    ----------
    model : any model with its decoder at ``model.language_model.layers`` or ``model.layers``; call this
        object, not its parts, inside the block.
    pack : a loaded pack, or its folder.
    policy : a policy of the pack, "off" or "observe"; a list gives one to each row of the batch; ``None``
        means the pack's default.
    blocks : steer only these of the pack's blocks.
    telemetry : keep doses and supports of every pass in ``records``.
    backend : "reference" computes in float64 NumPy, row by row, for checking.
    gram : build the Gram matrix of a pursuit that has none; by default up to 4,096 atoms.

    Yields
    ------
    Steering

    Raises
    ------
    PolicyError
        The policy or a block is unknown, the pack is for another model, or the model is being steered
        already.
    UnsupportedError
        The model has no decoder blocks to steer.
    NotImplementedError
        In a forward pass that records gradients: steering has none. Use ``torch.no_grad()``.

    Example
    -------
    >>> with steer(model, "packs/smol", "default") as steering, torch.no_grad():
    ...     answer = model.generate(**inputs, max_new_tokens=40)
    >>> steering.fired[15]  # rows that block 15 evaluated
    52
    """
    loaded = pack if isinstance(pack, Pack) else load_pack(pack)
    if blocks is not None:
        loaded = loaded.select_blocks(blocks)
    if backend not in ("native", "reference"):
        raise ValueError(f"steer: backend must be 'native' or 'reference', got {backend!r}")
    host = host_of(model)
    check_fits(loaded, model, host)
    chosen, names = _choose(loaded, policy, host.image_token)
    tracker = SlotTracker(model, chosen, host.image_token)
    steering = Steering(loaded, names, tracker)
    if host.text in _STEERED:
        raise PolicyError(
            f"this {type(model).__name__} is being steered already; leave the other steer block first, "
            "or give a list of policies, one a row"
        )
    with contextlib.ExitStack() as stack:
        _STEERED.add(host.text)
        stack.callback(_STEERED.discard, host.text)
        for row, block in enumerate(loaded.blocks):
            layer = host.layers[block]
            device = next(layer.parameters()).device
            if backend == "native":
                run = _native(loaded, block, device, gram, telemetry)
            else:
                run = _reference(loaded, block, telemetry)
            hook = _block_hook(steering, tracker, block, loaded.slot_map[row], run, telemetry)
            stack.callback(layer.register_forward_hook(hook).remove)
        stack.callback(model.register_forward_pre_hook(tracker.before, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(tracker.after, always_call=True).remove)
        yield steering


_Run = Callable[[torch.Tensor, torch.Tensor], Steered]


def _choose(
    pack: Pack, policy: str | Sequence[str] | None, image_token: int | None
) -> tuple[Chosen | list[Chosen], tuple[str, ...]]:
    single = policy is None or isinstance(policy, str)
    wanted = [policy] if policy is None or isinstance(policy, str) else policy
    rows = [choose_policy(pack, name) for name in wanted]
    if not rows:
        raise PolicyError("steer: the list of policies is empty; give one policy, or one a row")
    if image_token is None:
        for one in rows:
            if one.slot >= 2 and one.positions == "image":
                raise PolicyError(
                    f"policy '{one.name}' steers image tokens, this model has none; choose another policy"
                )
    return rows[0] if single else rows, tuple(one.name for one in rows)


def _block_hook(
    steering: Steering, tracker: SlotTracker, block: int, slot_map: np.ndarray, run: _Run, telemetry: bool
) -> Callable[..., Any]:
    def hook(_layer: torch.nn.Module, _args: Any, output: Any) -> Any:
        z = output[0] if isinstance(output, tuple) else output
        if tracker.current is None or tracker.current.shape != z.shape[:-1]:
            raise PolicyError(
                f"block {block} ran outside a forward pass of the model that steer was given, so its tokens "
                "are unknown; call that model, not a part of it"
            )
        slots = slot_map[tracker.current]
        count = int((slots != 0).sum())
        if count == 0 and not telemetry:
            return None  # the output stays as it is
        steered = run(z, torch.from_numpy(slots).to(z.device))
        steering.fired[block] += count
        if telemetry:
            steering.records[block].append(steered._replace(z=z.new_empty(0)))
        return (steered.z, *output[1:]) if isinstance(output, tuple) else steered.z

    return hook


def _native(pack: Pack, block: int, device: torch.device, gram: bool | None, telemetry: bool) -> _Run:
    """The compiled operator, its operands on the block's device once and for all."""
    from daco_rt import ops

    call: dict[str, Any] = {
        name: to_torch(array, device) for name, array in pack.operands(block).items() if array.size
    }
    if pack.op == "affine":
        return lambda z, slots: _without_support(*ops.steer_affine(z, slots, **call, phi=pack.coder))
    call |= _attributes(pack, telemetry)
    if pack.op == "sae":
        return lambda z, slots: ops.steer_sae(z, slots, **call)
    if "gram" not in call and (pack.atoms <= GRAM_LIMIT if gram is None else gram):
        call["gram"] = ops.build_gram(call["analysis"], call["atoms"], scales=call.get("scales"))
    return lambda z, slots: ops.steer_pursuit(z, slots, **call)


def _reference(pack: Pack, block: int, telemetry: bool) -> _Run:
    """The definition in float64. Rows that must be copied are taken from the input itself."""
    call: dict[str, Any] = {name: array for name, array in pack.operands(block).items() if array.size}
    call.pop("gram", None)  # a rounded one would make the reference less exact
    call |= {"phi": pack.coder} if pack.op == "affine" else _attributes(pack, telemetry)
    by_op = {"sae": reference.steer_sae, "pursuit": reference.steer_pursuit, "affine": reference.steer_affine}
    steer_rows: Callable[..., Any] = by_op[pack.op]

    def run(z: torch.Tensor, slots: torch.Tensor) -> Steered:
        rows = to_numpy(z)
        found = steer_rows(rows, to_numpy(slots), **call)
        parts: list[Any] = [torch.from_numpy(part).to(z.device) for part in found]
        unchanged = (found.z == rows) | (np.isnan(found.z) & np.isnan(rows))
        same = torch.from_numpy(unchanged.all(axis=-1)).to(z.device)
        parts[0] = torch.where(same[..., None], z, parts[0].to(z.dtype))
        if len(parts) == 2:
            return _without_support(parts[0], parts[1].float())
        return Steered(parts[0], parts[1].float(), parts[2], parts[3].float())

    return run


def _without_support(z: Any, doses: Any) -> Steered:
    """The result of an operator that has no code."""
    rows = z.shape[:-1]
    return Steered(z, doses, doses.new_empty((*rows, 0), dtype=torch.int32), doses.new_empty((*rows, 0)))


def _attributes(pack: Pack, telemetry: bool) -> dict[str, Any]:
    common = {"coder": pack.coder, "k": pack.k, "k_out": pack.k_out if telemetry else 0}
    if pack.op == "sae":
        return common
    return {**common, "sign": pack.sign, "tol": pack.tol, "tau": pack.tau, "alpha": pack.alpha}
