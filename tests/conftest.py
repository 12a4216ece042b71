"""Fixtures that several suites share. Nothing here needs a network or a GPU."""

from __future__ import annotations

import os

# No test may reach for a model hub, and two threads a process keep a small machine responsive.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
