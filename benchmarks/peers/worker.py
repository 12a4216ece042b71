"""One peer in a process and an environment of its own.

    python worker.py METHOD FOLDER THREADS

Reads ``atoms.npy`` [m, d], ``gram.npy`` [m, m], ``z.npy`` [T, d] and ``bias.npy`` [m], all fp32, and
``settings.json`` from FOLDER, then answers lines on its standard input:

    run T     do the first T rows once; answers with the seconds it took
    save T    do them once more and write index.npy [T, c] (-1 fills up) and value.npy [T, c] to FOLDER

What is the same for every row (transposes, norms, layouts) is done before the first answer, "ready".
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

THREADS = sys.argv[3]
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = THREADS

import numpy as np  # noqa: E402

FOLDER = Path(sys.argv[2])


def load(name: str) -> np.ndarray:
    return np.load(FOLDER / f"{name}.npy", allow_pickle=False)


def torch_topk(settings: dict) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """mm, relu, topk and the decoder's rows, as a TopK SAE is written."""
    import torch

    torch.set_num_threads(int(THREADS))
    z, atoms, bias = (torch.from_numpy(load(name)) for name in ("z", "atoms", "bias"))
    decoder = atoms.clone()

    def run(t: int) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            if t == 1:
                before = torch.mv(atoms, z[0]).add_(bias)[None]
            else:
                before = torch.addmm(bias, z[:t], atoms.T)
            code, index = before.relu_().topk(settings["k"], dim=1)
            torch.bmm(code.unsqueeze(1), decoder[index])
            return index.numpy(), code.numpy()

    return run


def omp_gpu(settings: dict) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """orthogonal-matching-pursuit-gpu, variant v0, on the CPU with the Gram matrix given."""
    import torch
    from orthogonal_matching_pursuit_gpu import omp_v0

    torch.set_num_threads(int(THREADS))
    z, atoms, gram = (torch.from_numpy(load(name)) for name in ("z", "atoms", "gram"))

    def run(t: int) -> tuple[np.ndarray, np.ndarray]:
        index, code, _ = omp_v0(atoms.T, z[:t], gram, n_nonzero_coefs=settings["k"])
        return index.numpy(), code.squeeze(-1).numpy()

    return run


def sklearn_omp(settings: dict) -> Callable[[int], np.ndarray]:
    """scikit-learn's orthogonal_mp_gram, with the products with the atoms as part of the call."""
    from sklearn.linear_model import orthogonal_mp_gram

    z, atoms, gram = load("z"), load("atoms"), load("gram")

    def run(t: int) -> np.ndarray:
        warnings.simplefilter("ignore")
        code = orthogonal_mp_gram(gram, atoms @ z[:t].T, n_nonzero_coefs=settings["k"])
        return code.reshape(len(gram), t).T

    return run


def _columns(name: str) -> np.ndarray:
    """Rows as columns in Fortran order, which is the same memory."""
    return load(name).T


def spams_omp(settings: dict) -> Callable[[int], np.ndarray]:
    """spams.omp, which makes what it needs of the Gram matrix itself."""
    import spams

    z, atoms = _columns("z"), _columns("atoms")
    # Without eps it reads a bound that nobody set, and in some processes stops before the first atom.
    return lambda t: spams.omp(z[:, :t], atoms, L=settings["k"], eps=0.0, numThreads=int(THREADS)).T


def _unit(z: np.ndarray) -> np.ndarray:
    return np.asfortranarray(z / np.linalg.norm(z, axis=0))


def spams_lasso(settings: dict) -> Callable[[int], np.ndarray]:
    """spams.lasso in its elastic-net form on unit rows, c ≥ 0."""
    import spams

    z, atoms = _unit(_columns("z")), _columns("atoms")
    l1, l2 = settings["alpha"] * settings["tau"], settings["alpha"] * (1 - settings["tau"])
    return lambda t: (
        spams.lasso(z[:, :t], atoms, lambda1=l1, lambda2=l2, mode=2, pos=True, numThreads=int(THREADS)).T
    )


def spams_lasso_gram(settings: dict) -> Callable[[int], np.ndarray]:
    """The same with the Gram matrix and the products with the atoms given: what it takes is the descent."""
    import spams

    z, atoms = _unit(_columns("z")), load("atoms")
    l1, l2 = settings["alpha"] * settings["tau"], settings["alpha"] * (1 - settings["tau"])
    # With a Gram matrix spams does not add the quadratic term itself.
    gram = load("gram")
    gram[np.diag_indices(len(gram))] += np.float32(l2)
    gram, products = gram.T, np.asfortranarray(atoms @ z)
    return lambda t: spams.lasso(
        z[:, :t], Q=gram, q=products[:, :t], lambda1=l1, lambda2=0.0, mode=2, pos=True,
        numThreads=int(THREADS),
    ).T  # fmt: skip


METHODS = {
    "torch_topk": torch_topk,
    "omp_gpu": omp_gpu,
    "sklearn_omp": sklearn_omp,
    "spams_omp": spams_omp,
    "spams_lasso": spams_lasso,
    "spams_lasso_gram": spams_lasso_gram,
}


def sparse(result) -> tuple[np.ndarray, np.ndarray]:
    """Index and value of what a method returned: those two, a dense array, or a scipy matrix."""
    if isinstance(result, tuple):
        index, value = result
        return index.astype(np.int64), value.astype(np.float32)
    dense = result.toarray() if hasattr(result, "toarray") else np.asarray(result)
    width = max(1, int((dense != 0).sum(axis=1).max()))
    index = np.full((len(dense), width), -1, np.int64)
    value = np.zeros((len(dense), width), np.float32)
    for t, row in enumerate(dense):
        support = np.flatnonzero(row)
        index[t, : len(support)], value[t, : len(support)] = support, row[support]
    return index, value


def main() -> None:
    settings = json.loads((FOLDER / "settings.json").read_text())
    # Libraries print to the standard output now and then: answers go out on a copy of it.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    run = METHODS[sys.argv[1]](settings)
    print("ready", file=answers)
    for line in sys.stdin:
        order, rows = line.split()
        start = time.perf_counter()
        result = run(int(rows))
        seconds = time.perf_counter() - start
        if order == "save":
            index, value = sparse(result)
            np.save(FOLDER / "index.npy", index)
            np.save(FOLDER / "value.npy", value)
        print(seconds, file=answers)


if __name__ == "__main__":
    main()
