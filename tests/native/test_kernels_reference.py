"""Every kernel against the float64 reference: instruction sets x dtypes x coders x awkward sizes, sampled.

A selection (top-k, pursuit) is judged for validity, because two right implementations may differ at a tie;
then values are compared given the kernel's own selection, against float64, and may be at most twice as far
from it as plain NumPy float32 is, plus a floor of a few roundings.

``DACO_RT_TEST_SAMPLES`` (default 2) multiplies the sizes drawn for each combination.
"""

from __future__ import annotations

import itertools
import os

import kernel_problems as problems
import numpy as np
import pytest
from kernel_problems import BF16, DTYPES, EPS32, POLICIES, WEIGHTS, same_bits

from daco_rt import _native
from daco_rt.errors import DacoError
from daco_rt.ops import reference
from daco_rt.ops.reference import Steered

try:
    _native.core()
except DacoError as error:
    pytest.skip(str(error), allow_module_level=True)
from daco_rt.ops import numpy as kernels

SAMPLES = int(os.environ.get("DACO_RT_TEST_SAMPLES", "2"))
ATOMS = (1, 7, 33, 129, 1000)
DIMS = (1, 3, 17, 64, 100)
ROWS = (0, 1, 3, 17)
ISAS = ("scalar", "avx2", "avx512")
PATHS = 24  # greedy paths that are followed where rounding may decide
ROUNDING = {np.float32: EPS32, np.float16: 2.0**-11, BF16: 2.0**-8}


@pytest.fixture(params=ISAS)
def isa(request):
    try:
        kernels.build_gram(np.eye(1, dtype=np.float32), np.eye(1, dtype=np.float32), isa=request.param)
    except NotImplementedError as error:
        pytest.skip(str(error))
    return request.param


def draw(seed: str, metric: bool = False):
    """Yield (rng, problem, k) for every pair of dtypes and a few sizes, the same on every run."""
    rng = np.random.default_rng(list(seed.encode()))
    for weight, activation in itertools.product(WEIGHTS.values(), DTYPES.values()):
        for sample in range(SAMPLES):
            rows = int(rng.choice(ROWS)) if sample else 17
            atoms, dim = int(rng.choice(ATOMS)), int(rng.choice(DIMS))
            k = min(atoms, int(rng.choice((1, 4, 12, 64))))
            yield rng, problems.random_problem(rng, rows, atoms, dim, weight, activation, metric), k


def run_all_ways(call, problem: problems.Problem) -> Steered:
    """Run on one and on three threads, twice: all the same bits. Checks every row that gets no code."""
    first = call(threads=1)
    for threads in (3, 1):
        again = call(threads=threads)
        assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))
    finite = np.isfinite(problem.z.astype(np.float64)).all(axis=1)
    for t, p in enumerate(problem.slots):
        outside = not 0 <= p < POLICIES
        if outside:
            assert np.isnan(first.z[t].astype(np.float64)).all()
        elif p < 2 or not finite[t]:
            assert same_bits(first.z[t], problem.z[t])
        if outside or p == 0 or not finite[t]:
            assert (first.support_index[t] == -1).all() and (first.support_value[t] == 0).all()
            assert np.isnan(first.doses[t]).all() if outside or p else (first.doses[t] == 0).all()
        else:
            for part in (first.z[t], first.doses[t], first.support_value[t]):
                assert np.isfinite(part.astype(np.float64)).all()
    return first


def code_of(out: Steered, problem: problems.Problem, t: int) -> np.ndarray:
    """Read row t's whole code from its reported support, checking how that is ordered and padded."""
    index, value = out.support_index[t], out.support_value[t].astype(np.float64)
    n = int((index >= 0).sum())
    assert (index[n:] == -1).all() and (value[n:] == 0).all() and (value[:n] != 0).all()
    index, value = index[:n], value[:n]
    assert len(set(index.tolist())) == n
    strength = np.abs(value) * np.linalg.norm(problem.dec[index].astype(np.float64), axis=1)
    assert (strength[:-1] >= strength[1:] * (1 - 1e-6)).all()
    for i in range(n - 1):
        if abs(value[i]) == abs(value[i + 1]) and same_bits(problem.dec[index[i]], problem.dec[index[i + 1]]):
            assert index[i] < index[i + 1]
    code = np.zeros(len(problem.dec))
    code[index] = value
    return code


def check_edit(out: Steered, problem: problems.Problem, t: int, exact, plain, slack: float) -> None:
    """z' and doses of row t, given float64 codes and those of plain float32; ``slack`` bounds code errors."""
    dtype = problem.z.dtype.type
    wanted = problems.edited(problem, t, exact, np.float64)
    simple = problems.edited(problem, t, plain, np.float32)
    size = max(float(np.abs(wanted).max()), float(np.abs(problem.z[t].astype(np.float64)).max()))
    edits = 1 + float(np.abs(exact).sum())
    norms = float(np.linalg.norm(problem.dec.astype(np.float64), axis=1).max())
    floor = 8 * EPS32 * (size + edits) + 3 * np.count_nonzero(exact) * norms * slack
    got = out.z[t].astype(np.float64)
    excess = np.abs(got - wanted) - 2 * np.abs(simple.astype(dtype).astype(np.float64) - wanted).max()
    assert (excess <= floor + ROUNDING[dtype] * np.abs(wanted)).all(), (excess.max(), floor)

    norm = float(np.linalg.norm(problem.z[t].astype(np.float64)))
    bound = 1e-5 if norm == 0 else 1e-5 + 2 * np.sqrt(len(got)) * floor / norm
    assert np.abs(out.doses[t] - problems.doses(problem, t, exact, wanted)).max() <= bound * 4


@pytest.mark.parametrize("coder", ["topk", "relu", "jumprelu", "none"])
def test_sae(isa, coder):
    compared = 0
    for _, problem, k in draw(f"sae {coder}"):
        m = len(problem.dec)
        k_out = m if coder != "topk" else k
        threshold = problem.threshold if coder == "jumprelu" else None

        def call(threads, problem=problem, k=k, k_out=k_out, threshold=threshold):
            return kernels.steer_sae(
                problem.z, problem.slots, problem.stored[0], problem.bias, problem.stored[1],
                threshold=threshold, scales=problem.scales, **problem.policy,
                coder=coder, k=k, k_out=k_out, isa=isa, threads=threads,
            )  # fmt: skip

        out = run_all_ways(call, problem)
        watched = reference.watched_latents(*(problem.policy[n] for n in ("gain", "boost", "undesirable")))
        for t in problem.coded:
            got = code_of(out, problem, t)
            exact = problems.correlations(problem, t)
            margin = problems.correlation_error(problem, t)
            chosen = got != 0
            if coder == "topk":
                assert chosen.sum() <= k
                rest = float(exact[~chosen].max(initial=0.0))
                assert chosen.sum() == k or rest <= margin
                assert exact[chosen].min(initial=np.inf) >= rest - 2 * margin
                if m > 5:
                    assert chosen[1] or not chosen[5]  # the same atom twice: the lower index first
            elif coder == "none":
                assert not chosen.any()
            else:
                level = np.zeros(m) if threshold is None else threshold.astype(np.float64)
                sure = watched & (np.abs(exact - level) > margin)
                assert (chosen[sure] == (exact > level)[sure]).all()
                assert not chosen[~watched].any()
            code = np.where(chosen, exact, 0.0)
            plain = np.where(chosen, problems.correlations(problem, t, np.float32), 0.0)
            error = np.abs(got - code).max()
            assert error <= 2 * np.abs(plain - code).max() + margin
            if not problems.near_cliff(problem, t, code, margin * 4):
                check_edit(out, problem, t, code, plain, margin)
                compared += 1
    assert compared > 20


@pytest.mark.parametrize("coder", ["relu", "jumprelu"])
def test_watched_latents_alone_give_the_full_evaluation(isa, coder):
    """Reporting every latent to policy 1 has all of them computed, which must not change an edit by a bit."""
    compared = 0
    for _, problem, _ in draw(f"full {coder}"):
        everything = problem.policy["undesirable"].copy()
        everything[1] = True
        out, full = (
            kernels.steer_sae(
                problem.z, problem.slots, problem.stored[0], problem.bias, problem.stored[1],
                threshold=problem.threshold if coder == "jumprelu" else None, scales=problem.scales,
                **{**problem.policy, "undesirable": undesirable}, coder=coder, isa=isa,
            )
            for undesirable in (problem.policy["undesirable"], everything)
        )  # fmt: skip
        assert same_bits(out.z, full.z)
        edited = problem.slots != 1  # policy 1 itself now removes more
        assert same_bits(out.doses[edited], full.doses[edited])
        watched = reference.watched_latents(*(problem.policy[n] for n in ("gain", "boost", "undesirable")))
        compared += len(problem.coded) if not watched.all() else 0
    assert compared > 20


def greedy_match(problem, t, got, paths, gram, sign):
    """Return the exact codes of a greedy path that ``got`` agrees with, plain float32's, and the slack."""
    refused = []
    for picked, c in itertools.islice(paths, PATHS):
        kept = np.abs(c) > 0 if sign == "signed" else c > 0
        at = np.array(picked, int)[kept]
        code = np.zeros(len(problem.dec))
        code[at] = c[kept]
        plain = code.copy()
        if sign != "nnls":
            plain[at] = problems.plain_code(problem, t, picked)[kept]
        slack = gram.condition(picked) * (
            problems.correlation_error(problem, t) + 8 * EPS32 * float(np.abs(c).sum())
        )
        error = float(np.abs(got - code).max())
        if error <= 2 * np.abs(plain - code).max() + slack:
            return code, plain, slack
        refused.append((picked, error, slack))
    if len(refused) == PATHS:
        raise problems.Undecidable
    raise AssertionError(f"row {t}: no greedy path gives {np.flatnonzero(got)}; nearest {refused[:3]}")


@pytest.mark.parametrize("gram_dtype", [None, np.float32, np.float16], ids=["nogram", "gram32", "gram16"])
@pytest.mark.parametrize("sign", ["positive", "signed", "nnls"])
@pytest.mark.parametrize("metric", [False, True], ids=["plain", "metric"])
def test_pursuit(isa, metric, sign, gram_dtype):
    compared = undecidable = 0
    for _, problem, k in draw(f"pursuit {sign} {gram_dtype} {metric}", metric):
        gram = None
        if gram_dtype is not None:
            gram = kernels.build_gram(*problem.stored, gram_dtype, scales=problem.scales, isa=isa)

        def call(threads, problem=problem, k=k, gram=gram):
            return kernels.steer_pursuit(
                problem.z, problem.slots, problem.stored[0], problem.bias, problem.stored[1], gram=gram,
                scales=problem.scales, **problem.policy, k=k, sign=sign, k_out=k, isa=isa, threads=threads,
            )  # fmt: skip

        out = run_all_ways(call, problem)
        exact_gram = problems.Gram(problem)
        for t in problem.coded:
            got = code_of(out, problem, t)
            support = set(np.flatnonzero(got).tolist())
            coarse = 2.0**-11 if gram_dtype is np.float16 else 0.0
            paths = problems.greedy_paths(problem, t, support, exact_gram, k, sign, coarse)
            try:
                code, plain, slack = greedy_match(problem, t, got, paths, exact_gram, sign)
            except problems.Undecidable:
                undecidable += 1
                continue
            if not problems.near_cliff(problem, t, code, 4 * slack):
                check_edit(out, problem, t, code, plain, slack)
            compared += 1
    assert compared > 20 and undecidable < compared


@pytest.mark.parametrize("sign", ["positive", "signed"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_coarse_gram_shows_in_no_code(isa, weight, sign):
    """A tolerance, however small, asks for exact entries at every step; without one they come at the end."""
    rng = np.random.default_rng(7)
    for metric in (False, True):
        problem = problems.random_problem(rng, 60, 1000, 100, WEIGHTS[weight], np.float32, metric)
        gram = kernels.build_gram(*problem.stored, np.float16, scales=problem.scales, isa=isa)
        late, early = (
            kernels.steer_pursuit(
                problem.z, problem.slots, problem.stored[0], problem.bias, problem.stored[1], gram=gram,
                scales=problem.scales, **problem.policy, k=24, sign=sign, k_out=24, tol=tol, isa=isa,
            )
            for tol in (0.0, 1e-30)
        )  # fmt: skip
        order = [np.argsort(out.support_index, axis=1, kind="stable") for out in (late, early)]
        index = [
            np.take_along_axis(out.support_index, o, 1) for out, o in zip((late, early), order, strict=True)
        ]
        value = [
            np.take_along_axis(out.support_value, o, 1) for out, o in zip((late, early), order, strict=True)
        ]
        same = (index[0] == index[1]).all(axis=1)
        coded = np.isin(np.arange(len(problem.z)), problem.coded)
        # Picks may differ where correlations are within the Gram matrix's rounding.
        assert same[coded].mean() > 0.7
        size = np.abs(value[1]).max(axis=1, keepdims=True)
        assert (np.abs(value[0] - value[1]) <= 1e-5 * size)[same].all()


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("sign", ["positive", "signed", "nnls"])
def test_a_tolerance_stops_the_pursuit(isa, sign, gram):
    rng = np.random.default_rng(5)
    problem = problems.random_problem(rng, 17, 129, 64, np.float32, np.float32, False)
    matrix = kernels.build_gram(problem.enc, problem.dec, isa=isa) if gram else None
    shared = dict(problem.policy, sign=sign, k=40, k_out=40)
    for tol in (0.3, 0.05, 1.0):
        out = kernels.steer_pursuit(
            problem.z, problem.slots, problem.enc, problem.bias, problem.dec, gram=matrix, tol=tol, isa=isa,
            **shared,
        )  # fmt: skip
        for t in problem.coded:
            row = problem.z[t].astype(np.float64)
            exact = [
                reference.orthogonal_matching_pursuit(
                    row, problem.enc.astype(np.float64), problem.bias.astype(np.float64),
                    reference.GramColumns(problem.enc.astype(np.float64), problem.dec.astype(np.float64)),
                    problem.dec.astype(np.float64), k=40, sign=sign, tol=scaled,
                )
                for scaled in (tol * (1 - 1e-4), tol * (1 + 1e-4))
            ]  # fmt: skip
            counts = {int(np.count_nonzero(c)) for c in exact}
            assert int((out.support_index[t] >= 0).sum()) in counts


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["gram32", "gram16"])
def test_build_gram(isa, dtype):
    for rng, problem, _ in draw(f"gram {dtype}", metric=True):
        threads = int(rng.integers(1, 4))
        got = kernels.build_gram(*problem.stored, dtype, scales=problem.scales, isa=isa, threads=threads)
        size = np.abs(problem.enc.astype(np.float64)) @ np.abs(problem.dec.astype(np.float64)).T
        exact = problems.Gram(problem).matrix
        bound = 4 * EPS32 * size + (2.0**-11 * np.abs(exact) + 2.0**-25 if dtype is np.float16 else 0)
        assert (np.abs(got.astype(np.float64) - exact) <= bound).all()
