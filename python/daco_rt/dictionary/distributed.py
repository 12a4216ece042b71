"""A harvest on many processes or machines with Ray Data; each worker makes whole shards.

The map step is the function that one process runs for each shard, so there is nothing to merge: workers write
their shards into the folder, which must lie where all of them can reach it. A worker that dies has its shard
made again by another; a harvest that is stopped goes on, with Ray or without.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from daco_rt.dictionary.harvest import HarvestPlan, ShardWorker
from daco_rt.dictionary.means import ConceptMeans, open_means
from daco_rt.errors import ArtifactError, DacoError

Load = Callable[[], tuple[Any, Any]]
"""Returns model and processor; called once in each worker, so it must be one that can be sent there."""


def harvest_on_ray(
    load: Load,
    plan: HarvestPlan,
    *,
    workers: int = 2,
    cpus: float = 1.0,
    gpus: float = 0.0,
    overwrite: bool = False,
    progress: bool = True,
) -> ConceptMeans:
    """Run a harvest on a Ray cluster: the one of ``RAY_ADDRESS``, or one that is started on this machine.

    On equal devices and with equal numbers of threads the result is that of one process, bit for bit.

    Parameters
    ----------
    load : makes model and processor; each worker calls it once.
    plan : what is harvested. Folders and pictures must have the same path on all machines.
    workers : processes that hold a model each.
    cpus, gpus : what one of them needs; torch uses as many threads as ``cpus`` says.
    overwrite : begin anew where means are.
    progress : show a progress bar on standard error.

    Raises
    ------
    DacoError
        If Ray is not installed, a worker meets one of the errors of ``harvest_means``, or workers die again
        and again.
    ArtifactError
        If the workers wrote their shards where this process does not see them.

    Example
    -------
    >>> harvest_on_ray(partial(load_torch, folder, "cuda", "bf16"), plan, workers=8, gpus=1)
    """
    ray = _ray()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if workers < 1:
        raise DacoError(f"workers must be at least 1, got {workers}")
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        plan_ref = ray.put(plan)
        begin = ray.remote(num_cpus=cpus, num_gpus=gpus)(_begin)
        _raise(ray.get(begin.remote(load, plan_ref, cpus, overwrite)))
        means = _seen(plan.output)
        missing = plan.missing(means)
        if missing:
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            shards = ray.data.from_items(
                [{"shard": shard} for shard in missing], override_num_blocks=len(missing)
            )
            made = shards.map_batches(
                _Worker,
                fn_constructor_args=(load, plan_ref, cpus),
                batch_size=1,
                concurrency=min(workers, len(missing)),
                num_cpus=cpus,
                num_gpus=gpus,
            )
            with plan.show(means, progress) as advance:
                for row in made.iter_rows():
                    _raise(row["error"])
                    advance(row["stimuli"])
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[:200]
        raise DacoError(
            f"the workers on Ray failed ({reason}); what was harvested is kept in {plan.output}: run the "
            "same command again to go on"
        ) from error
    finally:
        if started:
            ray.shutdown()
    _seen(plan.output)
    return open_means(plan.output)


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise DacoError(
            "a distributed harvest needs Ray Data, which is not installed; install it with: "
            "pip install 'daco-rt[ray]'"
        ) from error
    return ray


def _seen(path: Path) -> ConceptMeans:
    try:
        return open_means(path, complete=False)
    except ArtifactError as error:
        raise ArtifactError(
            f"the workers' folder {path} is not seen here ({error}); use one that all machines share"
        ) from error


def _raise(message: str) -> None:
    if message:
        raise DacoError(message)


def _begin(load: Load, plan: HarvestPlan, cpus: float, overwrite: bool) -> str:
    """Begin the folder in a worker, which has the device; return an error's sentence or nothing."""
    try:
        plan.begin(*_loaded(load, cpus), overwrite=overwrite)
    except DacoError as error:
        return str(error)
    return ""


def _loaded(load: Load, cpus: float) -> tuple[Any, Any]:
    import torch

    torch.set_num_threads(max(1, int(cpus)))
    return load()


class _Worker:
    """What Ray Data keeps in each process: a model, and the shard function over it."""

    def __init__(self, load: Load, plan_ref: Any, cpus: float) -> None:
        import ray

        plan: HarvestPlan = ray.get(plan_ref)
        model, processor = _loaded(load, cpus)
        self._worker = ShardWorker(plan, open_means(plan.output, complete=False), model, processor)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        # A DacoError travels as its sentence: Ray would wrap the exception in a traceback of its own.
        stimuli, errors = [], []
        for shard in batch["shard"]:
            try:
                stimuli.append(self._worker.make(int(shard)))
                errors.append("")
            except DacoError as error:
                stimuli.append(0)
                errors.append(str(error))
        return {"shard": list(batch["shard"]), "stimuli": stimuli, "error": errors}
