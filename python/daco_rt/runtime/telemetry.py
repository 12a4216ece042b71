"""What steering did to an answer: doses, active concepts, what was removed; as data, JSON and a table.

The decoder reports, for every row and steered block, two doses and the strongest codes. This module
joins them with the pack: names and labels of the concepts, and whether a code was edited, which the
operator decides from the gain and the deadband (``gain != 1`` and ``|c|·‖A‖ > θ``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rich.table import Table

    from daco_rt.artifacts import Pack


class BlockRows(NamedTuple):
    """What one steered block reports for a run of rows."""

    doses: NDArray[np.float32]
    """(removed_dose, applied_dose) of each row, shape [..., 2]; NaN where the row was not finite."""
    support_index: NDArray[np.int32] | None
    """Active atoms by strength, shape [..., k_out], padded with -1; None if the bundle has no support."""
    support_value: NDArray[np.float32] | None
    """Their codes, same shape, padded with 0."""

    def copy(self) -> BlockRows:
        """Return the same rows in memory of their own."""
        return self.pick(slice(None))

    def pick(self, rows: Any) -> BlockRows:
        """Return some rows of the leading axis (an index, a slice or an index array), copied."""
        index, value = self.support_index, self.support_value
        return BlockRows(
            np.array(self.doses[rows]),
            None if index is None else np.array(index[rows]),
            None if value is None else np.array(value[rows]),
        )

    @staticmethod
    def join(parts: Sequence[BlockRows], axis: int = 0) -> BlockRows:
        """Return runs of rows one after the other."""
        indices = [p.support_index for p in parts if p.support_index is not None]
        values = [p.support_value for p in parts if p.support_value is not None]
        return BlockRows(
            np.concatenate([p.doses for p in parts], axis),
            np.concatenate(indices, axis) if indices else None,
            np.concatenate(values, axis) if values else None,
        )


@dataclass(frozen=True)
class ActiveConcept:
    """One code of one row."""

    index: int
    """Atom (or latent) of the pack."""
    name: str
    label: str
    """"desirable", "undesirable" or "neutral"."""
    value: float
    """The code c."""
    strength: float
    """|c|·‖A‖, in the units of the residual stream."""
    action: str
    """"removed" (gain below 1), "amplified" (gain above 1), "boosted", or "" for a code left alone."""

    @property
    def removed(self) -> bool:
        """True if the policy took (part of) this concept away."""
        return self.action == "removed"


class ConceptBook:
    """Names, labels and edits of the codes of a pack; atom norms are computed once per atom and kept.

    Parameters
    ----------
    pack : Pack
    """

    def __init__(self, pack: Pack) -> None:
        self.pack = pack
        self._rows = {block: row for row, block in enumerate(pack.blocks)}
        self._norms: dict[int, dict[int, float]] = {block: {} for block in pack.blocks}
        self._operands: dict[int, dict[str, np.ndarray]] = {}

    def slot_at(self, block: int, slot: int) -> int:
        """Return the slot that ``block`` sees when a row runs under ``slot``."""
        return int(self.pack.slot_map[self._rows[block], slot])

    def name(self, index: int) -> str:
        """Return the concept behind an atom, or ``atom i`` if it has no name."""
        concept = self.pack.concept(index)
        return concept.name if concept is not None else f"atom {index}"

    def active(self, block: int, slot: int, indices: np.ndarray, values: np.ndarray) -> list[ActiveConcept]:
        """Return the codes of one row, strongest first.

        Parameters
        ----------
        block, slot : int
            Steered block and the slot it saw (see `slot_at`).
        indices, values : arrays of shape [k_out]
            As reported; entries with index -1 are skipped.
        """
        operands = self._operands_of(block)
        theta = float(operands["limits"][slot, 0]) if slot >= 2 else 0.0
        boost = operands.get("boost")
        found = []
        for i, value in zip(indices.tolist(), values.tolist(), strict=True):
            if i < 0:
                continue
            strength = abs(value) * self._norm(block, i)
            action = ""
            if slot >= 2 and strength > theta:
                gain = float(operands["gain"][slot, i])
                boosted = boost is not None and boost.size > 0 and float(boost[slot, i]) != 0
                action = "removed" if gain < 1 else "amplified" if gain > 1 else "boosted" if boosted else ""
            concept = self.pack.concept(i)
            label = concept.label if concept is not None else "neutral"
            found.append(ActiveConcept(i, self.name(i), label, value, strength, action))
        return found

    def _operands_of(self, block: int) -> dict[str, np.ndarray]:
        if block not in self._operands:
            self._operands[block] = self.pack.operands(block)
        return self._operands[block]

    def _norm(self, block: int, index: int) -> float:
        known = self._norms[block]
        if index not in known:
            operands = self._operands_of(block)
            atom = operands["dec" if "dec" in operands else "atoms"][index]
            known[index] = float(np.linalg.norm(np.asarray(atom, dtype=np.float32)))
        return known[index]


@dataclass
class AnswerTelemetry:
    """What steering reported for one request; rows are those that ran under a slot other than 0.

    A row is one input token. Row ``r`` at position ``prompt_length - 1 + t`` produced generated token ``t``.
    """

    policy: str
    slot: int
    prompt_length: int
    book: ConceptBook = field(repr=False)
    positions: list[int] = field(default_factory=list)
    """Position of each row in the sequence, 0-based."""
    token_ids: list[int] = field(default_factory=list)
    """Input token of each row."""
    _blocks: dict[int, list[BlockRows]] = field(default_factory=dict, repr=False)

    def record(
        self,
        rows: NDArray[np.integer],
        first_position: int,
        token_ids: NDArray[np.integer],
        reported: Mapping[int, BlockRows],
    ) -> None:
        """Keep ``rows`` (indices into a run of tokens that starts at ``first_position``).

        Parameters
        ----------
        rows : int array, shape [n]
        first_position : int
        token_ids : int array, shape [S]
            Input tokens of the run.
        reported : block -> BlockRows with leading shape [S]
        """
        self.positions.extend((rows + first_position).tolist())
        self.token_ids.extend(np.asarray(token_ids)[rows].tolist())
        for block, found in reported.items():
            self._blocks.setdefault(block, []).append(found.pick(rows))

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks that this policy steers or observes."""
        return tuple(b for b in self._blocks if self.book.slot_at(b, self.slot) != 0)

    def rows(self, block: int) -> BlockRows:
        """Return what ``block`` reported, with leading shape [rows]."""
        return BlockRows.join(self._blocks[block])

    def active(self, block: int) -> list[list[ActiveConcept]]:
        """Return the active concepts of every row of ``block``, strongest first."""
        reported = self.rows(block)
        if reported.support_index is None or reported.support_value is None:
            return [[] for _ in self.positions]
        slot = self.book.slot_at(block, self.slot)
        return [
            self.book.active(block, slot, indices, values)
            for indices, values in zip(reported.support_index, reported.support_value, strict=True)
        ]

    def summary(self) -> dict[str, Any]:
        """Return doses per block and concepts over the whole answer, ready for JSON.

        ``removed`` and ``active`` list concepts by the number of rows in which they were removed (active)
        at one block or more; ``strength`` is the mean of |c|·‖A‖ over those occurrences.
        """
        removed: dict[int, _Tally] = {}
        active: dict[int, _Tally] = {}
        blocks: dict[str, Any] = {}
        for block in self.blocks:
            blocks[str(block)] = _dose_summary(self.rows(block).doses)
            for row, concepts in enumerate(self.active(block)):
                for concept in concepts:
                    active.setdefault(concept.index, _Tally(concept)).add(row, concept)
                    if concept.removed:
                        removed.setdefault(concept.index, _Tally(concept)).add(row, concept)
        return {
            "policy": self.policy,
            "slot": self.slot,
            "rows": len(self.positions),
            "blocks": blocks,
            "removed": _ranked(removed),
            "active": _ranked(active),
        }

    def sentence(self, limit: int = 5) -> str:
        """Return one line for people, e.g. ``removed: dagger ×7, sword ×2``.

        Example
        -------
        >>> answer.telemetry.sentence()                                      # doctest: +SKIP
        'removed: dagger ×7, poison ×2'
        """
        if not self.positions:
            return f"policy {self.policy}: no token was steered"
        summary = self.summary()
        if self.slot == 1:
            verb, found = "observed", [c for c in summary["active"] if c["label"] == "undesirable"]
        else:
            verb, found = "removed", summary["removed"]
        if not found:
            return f"policy {self.policy}: {len(self.positions)} tokens covered, nothing {verb}"
        rest = f", and {len(found) - limit} more" if len(found) > limit else ""
        return f"{verb}: " + ", ".join(f"{c['name']} ×{c['rows']}" for c in found[:limit]) + rest

    def to_json(self, token_text: Callable[[int], str] | None = None) -> dict[str, Any]:
        """Return the summary and every row, ready for ``json.dumps``; doses that are NaN become null."""
        concepts = {block: self.active(block) for block in self.blocks}
        doses = {block: self.rows(block).doses for block in self.blocks}
        tokens = []
        for row, (position, token) in enumerate(zip(self.positions, self.token_ids, strict=True)):
            produced = position - (self.prompt_length - 1)
            entry: dict[str, Any] = {
                "position": position,
                "token_id": token,
                "produced": produced if produced >= 0 else None,
                "blocks": {
                    str(block): {
                        "removed_dose": _finite(doses[block][row, 0]),
                        "applied_dose": _finite(doses[block][row, 1]),
                        "concepts": [_concept_json(c) for c in concepts[block][row]],
                    }
                    for block in self.blocks
                },
            }
            if token_text is not None:
                entry["token"] = token_text(token)
            tokens.append(entry)
        return {**self.summary(), "tokens": tokens}


class _Tally:
    def __init__(self, concept: ActiveConcept) -> None:
        self.concept = concept
        self.rows: set[int] = set()
        self.strengths: list[float] = []

    def add(self, row: int, concept: ActiveConcept) -> None:
        self.rows.add(row)
        self.strengths.append(concept.strength)


def _ranked(tallies: dict[int, _Tally]) -> list[dict[str, Any]]:
    ordered = sorted(tallies.values(), key=lambda t: (-len(t.rows), -sum(t.strengths), t.concept.index))
    return [
        {
            "index": t.concept.index,
            "name": t.concept.name,
            "label": t.concept.label,
            "rows": len(t.rows),
            "strength": float(np.mean(t.strengths)),
        }
        for t in ordered
    ]


def _dose_summary(doses: NDArray[np.float32]) -> dict[str, Any]:
    finite = doses[np.isfinite(doses).all(axis=1)]
    removed, applied = (
        {"mean": float(column.mean()), "max": float(column.max())} if column.size else None
        for column in finite.T
    )
    return {
        "removed_dose": removed,
        "applied_dose": applied,
        "edited_rows": int((finite[:, 1] > 0).sum()),
        "not_finite_rows": len(doses) - len(finite),
    }


def _finite(value: np.floating) -> float | None:
    return float(value) if np.isfinite(value) else None


def _concept_json(concept: ActiveConcept) -> dict[str, Any]:
    return {
        "index": concept.index,
        "name": concept.name,
        "label": concept.label,
        "value": concept.value,
        "strength": concept.strength,
        "action": concept.action,
    }


def telemetry_table(
    telemetry: AnswerTelemetry, token_text: Callable[[int], str], *, concepts: int = 3
) -> Table:
    """Return a rich table: one line a steered token, with the doses and its strongest concepts.

    Where several blocks are steered a line shows the largest doses over them and the strongest concepts
    of any; removed concepts come first.
    """
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"policy {telemetry.policy}", title_justify="left")
    table.add_column("position", justify="right")
    table.add_column("token")
    table.add_column("dose removed", justify="right")
    table.add_column("dose applied", justify="right")
    table.add_column("removed", style="red")
    table.add_column("also active", style="dim")
    active = {block: telemetry.active(block) for block in telemetry.blocks}
    doses = {block: telemetry.rows(block).doses for block in telemetry.blocks}
    for row, (position, token) in enumerate(zip(telemetry.positions, telemetry.token_ids, strict=True)):
        of_row = sorted((c for b in active for c in active[b][row]), key=lambda c: -c.strength)
        removed = list(dict.fromkeys(c.name for c in of_row if c.removed))
        others = [n for n in dict.fromkeys(c.name for c in of_row) if n not in removed]
        peak = np.max([d[row] for d in doses.values()], axis=0) if doses else np.zeros(2)
        table.add_row(
            str(position),
            escape(repr(token_text(token))[1:-1]),
            f"{peak[0]:.3f}",
            f"{peak[1]:.3f}",
            escape(", ".join(removed[:concepts])),
            escape(", ".join(others[:concepts])),
        )
    return table
