"""Where in a stimulus the residual stream is read.

========================  ==================================================================
``word``                  the last token of the concept's word: it has seen the whole word
``word-mean``             all tokens of the word
``before-word``           the token before the word: where a model that writes is about to say it
``last``                  the last token
``last-prompt``           the last token before the answer: its output predicts the answer's first token
``image``                 all tokens of the picture
``all``                   every token
========================  ==================================================================

Several positions are averaged. Position 0 is never read: residual streams keep a huge vector there that
belongs to no word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from daco_rt.errors import DacoError, did_you_mean


@dataclass(frozen=True, eq=False)
class Tokens:
    """A stimulus as the model sees it.

    ``ids`` [S], ``offsets[i]`` the characters of the text that token i stands for ((0, 0) where it stands for
    none), ``span`` the characters of the word or None, ``image`` [S] true at the picture's tokens or None,
    ``cut`` whether the text was longer, ``answer`` the character at which the answer to a prompt begins (the
    text's end where it is left to the model) or None.
    """

    ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]
    span: tuple[int, int] | None
    image: np.ndarray | None = None
    cut: bool = False
    answer: int | None = None


def _word(tokens: Tokens) -> list[int]:
    if tokens.span is None:
        return []
    start, end = tokens.span
    return [i for i, (a, b) in enumerate(tokens.offsets) if a < end and b > start]


def _image(tokens: Tokens) -> list[int]:
    return [] if tokens.image is None else np.flatnonzero(tokens.image).tolist()


def _last(tokens: Tokens) -> list[int]:
    return [len(tokens.ids) - 1] if tokens.ids and not tokens.cut else []


def _last_prompt(tokens: Tokens) -> list[int]:
    if tokens.answer is None:
        return []
    # A token over the border belongs to the answer: the model has to write it.
    answer = (i - 1 for i, (_, end) in enumerate(tokens.offsets) if end > tokens.answer)
    return [before] if (before := next(answer, None)) is not None else _last(tokens)


RULES: dict[str, Callable[[Tokens], list[int]]] = {
    "word": lambda tokens: _word(tokens)[-1:],
    "word-mean": _word,
    "before-word": lambda tokens: [i - 1 for i in _word(tokens)[:1]],
    "last": _last,
    "last-prompt": _last_prompt,
    "image": _image,
    "all": lambda tokens: list(range(len(tokens.ids))),
}
WORD_RULES = ("word", "word-mean", "before-word")
IMAGE_RULES = ("image", "all")


def rule(name: str) -> Callable[[Tokens], list[int]]:
    """Return a rule by its name.

    Raises
    ------
    DacoError
        If there is none of that name.
    """
    if name not in RULES:
        raise DacoError(f"position {name!r} is unknown{did_you_mean(name, RULES)}")
    return RULES[name]


def find_positions(name: str, tokens: Tokens) -> tuple[list[int], str | None]:
    """Return the positions that a rule reads in a stimulus, or none and the reason.

    Example
    -------
    >>> find_positions("word", Tokens([5, 6, 7], [(0, 1), (1, 4), (4, 9)], (4, 9)))
    ([2], None)
    """
    found = rule(name)(tokens)
    kept = [i for i in found if i > 0]
    if kept:
        return kept, None
    if found:
        return [], "nothing to read but position 0"
    if name in WORD_RULES and tokens.span is None:
        return [], "without the word"
    if name == "image":
        return [], "without a picture"
    if name == "last-prompt" and tokens.answer is None:
        return [], "without a prompt and its answer"
    return [], "cut off before the position" if tokens.cut else "no token there"
