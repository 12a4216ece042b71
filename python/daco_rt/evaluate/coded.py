"""Methods that take atoms out of a code: pursuit, elastic net and SAEs, compiled from any policies."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from daco_rt.artifacts import Concept, ConceptDictionary, Pack, load_sae
from daco_rt.errors import DacoError
from daco_rt.evaluate.methods import Method, blocks_of, taken
from daco_rt.steering import PolicySpec, compile_pursuit_pack, compile_sae_pack


def specs_of(method: Method) -> list[PolicySpec]:
    """Return one policy a strength; the swept number overrides the option of that name.

    Deadband, gain and gamma are filled in with the compiler's defaults, so that they can be read.

    Example
    -------
    >>> [(spec.deadband, spec.gain) for spec in specs_of(Method("m", "omp", (0.3,), {"gain": 0.0}))]
    [(0.3, 0.0)]
    """
    swept = "condition" if method.kind == "conditional" else str(method.options.get("sweep", "deadband"))
    compiler = compile_sae_pack if method.kind == "sae" else compile_pursuit_pack
    known = inspect.signature(compiler).parameters
    fixed: dict[str, Any] = {name: known[name].default for name in ("deadband", "gain", "gamma")}
    # A gate observes the prompt, so its policy acts on what comes after.
    fixed |= {"positions": "generated"} if method.kind == "conditional" else {}
    fixed |= taken(method, "gain", "gamma", "deadband", "positions")
    return [PolicySpec(label, **(fixed | {swept: strength})) for label, strength in method.labels.items()]


def compile_coded(
    method: Method,
    dictionary: ConceptDictionary,
    pack: Path,
    policies: Sequence[PolicySpec],
    **changes: Any,
) -> Pack:
    """Compile policies with the coder and options of a method; ``changes`` go to the compiler.

    Raises
    ------
    DacoError
        The method is of kind sae and names none.
    """
    if method.kind == "sae":
        saes, concepts = saes_of(method, dictionary)
        return compile_sae_pack(
            saes,
            pack,
            median_norm=dictionary.median_norm,
            policies=policies,
            concepts=concepts,
            model=dictionary.model if all(sae.model is None for sae in saes.values()) else None,
            overwrite=True,
            **changes,
        )
    coder: dict[str, Any] = {"coder": "elastic_net"} if method.kind == "elastic_net" else {}
    return compile_pursuit_pack(
        dictionary,
        pack,
        policies=policies,
        blocks=blocks_of(method, dictionary),
        overwrite=True,
        **coder,
        **taken(method, "k", "sign", "tau", "alpha"),
        **changes,
    )


def labels_of(method: Method, dictionary: ConceptDictionary) -> dict[int, Sequence[Concept]]:
    """Return block → the concepts of its atoms or latents, by which they are edited."""
    if method.kind != "sae":
        return dict.fromkeys(blocks_of(method, dictionary), dictionary.concepts)
    saes, concepts = saes_of(method, dictionary)
    return {block: sae.concepts if concepts is None else concepts[block] for block, sae in saes.items()}


def saes_of(
    method: Method, dictionary: ConceptDictionary
) -> tuple[dict[int, Any], dict[int, Sequence[Concept]] | None]:
    """Return a method's SAEs by block, and with ``eta`` the labels that the dictionary gives the latents."""
    from daco_rt.sae.annotate import label_latents

    folders = method.options.get("saes")
    if not isinstance(folders, Mapping) or not folders:
        raise DacoError(f"method '{method.name}': saes must map block numbers to folders")
    saes = {int(block): load_sae(folder) for block, folder in folders.items()}
    if "eta" not in method.options:
        return saes, None
    eta = float(method.options["eta"])
    return saes, {block: label_latents(sae, dictionary, eta=eta) for block, sae in saes.items()}
