"""A harvest on a local Ray of two workers: the same bytes as one process gives, errors as one sentence.

Ray is no part of the test environment: `make test-ray` installs it into a folder of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_harvest import loaded, plan, run, tree

from daco_rt.dictionary.distributed import harvest_on_ray
from daco_rt.dictionary.harvest import ShardWorker
from daco_rt.dictionary.means import open_means
from daco_rt.errors import DacoError
from daco_rt.sae import open_store

WHEELS = Path(__file__).resolve().parents[2] / "build" / "ray-wheels"
CONCEPTS = 16

HEAD = """
import os, sys
from functools import partial
from pathlib import Path
import ray, tiny_harvest
from daco_rt.dictionary.distributed import harvest_on_ray
from daco_rt.errors import DacoError
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
folder = Path(sys.argv[1])
"""


def environment() -> dict[str, str]:
    paths = [str(Path(__file__).parent), str(WHEELS)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "RAY_USAGE_STATS_ENABLED": "0"}


def on_ray(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HEAD + code, str(folder)],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


needs_ray = pytest.mark.skipif(
    not (WHEELS / "ray").is_dir(), reason="Ray is not installed; make test-ray installs it and runs this"
)


@needs_ray
@pytest.mark.slow
def test_two_workers_give_the_bytes_of_one_process(tmp_path: Path):
    run(tmp_path / "one", CONCEPTS)
    (tmp_path / "processes").mkdir()
    # One shard is there already, made by a process without Ray.
    part = plan(tmp_path / "many", CONCEPTS)

    ShardWorker(part, part.begin(*loaded()), *loaded()).make(3)
    code = f"""
load = partial(tiny_harvest.loaded_noting, {str(tmp_path / "processes")!r})
means = harvest_on_ray(load, tiny_harvest.plan(folder, {CONCEPTS}), workers=2, progress=False)
print(len(means.missing), means.stimuli)
"""
    done = on_ray(code, tmp_path / "many")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["0", str(3 * CONCEPTS)]
    # Two workers at least; the one that began the folder may be a third.
    assert len(list((tmp_path / "processes").iterdir())) in (2, 3)
    one, many = open_means(tmp_path / "one" / "means"), open_means(tmp_path / "many" / "means", verify=True)
    for block in one.blocks:
        mean = one.mean(block)
        assert np.abs(many.mean(block) - mean).max() <= 1e-6 * np.abs(mean).max()
        assert np.array_equal(one.count(block), many.count(block))
    open_store(tmp_path / "many" / "store", verify=True)
    assert tree(tmp_path / "one") == tree(tmp_path / "many")


@needs_ray
@pytest.mark.slow
def test_killed_workers_and_a_killed_harvest_change_nothing(tmp_path: Path):
    run(tmp_path / "one", CONCEPTS)
    (tmp_path / "deaths").mkdir()
    code = f"""
load = partial(tiny_harvest.loaded_dying, {str(tmp_path / "deaths")!r}, 3)
harvest_on_ray(load, tiny_harvest.plan(folder, {CONCEPTS}), workers=2, progress=False)
"""
    many = tmp_path / "many"
    # The whole harvest, driver and workers, is killed once its first shard is there.
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + code, str(many)], env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not list(many.glob("means/commits/*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = on_ray(code, many)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "deaths").iterdir())) == 3
    one, found = open_means(tmp_path / "one" / "means"), open_means(many / "means", verify=True)
    for block in one.blocks:
        mean = one.mean(block)
        assert np.abs(found.mean(block) - mean).max() <= 1e-6 * np.abs(mean).max()
    assert tree(many) == tree(tmp_path / "one")


@needs_ray
@pytest.mark.slow
def test_an_error_in_a_worker_is_one_sentence(tmp_path: Path):
    run(tmp_path, CONCEPTS)
    done = on_ray(
        f"""
for load, concepts in ((tiny_harvest.loaded, {CONCEPTS - 1}), (tiny_harvest.killed, {CONCEPTS})):
    try:
        harvest_on_ray(load, tiny_harvest.plan(folder, concepts), progress=False)
    except DacoError as error:
        print(error)
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    # Ray reports dead workers on standard output by itself, whatever it is told about logs.
    first, second = (line for line in done.stdout.splitlines() if "(raylet)" not in line and line)
    assert "begun with another concepts" in first and "the workers on Ray failed (" in second
    assert second.endswith("run the same command again to go on") and "Traceback" not in done.stdout


@pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import ray"], capture_output=True).returncode == 0,
    reason="Ray is installed",
)
def test_without_ray_the_extra_is_named(tmp_path: Path):
    with pytest.raises(DacoError, match=r"pip install 'daco-rt\[ray\]'"):
        harvest_on_ray(lambda: (None, None), plan(tmp_path))
