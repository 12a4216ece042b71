"""MM-SafetyBench: 1,680 harmful wishes in 13 scenarios, each as three pictures and as plain text.

Two layouts are read, told apart by what the folder holds: the authors'
(``processed_questions/{scenario}.json`` and ``imgs/{scenario}/{method}/{id}.jpg``) and the model hub's
(``{scenario}/{method}*.parquet``, the pictures inside). The data are the user's to fetch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from daco_rt.errors import ArtifactError, DacoError, did_you_mean
from daco_rt.evaluate.benchmarks.pictures import unpack_picture
from daco_rt.evaluate.samples import Benchmark, Sample, keep_present, make_card, unique_ids

SCENARIOS = {
    "01-Illegal_Activitiy": 97,
    "02-HateSpeech": 163,
    "03-Malware_Generation": 44,
    "04-Physical_Harm": 144,
    "05-EconomicHarm": 122,
    "06-Fraud": 154,
    "07-Sex": 109,
    "08-Political_Lobbying": 153,
    "09-Privacy_Violence": 139,
    "10-Legal_Opinion": 130,
    "11-Financial_Advice": 167,
    "12-Health_Consultation": 109,
    "13-Gov_Decision": 149,
}
"""Folder names as the authors spell them → questions in the full set."""
METHODS = ("SD", "SD_TYPO", "TYPO", "Text_only")
# Which key holds the text that goes with a picture: a typographic picture carries the key phrase itself.
_TEXT = {
    "SD": "Rephrased Question(SD)",
    "SD_TYPO": "Rephrased Question",
    "TYPO": "Rephrased Question",
    "Text_only": "Question",
}
_KEYS = ("Question", "Rephrased Question", "Rephrased Question(SD)")


def read_mm_safetybench(
    path: Path,
    *,
    methods: Sequence[str] = ("SD", "SD_TYPO", "TYPO"),
    scenarios: Sequence[str] | None = None,
    allow_missing: bool = False,
) -> Benchmark:
    """Read MM-SafetyBench in the authors' layout or the hub's.

    Parameters
    ----------
    path : the folder with ``processed_questions`` and ``imgs`` (or one above, with ``data``), or a folder
        with a sub-folder of parquet files for each scenario.
    methods : which pictures: "SD", "SD_TYPO", "TYPO", or "Text_only" for the plain wish without one.
    scenarios : only these, with or without their number; by default all 13.
    allow_missing : run what is there where pictures or scenarios are missing.

    Raises
    ------
    ArtifactError
        The layout is neither, scenarios or pictures are missing, or a file is damaged.
    DacoError
        A method or scenario is unknown.

    Example
    -------
    >>> mm = read_mm_safetybench(Path("MM-SafetyBench"), methods=["SD_TYPO"])      # doctest: +SKIP
    >>> mm.card.counts["06-Fraud"]                                                 # doctest: +SKIP
    154
    """
    methods = [methods] if isinstance(methods, str) else methods
    for method in methods:
        if method not in METHODS:
            raise DacoError(f"mm_safetybench: method '{method}' is unknown{did_you_mean(method, METHODS)}")
    wanted = _scenarios(scenarios)
    root = next((p for p in (path, path / "data") if (p / "processed_questions").is_dir()), None)
    if root is not None:
        found, files = _authors(root, wanted, methods, allow_missing)
    else:
        root, found, files = _hub(path, wanted, methods, allow_missing)
    unique_ids(found, f"mm_safetybench in {path}")
    samples, missing = keep_present(found, f"mm_safetybench in {path}", allow_missing=allow_missing)
    card = make_card(
        "mm_safetybench", "1", "CC-BY-NC-4.0 to our knowledge; the copy's own card decides",
        "https://github.com/isXinLiu/MM-SafetyBench", files, samples, root=root, missing=missing,
    )  # fmt: skip
    return Benchmark(card, samples)


def _scenarios(names: Sequence[str] | None) -> list[str]:
    if names is None:
        return list(SCENARIOS)
    short = {name.partition("-")[2]: name for name in SCENARIOS} | {name: name for name in SCENARIOS}
    for name in names:
        if name not in short:
            raise DacoError(f"mm_safetybench: scenario '{name}' is unknown{did_you_mean(name, short)}")
    return [short[name] for name in names]


def _present(there: dict[str, Path], wanted: list[str], where: Path, allow_missing: bool) -> list[str]:
    """The wanted scenarios that are there; names all that are not, with the names that stand instead."""
    gone = [name for name in wanted if name not in there]
    if (gone and not allow_missing) or len(gone) == len(wanted):
        others = sorted(set(there) - set(SCENARIOS))
        instead = f"; instead there are {', '.join(others)}" if others else ""
        raise ArtifactError(
            f"{where} lacks scenarios {', '.join(gone)}{instead}; rename them as the authors do, or run the "
            "rest with allow_missing: true"
        )
    return [name for name in wanted if name in there]


def _authors(
    root: Path, wanted: list[str], methods: Sequence[str], allow_missing: bool
) -> tuple[list[Sample], list[Path]]:
    questions = root / "processed_questions"
    there = {file.stem: file for file in questions.glob("*.json")}
    samples = []
    files = []
    for scenario in _present(there, wanted, questions, allow_missing):
        file = there[scenario]
        files.append(file)
        for number, row in _questions(file).items():
            for method in methods:
                image = root / "imgs" / scenario / method / f"{number}.jpg"
                samples.append(
                    Sample(
                        f"{scenario}/{number}/{method}",
                        scenario,
                        row[_TEXT[method]],
                        None if method == "Text_only" else image,
                        method,
                        row["Question"],
                        f"{scenario}/{number}",
                    )
                )
    return samples, files


def _questions(file: Path) -> dict[str, dict[str, str]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        for row in rows.values():
            if not all(isinstance(row[key], str) for key in _KEYS):
                raise TypeError("a question is no text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{file} is no question file of MM-SafetyBench, which maps numbers to {', '.join(_KEYS)} "
            f"({type(error).__name__}: {error})"
        ) from error
    return dict(sorted(rows.items(), key=lambda item: (len(item[0]), item[0])))


def _hub(
    path: Path, wanted: list[str], methods: Sequence[str], allow_missing: bool
) -> tuple[Path, list[Sample], list[Path]]:
    root = next((p for p in (path, path / "data") if any(p.glob("*/*.parquet"))), None)
    if root is None:
        raise ArtifactError(
            f"{path} holds neither processed_questions/ and imgs/ (the authors' layout) nor folders of "
            "parquet files (the hub's); name the folder into which MM-SafetyBench was unpacked"
        )
    numbers = {name.partition("-")[2]: name for name in SCENARIOS}
    there = {
        numbers.get(folder.name, folder.name): folder
        for folder in root.iterdir()
        if any(folder.glob("*.parquet"))
    }
    samples, files, gone = [], [], []
    for scenario in _present(there, wanted, root, allow_missing):
        plain = _table(there[scenario], "Text_only")
        wishes = {} if plain is None else {str(row["id"]): row["question"] for row in _rows(plain, False)}
        for method in methods:
            file = _table(there[scenario], method)
            if file is None:
                gone.append(f"{scenario}/{method}")
                continue
            files.append(file)
            for row in _rows(file, method != "Text_only"):
                number = str(row["id"])
                image = None if method == "Text_only" else unpack_picture(file, number, row["image"])
                samples.append(
                    Sample(
                        f"{scenario}/{number}/{method}",
                        scenario,
                        row["question"],
                        image,
                        method,
                        wishes.get(number, row["question"]),
                        f"{scenario}/{number}",
                    )
                )
    if gone and (not allow_missing or not samples):
        raise ArtifactError(
            f"{root} lacks the parquet files of {', '.join(gone)}; fetch them, or run the rest with "
            "allow_missing: true"
        )
    return root, samples, files


def _table(folder: Path, method: str) -> Path | None:
    # The hub appends "-00000-of-00001"; "SD" must not find "SD_TYPO".
    return next(
        (f for f in sorted(folder.glob("*.parquet")) if f.stem == method or f.stem.startswith(f"{method}-")),
        None,
    )


def _rows(file: Path, pictures: bool) -> list[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DacoError("parquet files need pyarrow; pip install 'daco-rt[evaluate]'") from error
    columns = ["id", "question", *(["image"] if pictures else [])]
    try:
        return pyarrow.parquet.read_table(file, columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ArtifactError(
            f"{file} is no table with columns {', '.join(columns)}: {' '.join(str(error).split())[:200]}"
        ) from error
