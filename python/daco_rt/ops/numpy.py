"""The steering operators on NumPy arrays: the native kernels without torch.

The arguments are those of :mod:`daco_rt.ops`, plus how to run. Arrays may be read-only or strided (strided
ones are copied); bf16 arrays have dtype ``ml_dtypes.bfloat16``. No thread is started unless ``threads`` is
more than 1, and none outlives a call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from daco_rt import _native
from daco_rt.ops import checks
from daco_rt.ops.reference import Steered, SteeredAffine

_BF16 = np.dtype(ml_dtypes.bfloat16)
_FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


def steer_sae(
    z: NDArray,
    slots: NDArray,
    enc: NDArray,
    enc_bias: NDArray,
    dec: NDArray,
    *,
    gain: NDArray,
    undesirable: NDArray,
    shift: NDArray,
    limits: NDArray,
    threshold: NDArray | None = None,
    boost: NDArray | None = None,
    scales: NDArray | None = None,
    coder: str = "topk",
    k: int = 32,
    k_out: int = 0,
    isa: str = "auto",
    threads: int = 1,
) -> Steered:
    """Steer activations by the code of a sparse autoencoder; see :func:`daco_rt.ops.steer_sae`.

    Parameters
    ----------
    isa : "auto" | "scalar" | "avx2" | "avx512"
        Instruction set of the kernels; ``auto`` takes the best that the machine has.
    threads : int
        Threads to use, at least 1. Results do not depend on it.

    Raises
    ------
    TypeError, ValueError
        A dtype, or a shape or range, is wrong; the message names the argument.
    NotImplementedError
        The machine lacks the instruction set.
    DacoError
        The extension module was not built.

    Example
    -------
    >>> import numpy as np
    >>> eye, gain = np.eye(2, dtype=np.float32), np.array([[1, 1], [1, 1], [0, 1]], np.float32)
    >>> steer_sae(np.array([[3, 4]], np.float32), np.array([2], np.int32), eye, np.zeros(2, np.float32), eye,
    ...           gain=gain, undesirable=gain < 1, shift=np.zeros((3, 2), np.float32),
    ...           limits=np.zeros((3, 4), np.float32), k=2).z
    array([[0., 4.]], dtype=float32)
    """
    threshold, boost, scales = _given(threshold), _given(boost), _given(scales)
    operands = (z, slots, enc, enc_bias, dec, threshold, gain, boost, undesirable, shift, limits, scales)

    def check() -> None:
        policies = checks.Policies(gain, boost, undesirable, shift, limits, scales)
        checks.check_sae(_dtype, z, slots, enc, enc_bias, dec, threshold, policies, coder, k, k_out)
        _no_fp8("steer_sae", enc)

    _check_once(check, operands, ("steer_sae", coder, k, k_out))
    out = _outputs(z, k_out)
    _native.core().steer_sae(
        _native_arrays(*operands), _native_arrays(*out),
        coder, k, k_out, isa, _thread_count("steer_sae", threads),
    )  # fmt: skip
    return out


def steer_pursuit(
    z: NDArray,
    slots: NDArray,
    analysis: NDArray,
    bias: NDArray,
    atoms: NDArray,
    *,
    gain: NDArray,
    undesirable: NDArray,
    shift: NDArray,
    limits: NDArray,
    gram: NDArray | None = None,
    boost: NDArray | None = None,
    scales: NDArray | None = None,
    coder: str = "omp",
    k: int = 32,
    sign: str = "positive",
    tol: float = 0.0,
    tau: float = 0.95,
    alpha: float = 0.05,
    k_out: int = 0,
    isa: str = "auto",
    threads: int = 1,
) -> Steered:
    """Steer activations by a sparse decomposition; see :func:`daco_rt.ops.steer_pursuit`.

    ``isa`` and ``threads`` as in :func:`steer_sae`.
    """
    gram, boost, scales = _given(gram), _given(boost), _given(scales)
    operands = (z, slots, analysis, bias, gram, atoms, gain, boost, undesirable, shift, limits, scales)

    def check() -> None:
        policies = checks.Policies(gain, boost, undesirable, shift, limits, scales)
        checks.check_pursuit(
            _dtype, z, slots, analysis, bias, gram, atoms, policies, coder, k, sign, tol, tau, alpha, k_out
        )
        _no_fp8("steer_pursuit", analysis)

    _check_once(check, operands, ("steer_pursuit", coder, k, sign, tol, tau, alpha, k_out))
    out = _outputs(z, k_out)
    _native.core().steer_pursuit(
        _native_arrays(*operands), _native_arrays(*out),
        coder, k, sign, tol, tau, alpha, k_out, isa, _thread_count("steer_pursuit", threads),
    )  # fmt: skip
    return out


def steer_affine(
    z: NDArray,
    slots: NDArray,
    a: NDArray,
    a_bias: NDArray,
    b: NDArray,
    *,
    shift: NDArray,
    limits: NDArray,
    phi: str = "identity",
    clamp: tuple[float, float] = (0.0, 1.0),
    isa: str = "auto",
    threads: int = 1,
) -> SteeredAffine:
    """Steer activations by an affine edit; see :func:`daco_rt.ops.steer_affine`.

    ``isa`` and ``threads`` as in :func:`steer_sae`.
    """
    low, high = clamp
    checks.check_affine(_dtype, z, slots, a, a_bias, b, shift, limits, phi, low, high)
    out = SteeredAffine(*_outputs(z, 0)[:2])
    _native.core().steer_affine(
        _native_arrays(z, slots, a, a_bias, b, shift, limits),
        _native_arrays(*out),
        phi, float(low), float(high), isa, _thread_count("steer_affine", threads),
    )  # fmt: skip
    return out


def build_gram(
    analysis: NDArray,
    atoms: NDArray,
    dtype: DTypeLike = np.float32,
    *,
    scales: NDArray | None = None,
    isa: str = "auto",
    threads: int = 1,
) -> NDArray:
    """Return ``analysis @ atoms.T``, [m, m], accumulated in fp32; see :func:`daco_rt.ops.build_gram`.

    Example
    -------
    >>> import numpy as np
    >>> build_gram(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), np.float16)
    array([[1., 0.],
           [0., 1.]], dtype=float16)
    """
    scales = _given(scales)
    checks.check_gram(_dtype, analysis, atoms, scales, str(np.dtype(dtype)))
    gram = np.empty((len(analysis), len(analysis)), dtype)
    _no_fp8("build_gram", analysis)
    e, a, s = _native_arrays(analysis, atoms, scales)
    _native.core().build_gram(e, a, s, gram, isa, _thread_count("build_gram", threads))
    return gram


def _dtype(x: Any) -> str:
    if not isinstance(x, np.ndarray):
        raise TypeError(f"daco_rt.ops.numpy: operands must be NumPy arrays, got {type(x).__name__}")
    return _dtype_name(x.dtype)


# Asking NumPy for a dtype's name runs more Python than all the rest of a check.
_dtype_name = functools.cache(str)


# Calls whose operands were found to fit. A decoder calls with the same dtypes and shapes for each token, and
# after a matrix went through the caches the check costs ten times what it costs in a loop.
_accepted: set[Hashable] = set()
_MOST_ACCEPTED = 1024


def _check_once(
    check: Callable[[], None], operands: tuple[NDArray | None, ...], settings: tuple[Any, ...]
) -> None:
    """Run ``check``, which reads nothing but dtypes, shapes and settings, unless it has passed for these."""
    try:
        # 1, 1.0 and True are one key, and only one of them is a count.
        key = (
            settings,
            tuple([type(s) for s in settings]),
            tuple([None if a is None else (a.dtype, a.shape) for a in operands]),
        )
        if key in _accepted:
            return
    except (AttributeError, TypeError):  # no array, or no setting: the check says so
        return check()
    check()
    if len(_accepted) >= _MOST_ACCEPTED:
        _accepted.clear()
    _accepted.add(key)


def _given(x: NDArray | None) -> NDArray | None:
    """An operand without elements is an absent one, as in every other host of the operators."""
    return None if x is None or x.size == 0 else x


def _outputs(z: NDArray, k_out: int) -> Steered:
    rows = z.shape[:-1]
    return Steered(
        np.empty(z.shape, z.dtype),
        np.empty((*rows, 2), np.float32),
        np.empty((*rows, k_out), np.int32),
        np.empty((*rows, k_out), np.float32),
    )


def _native_arrays(*arrays: NDArray | None) -> tuple[NDArray | None, ...]:
    """Make arrays contiguous, and bf16 ones uint16: the module's interface has no type for bf16."""
    packed = [None if a is None else np.asarray(a, order="C") for a in arrays]
    return tuple(a.view(np.uint16) if a is not None and a.dtype == _BF16 else a for a in packed)


def _no_fp8(op: str, matrix: NDArray) -> None:
    if matrix.dtype == _FP8:
        raise NotImplementedError(
            f"{op}: fp8 weights have kernels on CUDA only; quantise to int8 or use fp32, fp16 or bf16"
        )


def _thread_count(op: str, threads: int) -> int:
    if threads < 1:
        raise ValueError(f"{op}: threads must be at least 1, got {threads}")
    return threads
