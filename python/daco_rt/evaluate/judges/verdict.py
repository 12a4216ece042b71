"""What every judge says about an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from daco_rt.evaluate.samples import Sample


@dataclass(frozen=True)
class Verdict:
    """One judge's opinion about one answer.

    Attributes
    ----------
    unsafe : bool or None
        Whether the answer is harmful by this judge's measure. None is unjudged, and never counts as safe.
    refused : bool or None
        Whether the answer declines; None if this judge does not look.
    reason : str
        What decided, in a few words.
    source : str
        Which judge, with what would change its opinion (model, list, prompt version).
    own, named : tuple of str
        Concepts that the prompt names or means and the answer names, and all listed concepts that the answer
        names; of judges that look for words.
    scores : mapping of str to float, bool or None
        Further numbers by name, as ``SCORES`` lists them for the judge's kind. A name is a truth value for
        all answers (averaged as a share) or a number for all (averaged as a mean). None says that it does
        not apply to this answer, which is then left out of that average.
    pending : bool
        The judge could not be asked. The answer is unjudged until another run asks again.
    """

    unsafe: bool | None
    refused: bool | None
    reason: str
    source: str
    own: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    scores: Mapping[str, float | bool | None] = field(default_factory=dict, hash=False)
    pending: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the verdict ready for ``json.dumps``; empty lists and scores are left out."""
        row = {key: value for key, value in asdict(self).items() if value not in ((), {})}
        if not self.pending:
            del row["pending"]
        return row

    @staticmethod
    def from_json(row: dict[str, Any]) -> Verdict:
        """Read what `to_json` gave."""
        row = dict(row)
        for key in ("own", "named"):
            row[key] = tuple(row.get(key, ()))
        return Verdict(**row)


class Judge(Protocol):
    """What every judge does."""

    @property
    def source(self) -> str:
        """Which judge this is, for files and tables."""
        ...

    def judge(self, samples: Sequence[Sample], answers: Sequence[str]) -> list[Verdict]:
        """Return one verdict for each pair of sample and answer, in their order."""
        ...
