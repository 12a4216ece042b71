"""What a policy adds to a token: the same request with and without it, in turn, on the same engine.

Machines are noisy and slow down under others' load, so each steered run is compared with the unsteered run
next to it, and the median over pairs is what counts. These are indications beside an evaluation;
benchmarks have quiet machines and floors.
"""

from __future__ import annotations

from daco_rt.evaluate.subject import Subject
from daco_rt.runtime.request import GenerateRequest

PROMPT = "Describe a walk through a small town, from the station to the river."
PAIRS = 5
TOKENS = 24


def paired_seconds(
    subject: Subject, policy: str, *, pairs: int = PAIRS, tokens: int = TOKENS
) -> list[tuple[float, float]]:
    """Return, pair by pair, the seconds a decoded token takes under "off" and under a policy.

    One request, batch 1, greedy, past its end; which of the two comes first alternates. One pair is run
    before and thrown away. A gated policy acts only if the gate opens on the built-in harmless prompt.

    Example
    -------
    >>> off, on = zip(*paired_seconds(BundleSubject("bundles/smol-internvl"), "default"))  # doctest: +SKIP
    """

    def seconds(name: str) -> float:
        request = GenerateRequest(PROMPT, policy=name, max_new_tokens=tokens, ignore_eos=True)
        (answer,) = subject.run([request])
        return answer.decode_seconds / (len(answer.token_ids) - 1)

    found = []
    for pair in range(pairs + 1):
        order = ("off", policy) if pair % 2 else (policy, "off")
        taken = {name: seconds(name) for name in order}
        found.append((taken["off"], taken[policy]))
    return found[1:]
