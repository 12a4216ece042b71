"""Running an exported bundle: sessions, the generation loop, sampling, streaming, telemetry.

>>> from daco_rt.runtime import run_generate
>>> run_generate("bundle", "What is this?", images=["dagger.png"]).text              # doctest: +SKIP

Importing this package loads numpy only; ONNX Runtime and transformers come with the first session.
"""

from __future__ import annotations

from daco_rt.runtime.generate import Generator, run_generate
from daco_rt.runtime.onnx_session import OnnxSession
from daco_rt.runtime.open import open_session
from daco_rt.runtime.positions import token_slots
from daco_rt.runtime.processor import Processor
from daco_rt.runtime.request import GenerateRequest, GenerateResult, TextEvent, Timings
from daco_rt.runtime.sampling import Sampling
from daco_rt.runtime.session import DecoderSession, SessionInfo
from daco_rt.runtime.telemetry import AnswerTelemetry, telemetry_table
from daco_rt.runtime.tensorrt_session import TensorRTSession

__all__ = [
    "AnswerTelemetry",
    "DecoderSession",
    "GenerateRequest",
    "GenerateResult",
    "Generator",
    "OnnxSession",
    "Processor",
    "Sampling",
    "SessionInfo",
    "TensorRTSession",
    "TextEvent",
    "Timings",
    "open_session",
    "run_generate",
    "telemetry_table",
    "token_slots",
]
