"""The steps of a build: what each of them makes, of what, and by which public function."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from daco_rt.artifacts import ModelIdentity, load_dictionary
from daco_rt.concepts import (
    load_table,
    make_stimuli,
    save_stimuli,
    save_table,
    shipped_table,
    subset_concepts,
)
from daco_rt.concepts.table import SHIPPED
from daco_rt.concepts.texts import FORMATS, load_stimuli
from daco_rt.errors import DacoError, did_you_mean
from daco_rt.pipeline.config import BuildConfig
from daco_rt.steering.policy_file import build_pack

TABLE, TEXTS, MEANS, DICTIONARY = "concepts.jsonl.gz", "texts.jsonl.gz", "means", "dictionary"
STORE = "activations"


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes
    ----------
    name : str
    output : str
        File or folder in the build's folder.
    inputs : tuple of str
        Outputs of earlier steps.
    files : tuple of Path
        Files from elsewhere.
    settings : dict
        What else decides the result, as JSON values. Together with the content of ``inputs`` and ``files`` it
        decides whether a step is up to date.
    run : callable
        ``run(at, resume)`` makes the output and returns a summary in a few words. With ``resume`` an
        unfinished output of the same settings lies there.
    """

    name: str
    output: str
    inputs: tuple[str, ...]
    files: tuple[Path, ...]
    settings: dict[str, Any]
    run: Callable[[Path, bool], str]


class Host:
    """The model of a build, opened when the first step asks for it."""

    def __init__(self, name: str, precision: str, device: str = "auto") -> None:
        self.name = name
        self.precision = precision
        self.device = device

    @functools.cached_property
    def identity(self) -> ModelIdentity:
        """Its identity; reads ``config.json`` and samples of the weights."""
        from daco_rt.models import model_identity

        return model_identity(self._checkpoint)

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any]:
        """Model and tokenizer."""
        from daco_rt.models.loading import load_torch

        return load_torch(self._checkpoint.path, self.device, self.precision)

    @functools.cached_property
    def processor(self) -> Any:
        """What prepares its pictures."""
        from daco_rt.runtime.processor import Processor

        return Processor(self._checkpoint.path)

    @functools.cached_property
    def _checkpoint(self) -> Any:
        from daco_rt.models import resolve_checkpoint

        return resolve_checkpoint(None, self.name)


def steps_of(config: BuildConfig, host: Host) -> list[Step]:
    """Return the steps of a build in the order in which they run.

    Raises
    ------
    DacoError
        If a file that the configuration names does not exist.
    """
    model = {**host.identity.to_dict(), "precision": host.precision}
    steps = [_concepts(config), _stimuli(config), _harvest(config, host, model), _dictionary(config, host)]
    if config.sae is not None:
        blocks = config.sae.blocks or config.blocks
        steps.append(_activations(config, host, model, blocks))
        for block in blocks:
            steps += [_sae(config, block), _annotate(config, block)]
    steps += [_pack(config, name) for name in config.packs]
    for step in steps:
        for file in step.files:
            if not file.exists():
                raise DacoError(f"{config.path}: step {step.name} needs {file}, which does not exist")
    return steps


def _concepts(config: BuildConfig) -> Step:
    section = config.concepts
    source = SHIPPED if section.table == "built-in" else config.file(section.table)

    def run(at: Path, _resume: bool) -> str:
        table = shipped_table() if section.table == "built-in" else load_table(source)
        if section.size is not None:
            table = subset_concepts(table, section.size)
        save_table(table, at / TABLE, overwrite=True)
        undesirable = sum(concept.label == "undesirable" for concept in table)
        return f"{len(table)} concepts, {undesirable} undesirable"

    return Step("concepts", TABLE, (), (source,), {"size": section.size}, run)


def _stimuli(config: BuildConfig) -> Step:
    section = config.stimuli
    if section.format not in FORMATS:
        hint = did_you_mean(section.format, FORMATS)
        raise DacoError(f"{config.path}, stimuli: format '{section.format}' is unknown{hint}")

    def run(at: Path, _resume: bool) -> str:
        found = make_stimuli(
            load_table(at / TABLE), count=section.count, minimum=section.minimum, kinds=section.kinds,
            markers=FORMATS[section.format],
        )  # fmt: skip
        save_stimuli(found.stimuli, at / TEXTS, overwrite=True)
        return f"{len(found.stimuli)} texts, {len(found.excluded)} concepts left out"

    return Step("stimuli", TEXTS, (TABLE,), (), asdict(section), run)


def _harvest(config: BuildConfig, host: Host, model: dict[str, Any]) -> Step:
    section = config.harvest
    pairs = () if section.pairs is None else (config.file(section.pairs),)
    options = asdict(section)
    del options["texts"], options["pairs"]

    def run(at: Path, _resume: bool) -> str:
        from daco_rt.dictionary.harvest import harvest_means
        from daco_rt.dictionary.items import pair_items, table_concepts, text_items

        concepts = table_concepts(load_table(at / TABLE))
        model, tokenizer = host.loaded
        items = chain(
            text_items(at / TEXTS, concepts) if section.texts else (),
            *(pair_items(file, concepts) for file in pairs),
        )
        means = harvest_means(
            model, host.processor if pairs else tokenizer, concepts, items, config.blocks, at / MEANS,
            identity=host.identity, **options,
        )  # fmt: skip
        return f"{means.stimuli} stimuli of {len(means.concepts)} concepts at blocks {_list(means.blocks)}"

    settings = {"model": model, "blocks": config.blocks, "texts": section.texts, **options}
    return Step("harvest", MEANS, (TABLE, *((TEXTS,) if section.texts else ())), pairs, settings, run)


def _dictionary(config: BuildConfig, host: Host) -> Step:
    section = config.dictionary
    options = asdict(section)
    del options["heard"]

    def run(at: Path, _resume: bool) -> str:
        from daco_rt.dictionary import build_dictionary, find_heard, open_means, without_heard

        means = open_means(at / MEANS, verify=True)
        made = build_dictionary(means, at / DICTIONARY, overwrite=True, **options)
        summary = f"{made.size} atoms at blocks {_list(made.blocks)}"
        heard = find_heard(made, *host.loaded, least=section.heard) if section.heard else ()
        if heard:
            without_heard(made, heard, at / DICTIONARY, overwrite=True)
            names = ", ".join(made.concepts[one.concept].name for one in heard[:5])
            summary += f"; {len(heard)} heard in ordinary text are neutral: {names}"
        return summary

    return Step("dictionary", DICTIONARY, (MEANS,), (), asdict(section), run)


def _activations(config: BuildConfig, host: Host, model: dict[str, Any], blocks: tuple[int, ...]) -> Step:
    assert config.sae is not None
    file = () if config.sae.texts is None else (config.file(config.sae.texts),)
    position = config.sae.position

    def run(at: Path, _resume: bool) -> str:
        from daco_rt.dictionary.rows import read_rows
        from daco_rt.sae.harvest import harvest_activations
        from daco_rt.sae.texts import mixed, read_texts

        model, tokenizer = host.loaded
        if position != "all":
            texts, kept = read_rows(file[0] if file else at / TEXTS, position, tokenizer)
        else:
            kept = None
            texts = read_texts(file[0]) if file else mixed([item.text for item in load_stimuli(at / TEXTS)])
        norms = load_dictionary(at / DICTIONARY).median_norm
        store = harvest_activations(
            model, tokenizer, texts, blocks, at / STORE, identity=host.identity, position=position, kept=kept,
            median_norm={block: norms[block] for block in blocks},
        )  # fmt: skip
        return f"{store.rows(blocks[0])} rows of {len(texts)} texts at blocks {_list(blocks)}"

    inputs = (DICTIONARY,) if file else (TEXTS, DICTIONARY)
    settings = {"model": model, "blocks": blocks}
    # Left out where it is not used, so that builds from before it existed stay up to date.
    settings |= {} if position == "all" else {"position": position}
    return Step("activations", STORE, inputs, file, settings, run)


def _sae(config: BuildConfig, block: int) -> Step:
    assert config.sae is not None
    training = config.sae.training
    output = f"saes/{block:03d}"

    def run(at: Path, resume: bool) -> str:
        from daco_rt.sae import StoreSource, open_store, train_sae

        source = open_store(at / STORE, verify=True)
        sae = train_sae(
            StoreSource(source, block), at / output, model=source.model, block=block, training=training,
            dictionary=load_dictionary(at / DICTIONARY) if training.init == "dictionary" else None,
            device="auto", resume=resume, overwrite=True,
        )  # fmt: skip
        recipe = json.loads((sae.path / "manifest.json").read_bytes())["recipe"]
        explained = recipe["evaluation"]["explained_variance"]
        return f"{len(sae.decoder)} latents, explains {explained:.3f}, {recipe['dead_fraction']:.3f} dead"

    return Step(f"sae {block}", output, (STORE, DICTIONARY), (), training.to_dict(), run)


def _annotate(config: BuildConfig, block: int) -> Step:
    section = config.annotate
    source, output = f"saes/{block:03d}", f"labelled/{block:03d}"

    def run(at: Path, _resume: bool) -> str:
        from daco_rt.artifacts import load_sae
        from daco_rt.sae import annotate_sae

        dictionary = load_dictionary(at / DICTIONARY)
        made = annotate_sae(
            load_sae(at / source), dictionary, at / output, eta=section.eta,
            rule=section.rule, overwrite=True,
        )  # fmt: skip
        undesirable = sum(concept.label == "undesirable" for concept in made.annotation)
        return f"{undesirable} of {len(made.decoder)} latents undesirable at eta {section.eta:g}"

    return Step(f"annotate {block}", output, (source, DICTIONARY), (), asdict(section), run)


def _pack(config: BuildConfig, name: str) -> Step:
    section = config.packs[name]
    policies = config.file(section.policies)
    output = f"packs/{name}"
    blocks = () if config.sae is None else config.sae.blocks or config.blocks
    labelled = {block: f"labelled/{block:03d}" for block in blocks}
    inputs = (DICTIONARY,) if section.source == "dictionary" else (DICTIONARY, *labelled.values())

    def run(at: Path, _resume: bool) -> str:
        source: dict[str, Any] = {"dictionary": at / DICTIONARY}
        if section.source == "sae":
            source = {
                "saes": {block: at / place for block, place in labelled.items()},
                "norms": at / DICTIONARY,
            }
        pack = build_pack(policies, at / output, overwrite=True, **source)
        return f"{pack.op}, {pack.atoms} atoms, {len(pack.policies)} policies"

    return Step(f"pack {name}", output, inputs, (policies,), {"source": section.source}, run)


def _list(blocks: tuple[int, ...]) -> str:
    return ", ".join(map(str, blocks))
