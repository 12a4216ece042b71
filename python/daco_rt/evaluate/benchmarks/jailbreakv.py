"""JailBreakV-28K: jailbreak texts with pictures, its mini set, and RedTeam_2K, the requests behind it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from daco_rt.errors import DacoError, did_you_mean
from daco_rt.evaluate.benchmarks.tables import find_table, read_table
from daco_rt.evaluate.samples import Benchmark, Sample, keep_present, make_card, unique_ids

TABLES = {"full": "JailBreakV_28K.csv", "mini": "mini_JailBreakV_28K.csv"}
_LICENCE = "MIT to our knowledge; the copy's own card decides"
_GET = "download it from its publishers"
_SOURCE = "https://github.com/EddyLuo1232/JailBreakV_28K"


def read_jailbreakv(
    path: Path,
    *,
    table: str = "full",
    formats: Sequence[str] | None = None,
    pictures: bool = True,
    allow_missing: bool = False,
) -> Benchmark:
    """Read JailBreakV-28K.

    Parameters
    ----------
    path : the folder with the tables and ``figstep/``, ``llm_transfer_attack/``, ``query_related/``, or the
        one above it.
    table : "full" or "mini". Without a mini table the full one's ``selected_mini`` decides.
    formats : only rows of these formats, as the table spells them; by default all.
    pictures : False asks the texts alone.
    allow_missing : run the samples whose pictures are there.

    Raises
    ------
    ArtifactError
        A table or column is missing, or pictures are, counted and named in one sentence.
    DacoError
        The table or a format is unknown.

    Example
    -------
    >>> read_jailbreakv(Path("JailBreakV-28K"), table="mini").samples[0].form        # doctest: +SKIP
    'Template'
    """
    if table not in TABLES:
        raise DacoError(f"jailbreakv: table '{table}' is unknown{did_you_mean(table, TABLES)}")
    names = [TABLES["full"]] if table == "full" else [TABLES["mini"], TABLES["full"]]
    file = find_table(path, names, "JailBreakV-28K", get=_GET)
    columns = ["id", "jailbreak_query", "redteam_query", "format", "policy", "image_path"]
    derived = table == "mini" and file.name == TABLES["full"]
    rows = read_table(file, [*columns, *(["selected_mini"] if derived else [])])
    if derived:
        rows = [row for row in rows if row["selected_mini"].strip().lower() in ("true", "1")]
    if formats is not None:
        known = {row["format"] for row in rows}
        chosen = [formats] if isinstance(formats, str) else list(formats)
        for name in chosen:
            if name not in known:
                raise DacoError(f"jailbreakv: format '{name}' is unknown{did_you_mean(name, known)}")
        rows = [row for row in rows if row["format"] in chosen]
    found = [
        Sample(
            row["id"],
            row["policy"],
            row["jailbreak_query"],
            file.parent / row["image_path"].strip() if pictures and row["image_path"].strip() else None,
            row["format"],
            row["redteam_query"],
            row["redteam_query"],
        )
        for row in rows
    ]
    unique_ids(found, f"jailbreakv in {file}")
    samples, missing = keep_present(found, f"jailbreakv in {file.parent}", allow_missing=allow_missing)
    card = make_card(
        "jailbreakv", f"28K {table}", _LICENCE, _SOURCE, [file], samples, root=file.parent, missing=missing
    )
    return Benchmark(card, samples)


def read_redteam(path: Path) -> Benchmark:
    """Read RedTeam_2K, the requests behind JailBreakV-28K, without jailbreak and without pictures.

    Raises
    ------
    ArtifactError
        The table is not there or lacks a column.

    Example
    -------
    >>> read_redteam(Path("JailBreakV-28K")).card.name                               # doctest: +SKIP
    'redteam_2k'
    """
    file = find_table(path, ["RedTeam_2K.csv"], "RedTeam_2K", get=_GET)
    samples = tuple(
        Sample(row["id"], row["policy"], row["question"], form=row["from"])
        for row in read_table(file, ["id", "question", "policy", "from"])
    )
    unique_ids(samples, f"redteam_2k in {file}")
    card = make_card("redteam_2k", "2K", _LICENCE, _SOURCE, [file], samples, root=file.parent)
    return Benchmark(card, samples)
