"""Prompts and pictures to token ids and pixels, as the checkpoint's own processor does it.

transformers supplies the tokenizer, the chat template and the image processor; everything is asked
for as numpy and read from local files. Two facts shape the loading:

* Without torchvision a processor with a video slot cannot be built, because its video processor cannot.
  We never feed videos, so a subclass that does not list that slot is loaded. Nothing of transformers
  is patched, so other users of it in the same process see no difference.
* transformers imports torch where torch is installed. This module needs neither torch nor
  transformers to be imported, and no torch to work.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daco_rt.errors import ArtifactError, DacoError
from daco_rt.runtime.images import ImageSource, open_image

Message = dict[str, Any]
"""``{"role": "user", "content": text or list of {"type": "text", "text": ...} and {"type": "image", ...}}``;
an image entry may carry its picture under ``image``, ``path`` or ``url`` (a local file), else it takes the
next of ``images``."""


@dataclass(frozen=True)
class Prepared:
    """One request, ready for the model."""

    input_ids: NDArray[np.int64]
    """Token ids, shape [S], image tokens expanded."""
    image_mask: NDArray[np.bool_]
    """True where an image token stands, shape [S]."""
    pixel_values: NDArray[np.float32] | None
    """Tiles, shape [tiles, 3, H, W], in the order of the image tokens; None for a text prompt."""
    text: str
    """The rendered prompt, image placeholders not expanded."""

    @property
    def length(self) -> int:
        """Number of tokens."""
        return int(self.input_ids.size)


class Processor:
    """Tokenizer, chat template and image processor of a checkpoint or a bundle.

    Safe to use from several threads.

    Parameters
    ----------
    folder : path
        ``bundle/processor`` or a checkpoint folder.
    image_token_id : int, optional
        Id of the token that stands for one image feature; by default what the processor says.

    Raises
    ------
    ArtifactError
        The folder holds no tokenizer that transformers can load.

    Example
    -------
    >>> processor = Processor("bundle/processor")                            # doctest: +SKIP
    >>> processor.prepare("What is this?", images=["dagger.png"]).length     # doctest: +SKIP
    287
    """

    def __init__(self, folder: str | Path, *, image_token_id: int | None = None) -> None:
        self.folder = Path(folder)
        self._lock = threading.Lock()
        self._processor, self.tokenizer = _load(self.folder)
        found = getattr(self._processor, "image_token_id", None) if image_token_id is None else image_token_id
        self.image_token_id: int | None = None if found is None else int(found)
        self.image_token: str | None = (
            None if self.image_token_id is None else self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        )
        self.eos_token_ids: frozenset[int] = _eos_token_ids(self.folder, self.tokenizer)

    def prepare(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        images: Sequence[ImageSource] = (),
        *,
        max_tiles: int | None = None,
        raw: bool = False,
    ) -> Prepared:
        """Render, tokenise and tile one request.

        Parameters
        ----------
        prompt : str, messages or token ids
            A user's question, which the chat template wraps with the images in front; or whole messages;
            or, with ``raw``, the final text with its image placeholders, or token ids without images.
        images : sequence of paths, PIL images or uint8 arrays
            In the order of their placeholders.
        max_tiles : int, optional
            Most tiles an image is cut into (1: the whole image only). By default the processor's own.
        raw : bool
            Take ``prompt`` as it stands, without the chat template.

        Raises
        ------
        DacoError
            An image cannot be read, the number of images and placeholders differ, the checkpoint has no
            chat template, or messages are malformed.
        """
        if max_tiles is not None and max_tiles < 1:
            raise DacoError(f"max_tiles must be 1 or greater, got {max_tiles}")
        if raw and not isinstance(prompt, str):
            return self._given(prompt, images)
        messages, sources = ([], list(images)) if raw else _chat(prompt, images)
        text = str(prompt) if raw else self.render(messages)
        self._check_counts(text, len(sources))
        pictures = [open_image(s) for s in sources]
        pixels = None
        if pictures:
            options = self._special(text, raw) | self._tiling(max_tiles)
            ids, pixels = self._with_images(text, pictures, options)
        else:
            ids = np.asarray(self._encode(text, raw), dtype=np.int64)
        if ids.size == 0:
            raise DacoError("the prompt is empty: it has no tokens")
        mask = ids == self.image_token_id if pixels is not None else np.zeros(ids.shape, np.bool_)
        return Prepared(ids, np.asarray(mask), pixels, text)

    def raw_ids(self, text: str) -> list[int]:
        """Return the ids of a raw prompt, special tokens as the tokenizer adds them, images not expanded."""
        return self._encode(text, True)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, special tokens left out, spaces untouched."""
        with self._lock:
            return str(
                self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
            )

    def token_text(self, token_id: int) -> str:
        """Return one token as text for display, special tokens by their name."""
        with self._lock:
            return str(self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False))

    def tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids of a text, without special tokens, and the characters each stands for."""
        with self._lock:
            made = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(made["input_ids"]), [(int(a), int(b)) for a, b in made["offset_mapping"]]

    @property
    def chat_template(self) -> str | None:
        """The template that `render` uses; None if the checkpoint has none."""
        return getattr(self._processor, "chat_template", None) or self.tokenizer.chat_template

    def render(self, messages: list[Message], *, go_on: bool = False) -> str:
        """Return messages as the text that the chat template makes of them, an answer opened at the end.

        Parameters
        ----------
        messages : the conversation.
        go_on : leave the last message, an answer that has begun, open instead.

        Raises
        ------
        DacoError
            The checkpoint has no chat template, or it refuses the messages.
        """
        owner = self._processor if getattr(self._processor, "chat_template", None) else self.tokenizer
        if not getattr(owner, "chat_template", None):
            raise DacoError(
                f"{self.folder} has no chat template; pass the whole prompt as raw text, "
                "or add chat_template.jinja"
            )
        try:
            with self._lock:
                return str(
                    owner.apply_chat_template(
                        messages,
                        tokenize=False,
                        add_generation_prompt=not go_on,
                        continue_final_message=go_on,
                    )
                )
        except DacoError:
            raise
        except Exception as e:  # a template is a program of the checkpoint and may raise anything
            raise DacoError(f"the chat template of {self.folder} refuses these messages: {e}") from e

    def _given(self, prompt: Sequence[Any], images: Sequence[ImageSource]) -> Prepared:
        """Return a prompt of token ids as it is."""
        if images or not all(isinstance(i, int | np.integer) for i in prompt):
            raise DacoError(
                "a raw prompt must be a string, or token ids without images; messages go through the chat "
                "template"
            )
        if len(prompt) == 0:
            raise DacoError("the prompt is empty: it has no tokens")
        ids = np.asarray(prompt, np.int64)
        return Prepared(ids, np.zeros(ids.shape, np.bool_), None, self.decode(ids.tolist()))

    def _encode(self, text: str, raw: bool) -> list[int]:
        with self._lock:
            return list(self.tokenizer(text, **self._special(text, raw))["input_ids"])

    def _special(self, text: str, raw: bool) -> dict[str, Any]:
        # A chat template writes the special tokens itself; a raw prompt gets those that the tokenizer adds.
        return {"add_special_tokens": raw and not self._starts_with_bos(text)}

    def _check_counts(self, text: str, images: int) -> None:
        if images and (self.image_token is None or not hasattr(self._processor, "image_processor")):
            raise DacoError(f"{images} image(s) given, but {self.folder} holds a text-only processor")
        marked = text.count(self.image_token) if self.image_token else 0
        if marked != images:
            raise DacoError(
                f"the prompt holds {marked} image placeholder(s) ({self.image_token}) but {images} image(s) "
                "came; give one image for each placeholder"
            )

    def _starts_with_bos(self, text: str) -> bool:
        bos = self.tokenizer.bos_token
        return bool(bos) and text.startswith(bos)

    def _tiling(self, max_tiles: int | None) -> dict[str, int]:
        if max_tiles is None:
            return {}
        fewest = int(getattr(self._processor.image_processor, "min_patches", 1) or 1)
        return {"max_patches": max_tiles, "min_patches": min(fewest, max_tiles)}

    def _with_images(
        self, text: str, pictures: list[Any], options: dict[str, Any]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        with self._lock:
            out = self._processor(images=pictures, text=[text], return_tensors="np", **options)
        ids = np.asarray(out["input_ids"][0], dtype=np.int64)
        return ids, np.ascontiguousarray(out["pixel_values"], dtype=np.float32)


def _chat(
    prompt: str | Sequence[Message] | Sequence[int], images: Sequence[ImageSource]
) -> tuple[list[Message], list[ImageSource]]:
    """Return messages for the template and the images in the order of their entries."""
    if isinstance(prompt, str):
        entries: list[Message] = [{"type": "image"} for _ in images]
        content = [*entries, {"type": "text", "text": prompt}] if entries else prompt
        return [{"role": "user", "content": content}], list(images)
    waiting = list(images)
    ordered: list[ImageSource] = []
    messages: list[Message] = []
    for message in prompt:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise DacoError(f"a message needs 'role' and 'content', got {message!r}")
        if isinstance(message["content"], str):
            messages.append(dict(message))
            continue
        if not isinstance(message["content"], list):
            raise DacoError(
                f"the content of a message must be a string or a list, got {message['content']!r}"
            )
        content = []
        for entry in message["content"]:
            kind = entry.get("type") if isinstance(entry, dict) else None
            if kind == "text" and isinstance(entry.get("text"), str):
                content.append(entry)
                continue
            if kind != "image":
                raise DacoError(
                    'an entry of a message must be {"type": "text", "text": ...} or {"type": "image"}, '
                    f"got {entry!r}"
                )
            source = next(
                (entry[key] for key in ("image", "path", "url") if entry.get(key) is not None), None
            )
            if source is None and not waiting:
                raise DacoError(
                    f"the messages hold more image entries than the {len(images)} image(s) that came; "
                    "give one image for each entry"
                )
            ordered.append(waiting.pop(0) if source is None else source)
            content.append({"type": "image"})
        messages.append({**message, "content": content})
    if not messages:
        raise DacoError("the list of messages is empty")
    if waiting:
        raise DacoError(
            f"{len(images)} image(s) came, but the messages hold image entries for "
            f"{len(images) - len(waiting)}; "
            'add {"type": "image"} entries where they belong'
        )
    return messages, ordered


def _load(folder: Path) -> tuple[Any, Any]:
    """Return (processor or None, tokenizer) of a folder."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder: a tokenizer and its processor were expected there")
    import transformers

    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        name = _processor_class_name(folder)
        if name is None:
            return None, transformers.AutoTokenizer.from_pretrained(str(folder), **options)
        base = getattr(transformers, name, None)
        if base is None:
            raise ArtifactError(
                f"{folder} names the processor class {name}, which this transformers does not have"
            )
        processor = _without_video(base).from_pretrained(str(folder), **options)
        return processor, processor.tokenizer
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as e:
        reason = " ".join(str(e).split())
        raise ArtifactError(f"{folder} holds no tokenizer and processor that can be loaded: {reason}") from e


def _without_video(base: Any) -> Any:
    """Return a subclass of a processor class that has no video slot."""

    class WithoutVideo(base):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    # transformers looks classes up by this name, and writes it when a processor is saved.
    WithoutVideo.__name__ = base.__name__
    return WithoutVideo


def _processor_class_name(folder: Path) -> str | None:
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        name = _read_json(folder / file).get("processor_class")
        if name:
            return str(name)
    model_type = _read_json(folder / "config.json").get("model_type")
    if model_type is None or not (folder / "preprocessor_config.json").is_file():
        return None
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    return PROCESSOR_MAPPING_NAMES.get(model_type)


def _eos_token_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: generation_config.json, else config.json; and always the tokenizer's own."""
    generation = _read_json(folder / "generation_config.json").get("eos_token_id")
    config = _read_json(folder / "config.json")
    text = config.get("text_config") or {}
    declared = generation if generation is not None else text.get("eos_token_id", config.get("eos_token_id"))
    ids: set[int] = set(declared) if isinstance(declared, list) else set() if declared is None else {declared}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return frozenset(int(i) for i in ids)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ArtifactError(f"{path} is not readable JSON: {e}") from e
    return found if isinstance(found, dict) else {}
