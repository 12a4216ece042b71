"""What is asked about a picture and truly answered, and how several questions share one row of tokens.

A row holds the beginning of a conversation with the picture once, and after it questions with their answers.
Each question sees the beginning and itself alone and is numbered as if it followed the beginning directly, so
the model computes for each what it would in a row of its own, at about half the cost.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scene_training import rounded_up
from tokenizers import Tokenizer

from daco_rt.models.seeded import IMAGE_TOKENS
from daco_rt.models.smol import SYSTEM

SYSTEMS = (SYSTEM, "", "You describe pictures.", "Answer in one short sentence.")
"""The default one is said half of the time."""
DESCRIBE = (
    ("What does the picture show?", "The picture shows {}."),
    ("What is in this picture?", "The picture shows {}."),
    ("What is in the image?", "The image shows {}."),
    ("Describe the picture.", "The picture shows {}."),
    ("Describe this image.", "The image shows {}."),
    ("What do you see?", "I see {}."),
    ("What can you see in the picture?", "I can see {}."),
    ("What is this?", "This is a picture of {}."),
    ("Please tell me what is in this photo.", "The photo shows {}."),
)
ASK = DESCRIBE[0][0]
"""The question of the examination."""
IGNORE = -100
_NUMBERS = ("one thing", "two things", "three things")
_PLACES = (
    ("in the middle",),
    ("on the left", "on the right"),
    ("on the left", "in the middle", "on the right"),
)


class Said(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


class Row(NamedTuple):
    """Token ids, ids to predict (`IGNORE` outside answers), question numbers (0: beginning), positions."""

    ids: list[int]
    labels: list[int]
    parts: list[int]
    positions: list[int]


def talk(
    phrases: Sequence[str], word: str | None, others: Sequence[str], number: int, draw: random.Random
) -> list[Said]:
    """Draw questions about a picture and answer them; the first asks for all that is there.

    Parameters
    ----------
    phrases : what is there from left to right, as "a dog".
    word : what stands there in letters, if anything.
    others : phrases from which to ask for what is not there.
    number : how many questions.
    draw : source of all randomness.
    """
    seen = [*phrases, *([f"the word {word}"] if word else [])]
    listed = seen[0] if len(seen) == 1 else f"{', '.join(seen[:-1])} and {seen[-1]}"
    kinds = {"describe": 3.0}
    if phrases:
        kinds |= {"count": 1.0, "there": 2.0, "absent": 2.0}
        if len(phrases) > 1:
            kinds["where"] = 3.0
    if word:
        kinds["read"] = 3.0
    drawn = draw.choices([*kinds], [*kinds.values()], k=number - 1)
    found = []
    for kind in ["describe", *drawn]:
        if kind == "describe":
            question, answer = draw.choice(DESCRIBE)
            found.append(Said(question, answer.format(listed)))
        elif kind == "count":
            many = _NUMBERS[len(phrases) - 1]
            verb = "is" if len(phrases) == 1 else "are"
            question = draw.choice(("How many things are in the picture?", "How many things do you see?"))
            found.append(Said(question, f"There {verb} {many} in the picture."))
        elif kind == "where":
            at = draw.randrange(len(phrases))
            place = _PLACES[len(phrases) - 1][at]
            found.append(Said(f"What is {place}?", f"{place.capitalize()} is {phrases[at]}."))
        elif kind == "read":
            question = draw.choice(
                ("What does it say in the picture?", "What word is written in the picture?")
            )
            found.append(Said(question, f"It says {word}."))
        else:
            asked = draw.choice(phrases) if kind == "there" else draw.choice(others)
            question = draw.choice(("Is there {} in the picture?", "Do you see {}?")).format(asked)
            yes = asked in phrases
            found.append(Said(question, f"Yes, I see {asked}." if yes else f"No, I see {listed}."))
    return found


class Text:
    """The tokenizer of a built-in checkpoint and the form of its conversations."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.end = self.tokenizer.token_to_id("<|im_end|>")
        self.image = self.tokenizer.token_to_id("<IMG_CONTEXT>")
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Return the token ids of ``text``; special tokens are read as such."""
        found = self._known.get(text)
        if found is None:
            if len(self._known) > 100_000:
                self._known.clear()
            found = self._known[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def beginning(self, system: str) -> list[int]:
        """Return system prompt and picture, as the chat template and the processor write them."""
        picture = f"<img>{'<IMG_CONTEXT>' * IMAGE_TOKENS}</img>\n"
        return self.ids(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{picture}")

    def asked(self, question: str) -> list[int]:
        """Return a question that follows the beginning, up to where the answer begins."""
        return self.ids(f"{question}<|im_end|>\n<|im_start|>assistant\n")

    def row(self, system: str, said: Sequence[Said]) -> Row:
        """Return one row for one picture and all that is said about it."""
        ids = [*self.beginning(system)]
        first = len(ids)
        labels, parts, positions = [IGNORE] * first, [0] * first, [*range(first)]
        for part, (question, answer) in enumerate(said, 1):
            asked, told = self.asked(question), [*self.ids(answer), self.end]
            ids += [*asked, *told]
            labels += [IGNORE] * len(asked) + told
            parts += [part] * (len(asked) + len(told))
            positions += range(first, first + len(asked) + len(told))
        return Row(ids, labels, parts, positions)

    def batch(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Pad rows on the right: int64 [rows, length] each of ids, labels, parts and positions."""
        # Few different lengths, for the reason that `rounded_up` gives.
        longest = -(-max(len(row.ids) for row in rows) // 16) * 16
        fill = {"ids": self.end, "labels": IGNORE, "parts": -1, "positions": 0}
        return {
            name: torch.tensor(
                [[*(values := getattr(row, name)), *[pad] * (longest - len(values))] for row in rows]
            )
            for name, pad in fill.items()
        }


def attention_mask(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what is added to attention scores: [rows, 1, length, length], 0 or the least of ``dtype``.

    A token sees what precedes it in the beginning and in its own question.
    """
    length = parts.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=parts.device).tril()
    seen = before & ((parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None]))
    mask = torch.zeros(seen.shape, dtype=dtype, device=parts.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def answer_loss(net: Any, features: torch.Tensor, batch: dict[str, torch.Tensor], image: int) -> torch.Tensor:
    """Return the cross-entropy of the answers, given the pictures' tokens ``features`` [rows, 16, d]."""
    ids, labels, parts = batch["ids"], batch["labels"], batch["parts"]
    text = net.model.language_model
    embeds = text.embed_tokens(ids)
    embeds = embeds.masked_scatter((ids == image)[..., None], features.to(embeds.dtype))
    mask = attention_mask(parts, embeds.dtype)
    hidden = text(
        inputs_embeds=embeds, attention_mask=mask, position_ids=batch["positions"], use_cache=False
    ).last_hidden_state
    after = labels[:, 1:].flatten()
    at = rounded_up(after != IGNORE, 128)
    scores = net.lm_head(hidden[:, :-1].flatten(0, 1)[at]).float()
    return torch.nn.functional.cross_entropy(scores, after[at], ignore_index=IGNORE)
