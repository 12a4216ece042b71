"""From words to packs by one configuration file: every step, and only those that are not up to date."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from daco_rt.pipeline.config import BuildConfig, read_config

if TYPE_CHECKING:
    from daco_rt.pipeline.run import BuildReport, StepReport, build, plan

__all__ = ["BuildConfig", "BuildReport", "StepReport", "build", "plan", "read_config"]


def __getattr__(name: str) -> Any:
    # Checking a configuration must not cost the import of torch.
    if name in __all__:
        return getattr(import_module("daco_rt.pipeline.run"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
