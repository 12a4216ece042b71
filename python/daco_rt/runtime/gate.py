"""Policies with a condition: the prompt is observed first, and the policy acts only if enough was found.

What is found is the removed dose, averaged over the prompt's rows and largest over the policy's blocks.
Where it exceeds the policy's threshold, the last prompt token is run again under the policy, which then
holds for every decoded token; the rest of the prompt stays as it was observed. Otherwise the request goes
on under "observe".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from daco_rt.runtime.policies import Chosen
from daco_rt.runtime.positions import OBSERVE_SLOT, right_padded, token_slots

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from daco_rt.runtime.cache import KvCache
    from daco_rt.runtime.generate import PreparedBatch
    from daco_rt.runtime.telemetry import BlockRows

OBSERVED = Chosen("observe", OBSERVE_SLOT, "all")


def gated_prefill(session: Any, cache: KvCache, batch: PreparedBatch, chunk: int | None) -> Any:
    """Run prompts of which some have a conditional policy; ``batch`` is changed to what they run under.

    Parameters
    ----------
    session : a session of the runtime.
    cache : fresh, of the batch's size.
    batch : its ``slots`` [B, S] and ``policies`` are overwritten for the gated rows.
    chunk : as in the session's ``prefill``.

    Returns
    -------
    The prefill's step, with logits and reports of the gate's second run where there was one.
    """
    gated = [row for row, policy in enumerate(batch.policies) if policy.condition > 0]
    real = right_padded(batch.lengths, batch.slots.shape[1])
    watched = token_slots([OBSERVE_SLOT] * len(gated), ["all"] * len(gated), real[gated])
    batch.slots[gated] = watched
    step = session.prefill(cache, batch.embeds, batch.slots, batch.lengths, chunk=chunk)
    passed = []
    for row, slots in zip(gated, watched, strict=True):
        policy = batch.policies[row]
        reports = {block: rows for block, rows in step.reports.items() if block in policy.blocks}
        if prompt_dose(reports, row, slots) > policy.condition:
            passed.append(row)
        else:
            batch.policies[row] = OBSERVED
    if not passed:
        return step
    rows = np.array(passed)
    last = batch.lengths[rows] - 1
    slots = np.zeros(len(batch.lengths), np.int32)
    slots[rows] = [batch.policies[row].slot for row in passed]
    batch.slots[rows] = 0
    batch.slots[rows, last] = slots[rows]
    # The other rows of this step write past their prompt, where their first decoded token follows.
    cache.lengths[rows] -= 1
    cache.next_position[rows] -= 1
    ends = batch.embeds[np.arange(len(batch.lengths)), batch.lengths - 1]
    again = session.forward(cache, ends[:, None], slots[:, None])
    cache.lengths[rows] += 1
    cache.next_position[rows] += 1
    step.logits[rows] = again.logits[rows]
    for block, report in step.reports.items():
        _replace(report, again.reports[block], rows, last)
    return step


def prompt_dose(reports: dict[int, BlockRows], row: int, slots: NDArray[np.int32]) -> float:
    """Return the removed dose of a prompt: mean over its observed rows, largest over blocks, 0 without any.

    Rows that were not finite count as 0; an edit would leave them alone too.
    """
    observed = np.flatnonzero(slots)
    if observed.size == 0:
        return 0.0
    doses = [np.nan_to_num(rows.doses[row, observed, 0], nan=0.0).mean() for rows in reports.values()]
    return float(max(doses, default=0.0))


def _replace(report: BlockRows, again: BlockRows, rows: NDArray[Any], last: NDArray[Any]) -> None:
    report.doses[rows, last] = again.doses[rows, 0]
    for into, new in (
        (report.support_index, again.support_index),
        (report.support_value, again.support_value),
    ):
        if into is not None and new is not None:
            into[rows, last] = new[rows, 0]
