"""A model of lm-evaluation-harness: ``daco``, a bundle, or a checkpoint in torch, under a policy.

The harness asks in three ways: how likely a continuation is, how likely a whole text is, and for an answer.
Each becomes a request of the runtime. Prompts reach it as the harness made them, in the checkpoint's chat
template where ``--apply_chat_template`` asks for it, with pictures where their placeholders stand.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from daco_rt.errors import DacoError, did_you_mean
from daco_rt.evaluate.metrics import token_nats
from daco_rt.evaluate.subject import BundleSubject, Score, Subject
from daco_rt.progress import progress
from daco_rt.runtime.policies import choose_policy
from daco_rt.runtime.request import GenerateRequest
from daco_rt.runtime.sampling import Sampling

PLACEHOLDER = "<image>"
"""Where a task wants a picture."""
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_SETTINGS = ("until", "do_sample", "max_gen_toks", *_SAMPLING)


@dataclass(frozen=True)
class _Wanted:
    """One question of the harness: its own arguments, the request, and the tokens to score."""

    arguments: tuple[Any, ...]
    request: GenerateRequest
    tokens: tuple[int, ...]
    prompt: tuple[Any, ...]
    """What makes two prompts the same."""
    length: int
    """Tokens of the prompt, pictures not counted."""


@register_model("daco")
class DacoLM(TemplateLM):
    """Answers the harness.

    Parameters
    ----------
    bundle : path of a bundle; or
    family, checkpoint, pack : a checkpoint that runs in torch, steered by a pack.
    policy : name, "off" or "observe"; by default the pack's own.
    batch_size : most requests run together, a number.
    threads : of a bundle.
    device, dtype : of a checkpoint in torch; lm_eval says cuda:0 unless --device is given. A bundle runs
        where it was exported for.
    max_length : most tokens that the model reads, the last one scored or generated not counted; by default
        as many as it can. Longer contexts are cut on the left, but never a prompt with pictures.
    max_gen_toks : tokens of an answer where the task does not say.
    max_tiles : most tiles a picture is cut into.
    prefix_token_id : what stands before the first token that is scored; by default the tokenizer's
        beginning-of-text token, else its end-of-text token.

    Raises
    ------
    DacoError
        Nothing usable is there, an argument is wrong, or the policy is unknown.

    Example
    -------
    ::

        python -m daco_rt.evaluate.lm_eval --model daco --model_args bundle=bundles/mine,policy=default \\
            --tasks mmmu_val --apply_chat_template --batch_size 8
    """

    MULTIMODAL = True

    def __init__(
        self,
        bundle: str | None = None,
        family: str | None = None,
        checkpoint: str | None = None,
        pack: str | None = None,
        policy: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        threads: int | None = None,
        device: str | None = None,
        dtype: str = "float32",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        max_tiles: int | None = None,
        prefix_token_id: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            known = inspect.signature(DacoLM).parameters
            raise DacoError(f"model daco: argument '{name}' is unknown{did_you_mean(name, known)}")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise DacoError(f"model daco: batch_size must be a number from 1, got '{batch_size}'")
        self.subject, loaded = _open(
            bundle, family, checkpoint, pack, int(batch_size), threads, device, dtype
        )
        self.policy = choose_policy(loaded, policy).name
        self.processor = self.subject.processor
        self.tokenizer = self.processor.tokenizer
        most = self.subject.max_length - 1
        if max_length is not None and not 1 <= max_length <= most:
            raise DacoError(f"model daco: max_length must be within 1 and {most}, got {max_length}")
        self.max_length = most if max_length is None else max_length
        self.max_gen_toks, self.max_tiles = max_gen_toks, max_tiles
        self._prefix = prefix_token_id

    # ---- what the harness asks about the model

    @property
    def batch_size(self) -> int:
        """Most requests run together; it stands in the harness's record."""
        return self.subject.batch_size

    @property
    def eot_token_id(self) -> int:
        """Id that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Id that stands before the first scored token."""
        bos = self.tokenizer.bos_token_id
        return self._prefix if self._prefix is not None else self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness keeps rendered requests."""
        return str(self.processor.folder).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What ran, for the harness's record."""
        return {"policy": self.policy, "model_max_length": self.max_length}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return token ids; special tokens are added as the tokenizer does, or not at all."""
        if add_special_tokens is False:
            return self.processor.tokens(string)[0]
        return self.processor.raw_ids(string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template's text, for the record; a template by another name is refused."""
        if isinstance(chat_template, str):
            raise DacoError("model daco has one chat template; use --apply_chat_template without a name")
        return self.processor.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return messages as the text that the checkpoint's template makes of them."""
        messages = [{**message, "content": _with_pictures(message["content"])} for message in chat_history]
        return self.processor.render(messages, go_on=not add_generation_prompt)

    # ---- how likely something is

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (ln p, whether greedy decoding would say it) of each continuation."""
        if not any(len(request.args) > 2 for request in requests):
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        wanted = []
        for request in requests:
            context, continuation, pictures = request.args
            text, images = self._placed(context, pictures)
            _, tokens = self._encode_pair(text, continuation)
            text = text.rstrip()  # the harness has moved trailing spaces to the continuation
            asked = self._request(text, images)
            key = (text, *map(id, images))
            wanted.append(_Wanted(request.args, asked, tuple(tokens), key, 0))
        return self._likelihoods(wanted, shown=not disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        wanted = [
            self._tokens_wanted(arguments, context, continuation)
            for arguments, context, continuation in requests
        ]
        return self._likelihoods(wanted, shown=not disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return ln p of each whole text; longer ones than the model takes in windows that do not overlap."""
        wanted, sums = [], [0.0] * len(requests)
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            ):
                wanted.append(self._tokens_wanted((i,), *make_disjoint_window(window)))
        with progress("scoring texts", len(wanted), shown=not disable_tqdm) as advance:
            for batch, scores in self._scored(wanted):
                for one, score in zip(batch, scores, strict=True):
                    sums[one.arguments[0]] -= float(score.nats.sum())
                advance(len(batch))
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def _tokens_wanted(
        self, arguments: tuple[Any, ...], context: Sequence[int], continuation: Sequence[int]
    ) -> _Wanted:
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise DacoError(
                f"model daco: a continuation of {len(continuation)} tokens does not fit a model that reads "
                f"{self.max_length}"
            )
        kept = tuple(context[-room:])
        return _Wanted(arguments, self._request(kept), tuple(continuation), kept, len(kept))

    def _likelihoods(self, wanted: Sequence[_Wanted], *, shown: bool) -> list[tuple[float, bool]]:
        # Choices that differ in their last token alone share a run: its logits decide all of them.
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, one in enumerate(wanted):
            groups.setdefault((one.prompt, one.tokens[:-1]), []).append(i)
        members = {id(wanted[indices[0]]): indices for indices in groups.values()}
        found: list[tuple[float, bool]] = [(0.0, False)] * len(wanted)
        with progress("scoring continuations", len(wanted), shown=shown) as advance:
            for batch, scores in self._scored([wanted[indices[0]] for indices in groups.values()]):
                for first, score in zip(batch, scores, strict=True):
                    for i in members[id(first)]:
                        found[i] = _ended(score, wanted[i].tokens[-1])
                        self.cache_hook.add_partial("loglikelihood", wanted[i].arguments, found[i])
                    advance(len(members[id(first)]))
        return found

    def _scored(self, wanted: Sequence[_Wanted]) -> Iterator[tuple[list[_Wanted], list[Score]]]:
        """Score in batches of similar length, the longest first."""
        order = sorted(wanted, key=lambda one: -(one.length + len(one.tokens)))
        for batch in self._batches(order, lambda one: (one.length, len(one.tokens))):
            yield batch, list(self.subject.score([o.request for o in batch], [o.tokens for o in batch]))

    # ---- answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to each request, up to the first of its stop strings."""
        wanted = []
        for i, request in enumerate(requests):
            wanted.append((i, *self._answerable(i, *request.args)))
        wanted.sort(key=lambda one: -one[2])
        found = [""] * len(requests)
        with progress("answering", len(wanted), shown=not disable_tqdm) as advance:
            for batch in self._batches(wanted, lambda one: (one[2], one[1].max_new_tokens)):
                for (i, asked, _), answer in zip(
                    batch, self.subject.run([asked for _, asked, _ in batch]), strict=True
                ):
                    if answer.error:
                        raise DacoError(f"model daco: {answer.error}; or give max_tiles, or fewer examples")
                    found[i] = self._stopped(answer.token_ids, answer.text, asked.stop)
                    self.cache_hook.add_partial("generate_until", requests[i].args, found[i])
                advance(len(batch))
        return found

    def _answerable(
        self, seed: int, context: str, settings: dict[str, Any], pictures: dict[str, Any] | None = None
    ) -> tuple[GenerateRequest, int]:
        """The request for an answer, and the tokens of its prompt."""
        told = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        for name in told:
            if name not in _SETTINGS:
                raise DacoError(
                    f"model daco: setting '{name}' of an answer is unknown{did_you_mean(name, _SETTINGS)}"
                )
        most = told["max_gen_toks"]
        options: dict[str, Any] = {
            "max_new_tokens": most,
            "stop": tuple(stop for stop in told["until"] if stop),
            "sampling": Sampling(**{name: told[name] for name in _SAMPLING if told.get(name) is not None}),
            "seed": seed,
        }
        if pictures is not None:
            text, images = self._placed(context, pictures)
            return self._request(text, images, **options), 0
        room = self.max_length - most
        if room < 1:
            raise DacoError(
                f"model daco: {most} new tokens leave no room for a prompt in {self.max_length} tokens"
            )
        ids = (self.tok_encode(context) or [self.prefix_token_id])[-room:]
        return self._request(ids, **options), len(ids)

    def _stopped(self, token_ids: Sequence[int], text: str, stops: Iterable[str]) -> str:
        """An answer up to its stop strings, of which those that are special tokens have no text."""
        special = {
            self.tokenizer.convert_tokens_to_ids(s) for s in stops if s in self.tokenizer.all_special_tokens
        }
        end = next((i for i, token in enumerate(token_ids) if token in special), None)
        return text if end is None else self.processor.decode(token_ids[:end])

    # ---- requests

    def _request(self, prompt: Any, images: Sequence[Any] = (), **options: Any) -> GenerateRequest:
        return GenerateRequest(
            prompt, images=images, policy=self.policy, raw=True, max_tiles=self.max_tiles, **options
        )

    def _placed(self, context: str, pictures: dict[str, Any]) -> tuple[str, list[Any]]:
        """A prompt with the checkpoint's own placeholders, and its pictures."""
        for name in pictures:
            if name != "visual":
                raise DacoError(f"model daco takes text and pictures, this task also gives '{name}'")
        images = list(pictures["visual"])
        if not images:
            return context, images
        token = self.processor.image_token
        if token is None:
            raise DacoError("model daco: this checkpoint takes no pictures; choose a task of text")
        # The chat template has set its own where it was applied.
        return context.replace(PLACEHOLDER, token), images

    def _batches(self, wanted: Sequence[Any], sizes: Any) -> Iterator[list[Any]]:
        """Split into batches whose longest prompt and longest answer together fit the model."""
        batch: list[Any] = []
        longest = np.zeros(2, np.int64)
        for one in wanted:
            grown = np.maximum(longest, sizes(one))
            if batch and (len(batch) == self.batch_size or grown.sum() > self.subject.max_length):
                yield batch
                batch, grown = [], np.asarray(sizes(one), np.int64)
            batch.append(one)
            longest = grown
        if batch:
            yield batch


def _open(
    bundle: str | None, family: str | None, checkpoint: str | None, pack: str | None, batch_size: int,
    threads: int | None, device: str | None, dtype: str,
) -> tuple[Subject, Any]:  # fmt: skip
    """The model and the pack that steers it."""
    if (bundle is None) == (family is None):
        raise DacoError(
            "model daco needs one of bundle=PATH and family=NAME (with checkpoint=PATH) in --model_args"
        )
    if bundle is not None:
        if checkpoint is not None or pack is not None:
            raise DacoError("model daco: a bundle brings its own checkpoint and pack; leave them out")
        # Whatever device is given: without --device lm_eval says cuda:0, and a bundle has its own place.
        steered = BundleSubject(Path(bundle), threads=threads, batch_size=batch_size)
        return steered, steered.generator.session.pack
    from daco_rt.evaluate.torch_subject import TorchSubject

    subject = TorchSubject(
        str(family), checkpoint, pack=pack, batch_size=batch_size, device=device or "cpu", dtype=dtype
    )
    return subject, subject.pack


def _with_pictures(text: str) -> Any:
    """A message's content; placeholders become entries of their own, as chat templates want them."""
    parts = text.split(PLACEHOLDER)
    if len(parts) == 1:
        return text
    content: list[dict[str, str]] = []
    for i, part in enumerate(parts):
        content += [{"type": "image"}] if i else []
        content += [{"type": "text", "text": part}] if part else []
    return content


def _ended(score: Score, token: int) -> tuple[float, bool]:
    """ln p, and whether it is greedy, of scored tokens with this one in the last place."""
    last = float(token_nats(score.last[None], [token])[0])
    greedy = bool(score.greedy[:-1].all()) and int(score.last.argmax()) == token
    return -float(score.nats[:-1].sum() + last), greedy
