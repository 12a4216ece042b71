"""Concept steering inside the inference engine of multimodal LLMs.

Importing the package is light: no torch, no ONNX Runtime. Sub-packages load what they need.
"""

from __future__ import annotations

__version__ = "0.1.0"
