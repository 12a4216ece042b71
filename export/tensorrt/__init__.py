"""Export for TensorRT: the graph in its dialect, the engine, and the recipe where no engine can be built.

Nothing here imports TensorRT when it is imported; the engine builder takes the module as an argument.
"""

from __future__ import annotations
