"""The option ``--blocks`` of verbs that read or train on some of a model's blocks."""

from __future__ import annotations

from daco_rt.errors import DacoError, PolicyError


def parse_blocks(text: str) -> tuple[int, ...]:
    """Read a list of blocks: "15-19", "3,5" or "3,15-19".

    Raises
    ------
    DacoError
        If it is none.
    """
    from daco_rt.export import parse_layers

    try:
        return parse_layers(text)
    except PolicyError as error:
        raise DacoError(str(error).replace("--layers", "--blocks")) from error
