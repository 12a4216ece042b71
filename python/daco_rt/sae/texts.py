"""What a model reads so that an SAE can be trained on its activations."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from daco_rt.errors import DacoError

T = TypeVar("T")


def built_in_texts() -> list[str]:
    """Return the texts that come with the package: ordinary ones, and those that say a built-in concept.

    Example
    -------
    >>> len(built_in_texts())
    2500
    """
    from daco_rt.concepts import ORDINARY_TEXTS, everyday_concepts, stimuli_for

    return mixed(
        [
            *ORDINARY_TEXTS,
            *(stimulus.text for entry in everyday_concepts() for stimulus in stimuli_for(entry)),
        ]
    )


def mixed(texts: Sequence[T]) -> list[T]:
    """Return the texts in an order that puts those of one concept far apart, so that no shard holds them all.

    Example
    -------
    >>> mixed(["a1", "a2", "b1", "b2"])
    ['a1', 'a2', 'b1', 'b2']
    """
    # A stride that shares no factor with the count visits every text once.
    stride = next(n for n in range(701, 2000) if math.gcd(n, len(texts)) == 1)
    return [texts[i * stride % len(texts)] for i in range(len(texts))]


def read_texts(file: str | Path) -> list[str]:
    """Read texts from a file, one a line, or from JSON lines with a field "text" (.jsonl, .ndjson).

    Both may be compressed (.gz), as the stimuli of ``daco-rt stimuli`` are.

    Raises
    ------
    DacoError
        If the file cannot be read, is not UTF-8, a line is no such JSON, or there is no text.

    Example
    -------
    >>> len(read_texts("builds/smol-small/texts.jsonl.gz"))
    10500
    """
    file = Path(file)
    packed = file.suffix == ".gz"
    texts = []
    try:
        data = gzip.decompress(file.read_bytes()) if packed else file.read_bytes()
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DacoError(f"{file} is not UTF-8 ({error}); convert it first") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DacoError(f"{file} cannot be read as texts ({error}); give another file") from error
    for number, line in enumerate(lines, 1):
        if (file.with_suffix("") if packed else file).suffix in (".jsonl", ".ndjson"):
            try:
                line = json.loads(line)["text"]
                if not isinstance(line, str):
                    raise TypeError("text is no string")
            except (ValueError, KeyError, TypeError) as error:
                raise DacoError(f'{file}, line {number}: expected {{"text": "…"}} ({error})') from error
        if line.strip():
            texts.append(line)
    if not texts:
        raise DacoError(f"{file} holds no text; write one a line")
    return texts
