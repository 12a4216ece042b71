"""Where methods are made ready: packs are compiled, bundles exported and models loaded, each once.

What was made is taken again as long as everything that it was made from is the same: the recipe beside it
says so. Thus an interrupted run exports nothing twice, and the test part runs what was chosen on the
development part.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from daco_rt._files import write_json
from daco_rt.artifacts import ConceptDictionary, load_dictionary
from daco_rt.dictionary import dictionary_for
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.evaluate.benchmarks import load_benchmark
from daco_rt.evaluate.config import EvaluationConfig
from daco_rt.evaluate.methods import Built, Codes, Method, build_method, check_method, checksum_of
from daco_rt.evaluate.samples import Benchmark, Sample
from daco_rt.evaluate.subject import Ask, BundleSubject, Subject

OBSERVED_PROMPTS = 32
"""Questions of the development part on which random controls are matched."""


class Workshop:
    """Makes the methods of a configuration ready, in one folder.

    Parameters
    ----------
    config : which model, dictionary, engine and data.
    folder : where ``packs`` and ``bundles`` go.

    Attributes
    ----------
    benchmarks : dict of str to Benchmark
        All samples, before the split.

    Raises
    ------
    DacoError
        A benchmark cannot be read.

    Example
    -------
    >>> shop = Workshop(read_config("mine.yaml"), Path("runs/mine"))                 # doctest: +SKIP
    >>> shop.build(shop.config.methods["omp"]).policies                             # doctest: +SKIP
    {'omp@0.3': 'omp@0.3'}
    """

    def __init__(self, config: EvaluationConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.benchmarks: dict[str, Benchmark] = {
            name: load_benchmark(data.kind, data.path, **data.options)
            for name, data in config.benchmarks.items()
        }
        self._loaded: Subject | None = None

    def check(self) -> None:
        """Refuse methods that cannot run, before anything is made or generated.

        Raises
        ------
        DacoError
            As `check_method`; the sentence also names the configuration.
        """
        for method in self.config.methods.values():
            try:
                check_method(method, self.config.engine)
            except DacoError as error:
                raise DacoError(f"{self.config.path}, {error}") from error

    def build(self, method: Method) -> Built:
        """Compile a method, or take what was compiled before from the same things.

        Raises
        ------
        DacoError
            As `build_method`.
        """
        dictionary = self._dictionary(method)
        if method.kind in ("none", "system_prompt", "bundle", "pack"):
            return build_method(method, dictionary, self.folder / "packs")
        pack, note = self.folder / "packs" / method.name, self.folder / "packs" / f"{method.name}.built.json"
        recipe = self._recipe(method, dictionary)
        there = read_record(note)
        if there.get("recipe") == recipe and _is(pack, "pack", there.get("checksum")):
            return Built(method, there["policies"], pack=pack, notes=there["notes"])
        built = build_method(method, dictionary, self.folder / "packs", observe=self.observe)
        if built.notes:
            _write(self.folder / "packs" / f"{method.name}.notes.json", built.notes)
        record = {"recipe": recipe, "checksum": built.checksum, "policies": built.policies}
        _write(note, {**record, "notes": built.notes})
        return built

    def checksum(self, method: Method) -> str | None:
        """Return the checksum of what a method was made into, without making it again; None for methods that
        leave the model alone.
        """
        there = read_record(self.folder / "packs" / f"{method.name}.built.json")
        return there["checksum"] if "checksum" in there else self.build(method).checksum

    def subject(self, built: Built) -> Subject:
        """Return the model under a method's pack.

        Raises
        ------
        DacoError
            The model cannot be exported or loaded.
        """
        config = self.config
        if config.engine == "torch" and built.bundle is None:
            return self._torch(built)
        if built.bundle is not None:
            return BundleSubject(built.bundle, threads=config.threads, batch_size=config.batch_size)
        # Methods without a pack still run in a bundle: that of the model alone, made once.
        if built.pack is None and self._loaded is not None:
            return self._loaded
        folder = self.folder / "bundles" / ("plain" if built.pack is None else built.method.name)
        note = folder.with_name(f"{folder.name}.built.json")
        recipe = {"model": [config.family, config.checkpoint], "pack": built.checksum}
        there = read_record(note)
        if there.get("recipe") != recipe or not _is(folder, "bundle", there.get("checksum")):
            from daco_rt.export import export_model

            export_model(
                config.family, checkpoint=config.checkpoint, pack=built.pack, output=folder, overwrite=True
            )
            _write(note, {"recipe": recipe, "checksum": checksum_of(folder, "bundle")})
        subject = BundleSubject(folder, threads=config.threads, batch_size=config.batch_size)
        if built.pack is None:
            self._loaded = subject
        return subject

    def observe(self, pack: Path) -> Codes:
        """Return all codes of the development questions of the first harmful benchmark, under "observe"."""
        samples = self._observed().samples
        subject = self.subject(Built(Method("observed", "none"), {}, pack=pack))
        asks = [ask_for(sample, None) for sample in samples]
        return subject.observe(asks, max_new_tokens=self.config.max_new_tokens)

    def _observed(self) -> Benchmark:
        config = self.config
        found = self.benchmarks.values()
        chosen = next((b for b in found if b.samples[0].harmful), next(iter(found)))
        return chosen.part("dev", dev=config.dev or 0.3, seed=config.split_seed, limit=OBSERVED_PROMPTS)

    def _recipe(self, method: Method, dictionary: ConceptDictionary | None) -> dict[str, Any]:
        """All that a pack is made from, as JSON gives it back."""
        saes = [m.options["saes"] for m in (method, method.controls) if m is not None and "saes" in m.options]
        recipe: dict[str, Any] = {
            "model": [self.config.family, self.config.checkpoint],
            "dictionary": None if dictionary is None else checksum_of(dictionary.path, "dictionary"),
            "saes": [checksum_of(folder, "sae") for folders in saes for folder in folders.values()],
            "method": method.recipe,
            "strengths": list(method.strengths),
        }
        if method.kind == "random":
            observed = self._observed()
            recipe["observed"] = [observed.card.sha256, [s.id for s in observed.samples]]
            recipe["answers"] = [self.config.engine, self.config.max_new_tokens]
        plain: dict[str, Any] = json.loads(json.dumps(recipe, default=str))
        return plain

    def _torch(self, built: Built) -> Subject:
        from daco_rt.evaluate.torch_subject import TorchSubject

        # One model for all methods: loading it again costs more than most cells.
        if not isinstance(self._loaded, TorchSubject):
            self._loaded = TorchSubject(
                self.config.family,
                self.config.checkpoint,
                batch_size=self.config.batch_size,
                device=self.config.device,
                dtype=self.config.dtype,
            )
        self._loaded.use(built.pack)
        return self._loaded

    def _dictionary(self, method: Method) -> ConceptDictionary | None:
        source = self.config.dictionary
        if source == "built-in":
            source = dictionary_for(self.config.checkpoint)
            if source is None:
                raise DacoError(
                    f"{self.config.path}: checkpoint {self.config.checkpoint} has no built-in dictionary; "
                    "name a folder by dictionary:"
                )
        return None if source is None else load_dictionary(source)


def ask_for(sample: Sample, built: Built | None) -> Ask:
    """Return a sample as the model is asked it under a method."""
    return Ask(sample.prompt, sample.image, None if built is None else built.system)


def read_record(path: Path) -> dict[str, Any]:
    """Return a record in JSON; empty if there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)


def _is(path: Path, kind: str, checksum: Any) -> bool:
    try:
        return checksum_of(path, kind) == checksum
    except ArtifactError:
        return False
