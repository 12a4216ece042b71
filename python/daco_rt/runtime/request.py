"""What is asked of the runtime and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from daco_rt.errors import DacoError
from daco_rt.runtime.sampling import Sampling

if TYPE_CHECKING:
    from daco_rt.runtime.images import ImageSource
    from daco_rt.runtime.processor import Message
    from daco_rt.runtime.telemetry import AnswerTelemetry


@dataclass(frozen=True)
class GenerateRequest:
    """One question to answer.

    Example
    -------
    >>> GenerateRequest("What is this?", images=["dagger.png"], policy="default").max_new_tokens
    128
    """

    prompt: str | Sequence[Message] | Sequence[int]
    """A user's question, or whole chat messages (see `daco_rt.runtime.processor.Message`); with ``raw`` also
    token ids."""
    images: Sequence[ImageSource] = ()
    """Paths, PIL images or uint8 arrays, in the order of their placeholders."""
    policy: str | None = None
    """Policy name, "off" or "observe"; None is the pack's default policy."""
    max_new_tokens: int = 128
    """Most tokens to generate."""
    sampling: Sampling = field(default_factory=Sampling)
    """How tokens are chosen; greedy by default."""
    stop: Sequence[str] = ()
    """The answer ends before the first of these strings, wherever token boundaries fall."""
    seed: int | None = None
    """Seed of this request's draws; None draws a fresh one."""
    max_tiles: int | None = None
    """Most tiles an image is cut into; None leaves it to the checkpoint's processor."""
    raw: bool = False
    """Take a prompt, text or token ids, as it stands, without the chat template."""
    ignore_eos: bool = False
    """Go on past end-of-answer tokens (for timing)."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise DacoError(f"max_new_tokens must be 1 or greater, got {self.max_new_tokens}")
        if self.seed is not None and self.seed < 0:
            raise DacoError(f"seed must be 0 or greater, got {self.seed}")
        if isinstance(self.stop, str):
            raise DacoError("stop must be a list of strings, got one string; put it in a list")
        if isinstance(self.images, str):
            raise DacoError("images must be a list of paths or pictures, got one string; put it in a list")
        if any(not s for s in self.stop):
            raise DacoError("stop strings must not be empty")


@dataclass
class Timings:
    """Seconds spent; a request that shared a batch shares its times."""

    prepare: float = 0.0
    """Tokenising, tiling."""
    vision: float = 0.0
    """Vision tower, its loading included at the first picture."""
    prefill: float = 0.0
    """The prompt's run through the decoder."""
    decode: float = 0.0
    """From the first token to this request's last."""
    batch: int = 1
    """Requests in the batch."""

    @property
    def first_token(self) -> float:
        """Seconds from the start to the first token."""
        return self.prepare + self.vision + self.prefill


@dataclass(frozen=True)
class GenerateResult:
    """One answer."""

    text: str
    """The answer without special tokens and without the stop string."""
    token_ids: list[int]
    """Every generated token, the end-of-answer token included."""
    finish_reason: str
    """"eos", "stop" (a stop string) or "length"."""
    policy: str
    """Name of the policy that was in force."""
    prompt_tokens: int
    """Tokens of the prompt, image tokens included."""
    image_tokens: int
    """How many of them are image tokens."""
    telemetry: AnswerTelemetry | None
    """What steering reported; None under "off"."""
    timings: Timings

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens a second of this request, the first one (prefill) left out; 0 for a single token."""
        return (len(self.token_ids) - 1) / self.timings.decode if self.timings.decode > 0 else 0.0

    def to_json(
        self, *, tokens: bool = False, token_text: Callable[[int], str] | None = None
    ) -> dict[str, Any]:
        """Return the answer ready for ``json.dumps``; ``tokens`` adds the telemetry of every steered row."""
        telemetry = None
        if self.telemetry is not None:
            telemetry = self.telemetry.to_json(token_text) if tokens else self.telemetry.summary()
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "policy": self.policy,
            "prompt_tokens": self.prompt_tokens,
            "image_tokens": self.image_tokens,
            "generated_tokens": len(self.token_ids),
            "token_ids": self.token_ids,
            "tokens_per_second": self.tokens_per_second,
            "timings": {
                "prepare_s": self.timings.prepare,
                "vision_s": self.timings.vision,
                "prefill_s": self.timings.prefill,
                "decode_s": self.timings.decode,
                "batch": self.timings.batch,
            },
            "telemetry": telemetry,
        }


@dataclass(frozen=True)
class TextEvent:
    """A piece of an answer as it comes."""

    index: int
    """Which request, counted from 0."""
    text: str
    """Text that is final; the pieces of a request add up to its ``result.text``."""
    result: GenerateResult | None = None
    """Set on the last event of a request."""
