"""Position rules against a plain per-token definition."""

from __future__ import annotations

import numpy as np
import pytest

from daco_rt.errors import PolicyError
from daco_rt.runtime.positions import POSITIONS, right_padded, token_slots


def _plain(rule: str, rank: int, prompt: int, image: bool) -> bool:
    if rank == 0:
        return False
    decoded = rank >= prompt
    return {
        "generated": decoded or rank == prompt - 1,
        "prompt": not decoded,
        "image": image and not decoded,
        "text": decoded or not image,
        "all": True,
    }[rule]


@pytest.mark.parametrize("rule", POSITIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_rule_on_padded_rows(rule: str, side: str) -> None:
    rng = np.random.default_rng(0)
    lengths = np.array([1, 2, 5, 8])
    prompts = np.array([1, 1, 3, 8])
    attention = right_padded(lengths, 9)
    if side == "left":
        attention = attention[:, ::-1]
    image = (rng.random(attention.shape) < 0.5) & attention
    got = token_slots([3, 2, 2, 5], [rule] * 4, attention, image_mask=image, prompt_lengths=prompts)
    assert got.dtype == np.int32
    for row, slot in enumerate([3, 2, 2, 5]):
        rank = 0
        for column in range(9):
            if not attention[row, column]:
                assert got[row, column] == 0
                continue
            hit = _plain(rule, rank, int(prompts[row]), bool(image[row, column]))
            assert got[row, column] == (slot if hit else 0), (row, column)
            rank += 1


def test_off_and_observe_ignore_their_rule() -> None:
    attention = right_padded([4, 4])
    got = token_slots([0, 1], ["all", "image"], attention)
    assert got.tolist() == [[0, 0, 0, 0], [0, 1, 1, 1]]


@pytest.mark.parametrize("rule", POSITIONS)
def test_pieces_add_up_to_the_whole(rule: str) -> None:
    attention = right_padded([7, 4], 7)
    image = np.zeros((2, 7), bool)
    image[:, 1:3] = True
    prompts = [5, 3]
    whole = token_slots([2, 3], [rule] * 2, attention, image_mask=image, prompt_lengths=prompts)
    parts, past = [], np.zeros(2, np.int64)
    for column in range(7):
        piece = attention[:, column : column + 1]
        parts.append(
            token_slots(
                [2, 3],
                [rule] * 2,
                piece,
                image_mask=image[:, column : column + 1],
                prompt_lengths=prompts,
                past_lengths=past,
            )
        )
        past = past + piece[:, 0]
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


def test_bad_input_is_named() -> None:
    with pytest.raises(PolicyError, match="generated"):
        token_slots([2], ["generate"], [[1, 1]])
    with pytest.raises(PolicyError, match="0 or greater"):
        token_slots([-1], ["all"], [[1, 1]])
    with pytest.raises(ValueError, match="image_mask"):
        token_slots([2], ["all"], [[1, 1]], image_mask=[[True]])
    with pytest.raises(ValueError, match="one entry"):
        token_slots([2, 2], ["all"], [[1, 1]])
