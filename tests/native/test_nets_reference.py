"""The elastic net of every instruction set and dtype: optimality conditions, objective, and the edit.

A code is judged by what makes it the minimiser, in float64 on the matrices as they are stored; what is edited
with it is compared given that code. How near it is to the reference's own code follows from the objective.
"""

from __future__ import annotations

import itertools

import kernel_problems as problems
import numpy as np
import pytest
from kernel_problems import DTYPES, EPS32, WEIGHTS
from test_kernels_reference import ISAS, check_edit, code_of, run_all_ways

from daco_rt.ops import numpy as kernels
from daco_rt.ops import reference
from daco_rt.ops.elastic_net import elastic_net, objective

STEP = 2e-6
"""Codes may be this far from their coordinate's minimiser, times ‖z‖, in the length of c_j·A_j."""
PENALTIES = ((0.95, 0.05), (0.7, 0.3), (0.2, 0.1))


@pytest.fixture(params=ISAS)
def isa(request):
    try:
        kernels.build_gram(np.eye(1, dtype=np.float32), np.eye(1, dtype=np.float32), isa=request.param)
    except NotImplementedError as error:
        pytest.skip(str(error))
    return request.param


def draw(seed: str, metric: bool):
    rng = np.random.default_rng(list(seed.encode()))
    for number, (weight, activation) in enumerate(itertools.product(WEIGHTS.values(), DTYPES.values())):
        rows, atoms = (17, 9, 1)[number % 3], int(rng.choice((1, 7, 33, 129, 400)))
        # Where E and A are rounded apart, fewer dimensions than atoms leave G without a definite part.
        dim = int(rng.choice((64, 100) if metric else (3, 17, 64, 100)))
        problem = problems.random_problem(rng, rows, atoms, dim, weight, activation, metric)
        if number % 2:  # negative parts too
            problem.z[::2] = -problem.z[::2]
        yield problem, *PENALTIES[number % len(PENALTIES)]


def conditions_broken(problem, t, code, gram, tau, alpha, sign) -> float:
    """The longest step that a coordinate of row t's code would take, relative to ‖z‖, beyond rounding."""
    row = problem.z[t].astype(np.float64)
    norm = float(np.linalg.norm(row))
    error = problems.correlation_error(problem, t)
    error += 8 * EPS32 * float(np.abs(code).sum()) * gram.largest
    left = problems.correlations(problem, t) - gram.matrix @ code
    diagonal, lengths = np.diag(gram.matrix), np.linalg.norm(problem.dec.astype(np.float64), axis=1)
    target = left + diagonal * code
    size = np.maximum(np.abs(target) - alpha * tau * norm, 0.0)
    if sign != "signed":
        size[target < 0] = 0.0
    usable = diagonal > 0
    wanted = np.zeros_like(code)
    curvature = diagonal[usable] + alpha * (1 - tau)
    wanted[usable] = np.copysign(size, target)[usable] / curvature
    step = np.zeros_like(code)
    step[usable] = np.maximum(np.abs(wanted - code)[usable] - error / curvature, 0.0) * lengths[usable]
    return float(step.max(initial=0.0)) / norm


@pytest.mark.parametrize("gram_dtype", [None, np.float32, np.float16], ids=["nogram", "gram32", "gram16"])
@pytest.mark.parametrize("sign", ["positive", "signed", "nnls"])
@pytest.mark.parametrize("metric", [False, True], ids=["plain", "metric"])
def test_elastic_net(isa, metric, sign, gram_dtype):
    compared = active = 0
    for problem, tau, alpha in draw(f"net {sign} {gram_dtype} {metric}", metric):
        gram = None
        if gram_dtype is not None:
            gram = kernels.build_gram(*problem.stored, gram_dtype, scales=problem.scales, isa=isa)

        def call(threads, problem=problem, gram=gram, tau=tau, alpha=alpha):
            return kernels.steer_pursuit(
                problem.z, problem.slots, problem.stored[0], problem.bias, problem.stored[1], gram=gram,
                scales=problem.scales, **problem.policy, coder="elastic_net", sign=sign, tau=tau, alpha=alpha,
                k_out=len(problem.dec), isa=isa, threads=threads,
            )  # fmt: skip

        out = run_all_ways(call, problem)
        exact_gram = problems.Gram(problem)
        for t in problem.coded:
            code = code_of(out, problem, t)
            assert sign == "signed" or (code >= 0).all()
            row = problem.z[t].astype(np.float64)
            norm = float(np.linalg.norm(row))
            if norm == 0:
                assert not code.any()
                continue
            assert conditions_broken(problem, t, code, exact_gram, tau, alpha, sign) <= STEP
            slack = problems.correlation_error(problem, t)
            if not problems.near_cliff(problem, t, code, slack):
                check_edit(out, problem, t, code, code, slack)
            if not metric:
                enc, dec = problem.enc.astype(np.float64), problem.dec.astype(np.float64)
                lengths = np.linalg.norm(dec, axis=1)
                start, matrix = problems.correlations(problem, t), exact_gram.matrix
                best = elastic_net(
                    row, enc, problem.bias.astype(np.float64), matrix.T.__getitem__, np.diag(matrix), lengths,
                    tau=tau, alpha=alpha, signed=sign == "signed",
                )  # fmt: skip
                got, least = (
                    objective(c, start, matrix, tau=tau, alpha=alpha, norm=norm) for c in (code, best)
                )
                assert got <= least + 1e-9 + 1e-6 * abs(least)
            compared += 1
            active += np.count_nonzero(code)
    assert compared > 30 and active > compared


def test_the_reference_meets_the_optimality_conditions():
    rng = np.random.default_rng(2)
    problem = problems.random_problem(rng, 17, 129, 40, np.float32, np.float32, False)
    out = reference.steer_pursuit(
        problem.z, problem.slots, problem.enc, problem.bias, problem.dec, **problem.policy,
        coder="elastic_net", k_out=129,
    )  # fmt: skip
    gram = problems.Gram(problem)
    for t in problem.coded:
        code = np.zeros(129)
        on = out.support_index[t] >= 0
        code[out.support_index[t][on]] = out.support_value[t][on]
        if problem.z[t].any():
            assert conditions_broken(problem, t, code, gram, 0.95, 0.05, "positive") <= 1e-12


def test_row_size_changes_nothing_but_the_scale(isa):
    rng = np.random.default_rng(3)
    problem = problems.random_problem(rng, 3, 129, 64, np.float32, np.float32, False)
    problem.bias[:] = 0
    shared = dict(problem.policy, coder="elastic_net", k_out=129, isa=isa)
    shared["limits"] = np.zeros_like(shared["limits"])
    slots = np.ones(3, np.int32)
    big, small = (
        kernels.steer_pursuit(
            problem.z * np.float32(2.0**scale), slots, problem.enc, problem.bias, problem.dec, **shared
        )
        for scale in (40, -40)
    )
    np.testing.assert_array_equal(big.support_index, small.support_index)
    np.testing.assert_array_equal(big.support_value, small.support_value * np.float32(2.0**80))


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize(("tau", "alpha"), [(1.0, 0.05), (0.0, 0.5), (0.95, 10.0)])
def test_extreme_penalties(isa, tau, alpha, gram):
    """No ridge on a dictionary with duplicates, no L1 term at all, and a penalty that leaves nothing."""
    rng = np.random.default_rng(4)
    problem = problems.random_problem(rng, 9, 60, 40, np.float32, np.float32, False)
    matrix = kernels.build_gram(problem.enc, problem.dec, isa=isa) if gram else None
    for sign in ("positive", "signed"):
        out = kernels.steer_pursuit(
            problem.z, problem.slots, problem.enc, problem.bias, problem.dec, gram=matrix, **problem.policy,
            coder="elastic_net", sign=sign, tau=tau, alpha=alpha, k_out=60, isa=isa,
        )  # fmt: skip
        exact = problems.Gram(problem)
        for t in problem.coded:
            code = code_of(out, problem, t)
            assert alpha < 1 or not code.any()
            if problem.z[t].any():
                assert conditions_broken(problem, t, code, exact, tau, alpha, sign) <= STEP
