"""A model provider of Inspect: ``daco/PATH``, a bundle, or a checkpoint in torch, under a policy.

Inspect asks one question at a time, from many tasks at once. Questions that wait are answered together, up to
``batch_size``: whoever gets hold of the model runs everyone's.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    Content,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from daco_rt.errors import DacoError
from daco_rt.evaluate.subject import Answer, BundleSubject, Subject
from daco_rt.runtime.policies import choose_policy
from daco_rt.runtime.request import GenerateRequest
from daco_rt.runtime.sampling import Sampling

MAX_NEW_TOKENS = 256
LINGER = 0.01
"""Seconds for which the first question of a batch waits for others."""
_STOPS: dict[str, Any] = {"eos": "stop", "stop": "stop", "length": "max_tokens"}


@dataclass
class _Pending:
    request: GenerateRequest
    answer: Answer | None = None
    error: Exception | None = field(default=None)

    @property
    def done(self) -> bool:
        return self.answer is not None or self.error is not None


class DacoModel(ModelAPI):
    """Answers Inspect's questions.

    ``inspect eval … --model daco/bundles/smol-internvl -M policy=default``: the model's name is a bundle, or
    with ``-M family=internvl`` a checkpoint that runs in torch, steered by the pack of ``-M pack=…``.

    Parameters
    ----------
    model_name : what comes after ``daco/``.
    policy : name, "off" or "observe"; by default the pack's own.
    family, pack, device, dtype : of a checkpoint in torch.
    batch_size, threads : how it runs.
    system : a system prompt that goes before every question.

    Raises
    ------
    DacoError
        Nothing usable is there, the policy is unknown, or tools are asked for.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (the base class's own default)
        policy: str | None = None,
        family: str | None = None,
        pack: str | None = None,
        batch_size: int = 8,
        threads: int | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        system: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        if unknown:
            raise DacoError(f"daco/{model_name}: model argument '{next(iter(unknown))}' is unknown")
        self.policy, self.system = policy, system
        self.subject: Subject
        if family is None:
            if pack is not None:
                raise DacoError(f"daco/{model_name}: a bundle brings its own pack; -M pack needs -M family")
            bundle = BundleSubject(Path(model_name), threads=threads, batch_size=batch_size)
            self.subject, loaded = bundle, bundle.generator.session.pack
        else:
            from daco_rt.evaluate.torch_subject import TorchSubject

            steered = TorchSubject(
                family, model_name, pack=pack, batch_size=batch_size, device=device, dtype=dtype
            )
            self.subject, loaded = steered, steered.pack
        choose_policy(loaded, policy)
        self._waiting: list[_Pending] = []
        self._turn = anyio.Lock()

    def max_connections(self) -> int:
        """Twice a batch, so that the next one lines up while one runs."""
        return 2 * self.subject.batch_size

    def connection_key(self) -> str:
        """One model, one queue."""
        return f"daco/{self.model_name}"

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """Answer one conversation, together with others that wait."""
        if tools:
            raise DacoError(f"daco/{self.model_name} calls no tools; leave them out of the task")
        one = _Pending(self._request(input, config))
        self._waiting.append(one)
        async with self._turn:
            while not one.done:
                await anyio.sleep(LINGER)
                batch = self._waiting[: self.subject.batch_size]
                del self._waiting[: len(batch)]
                await anyio.to_thread.run_sync(self._run, batch)
        if one.error is not None:
            raise one.error
        assert one.answer is not None
        return self._output(one.answer)

    def _run(self, batch: Sequence[_Pending]) -> None:
        try:
            answers = self.subject.run([one.request for one in batch])
        except Exception as error:
            for one in batch:
                one.error = error
            return
        for one, answer in zip(batch, answers, strict=True):
            one.answer = answer

    def _request(self, messages: Sequence[ChatMessage], config: GenerateConfig) -> GenerateRequest:
        pictures: list[Any] = []
        turns: list[dict[str, Any]] = []
        if self.system is not None and not any(message.role == "system" for message in messages):
            turns.append({"role": "system", "content": self.system})
        for message in messages:
            if message.role == "tool":
                raise DacoError(f"daco/{self.model_name} reads no tool results; leave tools out of the task")
            turns.append({"role": message.role, "content": _content(message.content, pictures)})
        return GenerateRequest(
            turns,
            images=pictures,
            policy=self.policy,
            max_new_tokens=config.max_tokens or MAX_NEW_TOKENS,
            sampling=Sampling(
                temperature=config.temperature or 0.0,
                top_p=1.0 if config.top_p is None else config.top_p,
                top_k=config.top_k or 0,
            ),
            stop=tuple(config.stop_seqs or ()),
            seed=config.seed,
        )

    def _output(self, answer: Answer) -> ModelOutput:
        steering = {
            "policy": answer.policy,
            "rows": answer.rows,
            "edited_rows": answer.edited_rows,
            "removed_dose": answer.removed_dose,
            "applied_dose": answer.applied_dose,
            "removed": answer.removed,
        }
        # A prompt that does not fit is reported as such, not answered with nothing.
        return ModelOutput(
            model=f"daco/{self.model_name}",
            choices=[
                ChatCompletionChoice(
                    message=ChatMessageAssistant(content=answer.text, source="generate"),
                    stop_reason="model_length" if answer.error else _STOPS[answer.finish_reason],
                )
            ],
            usage=ModelUsage(
                input_tokens=answer.prompt_tokens,
                output_tokens=len(answer.token_ids),
                total_tokens=answer.prompt_tokens + len(answer.token_ids),
            ),
            metadata={"steering": steering},
            error=answer.error or None,
        )


def _content(content: str | list[Content], pictures: list[Any]) -> Any:
    """A message's content in the runtime's form; pictures are opened and collected in their order."""
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for part in content:
        if part.type == "text":
            parts.append({"type": "text", "text": part.text})
        elif part.type == "image":
            pictures.append(_picture(part.image))
            parts.append({"type": "image"})
        else:
            raise DacoError(f"a message holds {part.type}; this model takes text and pictures")
    return parts


def _picture(source: str) -> Any:
    if not source.startswith("data:"):
        return Path(source)
    from PIL import Image

    data = base64.b64decode(source.partition(",")[2])
    return Image.open(io.BytesIO(data))
