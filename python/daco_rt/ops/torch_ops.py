"""The steering operators on torch tensors.

Importing this module loads the compiled library and registers the shape functions that
``torch.compile`` and ``torch.export`` trace with. The operators compute a decision, not a smooth
function: they have no derivative and refuse inputs that ask for one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from daco_rt import _native
from daco_rt.ops import checks
from daco_rt.ops.reference import Steered, SteeredAffine

_native.load_torch_library()
_HAS_CUDA = torch._C._dispatch_has_kernel_for_dispatch_key("daco::steer_sae", "CUDA")

_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.int32: "int32",
    torch.bool: "bool",
}


def steer_sae(
    z: Tensor,
    slots: Tensor,
    enc: Tensor,
    enc_bias: Tensor,
    dec: Tensor,
    *,
    gain: Tensor,
    undesirable: Tensor,
    shift: Tensor,
    limits: Tensor,
    threshold: Tensor | None = None,
    boost: Tensor | None = None,
    scales: Tensor | None = None,
    coder: str = "topk",
    k: int = 32,
    k_out: int = 0,
) -> Steered:
    """Steer activations by the code of a sparse autoencoder.

    Every row z_t with slot p is coded, ``c = code(enc @ z_t + enc_bias)``, and moved by the gains,
    boosts and shift of policy p along the rows of ``dec``, within that policy's limits; the part of
    z_t that the code does not explain stays as it is.

    Parameters
    ----------
    z : [..., d], fp32 | fp16 | bf16
        Activations. Rows may be strided (a slice of a longer sequence is not copied).
    slots : [...], int32
        Policy of each row: 0 off (copied bit for bit), 1 observe (reported, copied bit for bit), from 2
        on the loaded policies. Outside [0, P): the row becomes NaN.
    enc, dec : [m, d], fp32 | fp16 | bf16 | int8, both the same
        Encoder and decoder, one latent a row. Decoder rows need not have unit norm. fp8 (e4m3) has kernels
        on CUDA only.
    enc_bias : [m], fp32
    gain : [P, m], fp32
        Factor on each code; 1 leaves it, 0 removes it. Rows 0 and 1 are ignored.
    undesirable : [P, m], bool
        Latents whose strength the removed dose sums; row 1 is what observe mode reports.
    shift : [P, d], fp32
        Added to every row, in the units of z.
    limits : [P, 4], fp32
        ``(theta, max_dose, keep_norm, 0)``: codes with |c|·‖dec_i‖ ≤ theta (units of z) are left alone;
        the edit is shortened to max_dose·‖z‖ if max_dose > 0; the norm of z is restored if keep_norm ≠ 0.
    threshold : [m], fp32, optional
        Of ``jumprelu``: latents at or below it are off.
    boost : [P, m], fp32, optional
        Added to each active code.
    scales : [2, m], fp32
        Of quantised weights, as :func:`quantise` gives them: row 0 multiplies the rows of ``enc``, row 1
        those of ``dec``. None for other weights.
    coder : "topk" | "relu" | "jumprelu" | "none"
        ``topk`` reads all of enc; ``relu`` and ``jumprelu`` only the latents that some policy edits or
        reports, so they are cheaper; ``none`` reads neither matrix and adds the shift.
    k : int
        Codes that ``topk`` keeps, 1 ≤ k ≤ m.
    k_out : int
        Width of the reported support; 0 reports none.

    Returns
    -------
    Steered
        ``z`` like the input; ``doses [..., 2]`` fp32, removed and applied, relative to ‖z‖ (NaN for a row
        that could not be steered); ``support_index [..., k_out]`` int32 padded with -1 and
        ``support_value [..., k_out]`` fp32, ranked by |c|·‖dec_i‖.

    Raises
    ------
    TypeError, ValueError
        A dtype, or a shape or range, is wrong; the message names the argument.
    NotImplementedError
        The tensors are on a device without kernels in this build, or ask for gradients.

    Example
    -------
    >>> import torch
    >>> eye = torch.eye(2)
    >>> gain = torch.tensor([[1.0, 1], [1, 1], [0, 1]])
    >>> steer_sae(torch.tensor([[3.0, 4.0]]), torch.tensor([2], dtype=torch.int32), eye, torch.zeros(2), eye,
    ...           gain=gain, undesirable=gain < 1, shift=torch.zeros(3, 2), limits=torch.zeros(3, 4), k=2).z
    tensor([[0., 4.]])
    """
    empty = torch.empty(0)
    operands = (
        z, slots, enc, enc_bias, dec, empty if threshold is None else threshold, gain,
        empty if boost is None else boost, undesirable, shift, limits, empty if scales is None else scales,
    )  # fmt: skip
    return Steered(*_call("steer_sae", operands, coder=coder, k=k, k_out=k_out))


def steer_pursuit(
    z: Tensor,
    slots: Tensor,
    analysis: Tensor,
    bias: Tensor,
    atoms: Tensor,
    *,
    gain: Tensor,
    undesirable: Tensor,
    shift: Tensor,
    limits: Tensor,
    gram: Tensor | None = None,
    boost: Tensor | None = None,
    scales: Tensor | None = None,
    coder: str = "omp",
    k: int = 32,
    sign: str = "positive",
    tol: float = 0.0,
    tau: float = 0.95,
    alpha: float = 0.05,
    k_out: int = 0,
) -> Steered:
    """Steer activations by a sparse decomposition over a dictionary.

    Like :func:`steer_sae`, with codes from orthogonal matching pursuit (correlations
    ``analysis @ z_t + bias`` pick at most k rows of ``atoms``, whose coefficients are refitted by least
    squares after every pick) or from an elastic net over all atoms.

    Parameters
    ----------
    z, slots, gain, undesirable, shift, limits, boost, scales, k_out
        As in :func:`steer_sae`, with m the number of atoms.
    analysis, atoms : [m, d], fp32 | fp16 | bf16 | int8, both the same
        E and A; the same matrix for plain pursuit, different ones for pursuit in a metric. Quantised ones
        come with ``scales``: row 0 for E, row 1 for A.
    bias : [m], fp32
    gram : [m, m], fp32 | fp16, optional
        ``build_gram(analysis, atoms)``. Without it every step of every row reads the atoms again, up to k
        times slower; it costs 4 or 2 bytes per pair of atoms. fp16 serves selection, coefficients are fp32.
    coder : "omp" | "elastic_net"
    k : int
        Largest support of ``omp``, 1 ≤ k ≤ min(m, 64). The elastic net has as many codes as its penalty
        leaves.
    sign : "positive" | "signed" | "nnls"
        ``omp``: pick by the largest correlation and edit positive codes only; pick by absolute value; or
        solve non-negative least squares at every refit (slower). ``elastic_net``: c ≥ 0 unless ``signed``.
    tol : float
        ``omp``: stop when the residual's norm (not squared) is at most tol·‖z‖; 0 never stops early.
    tau, alpha : float
        ``elastic_net``: minimise ½‖ẑ - c·A‖² + α(τ‖c‖₁ + ½(1-τ)‖c‖²) for ẑ = z/‖z‖; c is scaled back by ‖z‖.
        0 ≤ τ ≤ 1, α > 0.

    Returns
    -------
    Steered
        As :func:`steer_sae` returns it.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As :func:`steer_sae`.

    Example
    -------
    >>> import torch
    >>> atoms = torch.eye(3)
    >>> gain = torch.ones(3, 3)
    >>> gain[2, 1] = 0.0
    >>> steer_pursuit(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([2], dtype=torch.int32), atoms,
    ...               torch.zeros(3), atoms, gain=gain, undesirable=gain < 1, shift=torch.zeros(3, 3),
    ...               limits=torch.zeros(3, 4), k=2).z
    tensor([[0., 0., 1.]])
    """
    empty = torch.empty(0)
    operands = (
        z, slots, analysis, bias, empty if gram is None else gram, atoms, gain,
        empty if boost is None else boost, undesirable, shift, limits, empty if scales is None else scales,
    )  # fmt: skip
    options = {"coder": coder, "k": k, "sign": sign, "tol": tol, "tau": tau, "alpha": alpha, "k_out": k_out}
    return Steered(*_call("steer_pursuit", operands, **options))


def steer_affine(
    z: Tensor,
    slots: Tensor,
    a: Tensor,
    a_bias: Tensor,
    b: Tensor,
    *,
    shift: Tensor,
    limits: Tensor,
    phi: str = "identity",
    clamp: tuple[float, float] = (0.0, 1.0),
) -> SteeredAffine:
    """Steer activations by an affine edit of low rank: z' = z + B φ(A z + a) + shift.

    Projection removal, clamped directions and other interventions without a sparse code. There is no support
    and no deadband; the removed dose is 0.

    Parameters
    ----------
    z, slots, shift : as in :func:`steer_sae`. Slot 1 copies the row and reports doses of 0.
    a : [P, r, d], fp32 | fp16 | bf16
        What is measured, r directions a policy.
    a_bias : [P, r], fp32
    b : [P, d, r], dtype of ``a``
        What is added for each.
    limits : [P, 4], fp32
        As in :func:`steer_sae`; theta is ignored.
    phi : "identity" | "relu" | "clamp"
    clamp : (low, high)
        Bounds of ``clamp``; infinite ones leave a side open.

    Returns
    -------
    SteeredAffine
        ``z`` like the input, and ``doses [..., 2]`` fp32.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As :func:`steer_sae`.

    Example
    -------
    Remove the first coordinate:

    >>> import torch
    >>> direction = torch.zeros(3, 1, 2)
    >>> direction[2, 0, 0] = 1
    >>> steer_affine(torch.tensor([[3.0, 4.0]]), torch.tensor([2], dtype=torch.int32), direction,
    ...              torch.zeros(3, 1), -direction.transpose(1, 2), shift=torch.zeros(3, 2),
    ...              limits=torch.zeros(3, 4)).z
    tensor([[0., 4.]])
    """
    operands = (z, slots, a, a_bias, b, shift, limits)
    return SteeredAffine(*_call("steer_affine", operands, phi=phi, low=float(clamp[0]), high=float(clamp[1])))


def build_gram(
    analysis: Tensor, atoms: Tensor, dtype: torch.dtype = torch.float32, *, scales: Tensor | None = None
) -> Tensor:
    """Return ``analysis @ atoms.T``, [m, m], accumulated in fp32: the ``gram`` of :func:`steer_pursuit`.

    Parameters
    ----------
    analysis, atoms : [m, d], fp32 | fp16 | bf16 | int8, both the same
    scales : [2, m], fp32, of quantised matrices.
    dtype : torch.float32 | torch.float16
        Of the result. fp16 halves its size and changes only which of two nearly equal atoms is picked.

    Example
    -------
    >>> import torch
    >>> build_gram(torch.eye(2), torch.eye(2))
    tensor([[1., 0.],
            [0., 1.]])
    """
    checks.check_gram(
        _dtype, analysis, atoms, None if scales is None else _given(scales), _NAMES.get(dtype, str(dtype))
    )
    _check_device("build_gram", analysis)
    _check_no_gradient("build_gram", (analysis, atoms))
    return torch.ops.daco.build_gram(
        analysis, atoms, torch.empty(0) if scales is None else scales, dtype=dtype
    )


def _call(op: str, operands: tuple[Tensor, ...], **options: Any) -> Any:
    """Run an operator; explain in Python's exceptions what it refuses.

    The library checks every operand itself, so the checks here cost nothing until a call fails. A traced
    call reaches the library only when the graph runs: it is checked first.
    """
    _check_no_gradient(op, operands)
    if torch.compiler.is_compiling():
        _explain(op, operands, options)
        return getattr(torch.ops.daco, op)(*operands, **options)
    try:
        return getattr(torch.ops.daco, op)(*operands, **options)
    except (RuntimeError, TypeError):
        _explain(op, operands, options)
        raise


def _explain(op: str, operands: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    """Raise what is wrong with a call, if the checks know it."""
    for x in operands:
        if isinstance(x, Tensor):
            _check_device(op, x)
            if x.dtype == torch.float8_e4m3fn and x.device.type == "cpu":
                raise NotImplementedError(
                    f"{op}: fp8 weights have kernels on CUDA only; quantise to int8 or use fp32, fp16 or bf16"
                )
    if all(isinstance(x, Tensor) for x in operands):
        _check_one_device(op, operands)
    if op == "steer_affine":
        z, slots, a, a_bias, b, shift, limits = operands
        checks.check_affine(_dtype, z, slots, a, a_bias, b, shift, limits, **options)
        return
    gain, boost, undesirable, shift, limits, scales = operands[6:]
    policies = checks.Policies(gain, _given(boost), undesirable, shift, limits, _given(scales))
    if op == "steer_sae":
        z, slots, enc, enc_bias, dec, threshold = operands[:6]
        checks.check_sae(_dtype, z, slots, enc, enc_bias, dec, _given(threshold), policies, **options)
    else:
        z, slots, analysis, bias, gram, atoms = operands[:6]
        checks.check_pursuit(_dtype, z, slots, analysis, bias, _given(gram), atoms, policies, **options)


def _dtype(x: Any) -> str:
    if not isinstance(x, Tensor):
        raise TypeError(f"daco_rt.ops: operands must be torch tensors, got {type(x).__name__}")
    return _NAMES.get(x.dtype, str(x.dtype).removeprefix("torch."))


def _given(x: Tensor) -> Tensor | None:
    """An operand without elements is an absent one, as in every other host of the operators."""
    return None if isinstance(x, Tensor) and x.numel() == 0 else x


def _check_device(op: str, x: Tensor) -> None:
    if x.device.type == "cuda" and not _HAS_CUDA:
        raise NotImplementedError(
            f"{op}: tensors must be on the CPU, got {x.device}: this build has no CUDA kernels"
        )
    if x.device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(f"{op}: tensors must be on the CPU or a CUDA device, got {x.device}")


def _check_one_device(op: str, operands: tuple[Tensor, ...]) -> None:
    """An operand without elements is an absent one and may lie anywhere."""
    z = operands[0]
    for i, x in enumerate(operands):
        if x.numel() > 0 and x.device != z.device:
            raise ValueError(
                f"{op}: all tensors must be on one device, got z on {z.device} and operand {i}"
                f" (shape {tuple(x.shape)}) on {x.device}"
            )


def _check_no_gradient(op: str, operands: tuple[Tensor, ...]) -> None:
    if torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in operands):
        raise NotImplementedError(
            f"{op}: the operator has no derivative, but an operand requires grad;"
            " call it under torch.no_grad() or pass detached tensors"
        )


@torch.library.register_fake("daco::steer_sae")
def _steer_sae_shapes(
    z, slots, enc, enc_bias, dec, threshold, gain, boost, undesirable, shift, limits, scales, *,
    coder, k, k_out,
):  # fmt: skip
    return _output_shapes("steer_sae", z, k_out)


@torch.library.register_fake("daco::steer_pursuit")
def _steer_pursuit_shapes(
    z, slots, analysis, bias, gram, atoms, gain, boost, undesirable, shift, limits, scales, *,
    coder, k, sign, tol, tau, alpha, k_out,
):  # fmt: skip
    return _output_shapes("steer_pursuit", z, k_out)


@torch.library.register_fake("daco::steer_affine")
def _steer_affine_shapes(z, slots, a, a_bias, b, shift, limits, *, phi, low, high):
    return _output_shapes("steer_affine", z, 0)[:2]


@torch.library.register_fake("daco::build_gram")
def _build_gram_shapes(analysis, atoms, scales, *, dtype):
    return analysis.new_empty((analysis.shape[0], atoms.shape[0]), dtype=dtype)


def _output_shapes(op: str, z: Tensor, k_out: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_device(op, z)
    rows = z.shape[:-1]
    return (
        z.new_empty(z.shape),
        z.new_empty((*rows, 2), dtype=torch.float32),
        z.new_empty((*rows, k_out), dtype=torch.int32),
        z.new_empty((*rows, k_out), dtype=torch.float32),
    )
