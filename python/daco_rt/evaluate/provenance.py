"""Where a run's numbers come from: commit, machine, versions."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from daco_rt import __version__
from daco_rt._machine import machine


def provenance() -> dict[str, Any]:
    """Return version and commit of daco_rt, the machine, and the versions of what computed.

    Example
    -------
    >>> sorted(provenance())
    ['commit', 'daco_rt', 'machine', 'versions']
    """
    names = ("onnxruntime", "numpy", "torch", "transformers")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {
        "daco_rt": __version__,
        "commit": _commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **versions},
    }


def _commit() -> str:
    """The repository's commit, with "+" where files differ from it; empty outside a clone."""
    try:
        here = Path(__file__).resolve().parent
        run = ["git", "-C", str(here)]
        head = subprocess.run(
            [*run, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run([*run, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
