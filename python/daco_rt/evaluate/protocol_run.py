"""An evaluation under a protocol: all trials on the development part, a frozen choice, the test part once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from daco_rt.errors import ArtifactError, DacoError
from daco_rt.evaluate.choosing import (
    FILE,
    difference,
    freeze,
    read_chosen,
    run_on_test,
    trials_of,
    write_chosen,
)
from daco_rt.evaluate.config import EvaluationConfig
from daco_rt.evaluate.run import Evaluation, Pending
from daco_rt.evaluate.summary import summarise
from daco_rt.evaluate.workshop import Workshop


class ProtocolRun:
    """Both parts of an evaluation, in ``dev`` and ``test`` of one folder, and ``chosen.json`` between them.

    Parameters
    ----------
    config : with a protocol.

    Attributes
    ----------
    development : Evaluation

    Raises
    ------
    DacoError
        The configuration has no protocol, or the criterion does not fit its benchmark.

    Example
    -------
    >>> run = ProtocolRun(read_config("configs/evaluate.yaml"))                     # doctest: +SKIP
    >>> run.run()                                                                   # doctest: +SKIP
    >>> run.chosen["chosen"]["0.03"]["omp"]                                         # doctest: +SKIP
    'omp@0.4'
    """

    def __init__(self, config: EvaluationConfig) -> None:
        if config.protocol is None:
            raise DacoError(f"{config.path} has no protocol; add one, or run the parts apart")
        self.config, self.protocol, self.output = config, config.protocol, config.output
        self.workshop = Workshop(config, config.output)
        dev = replace(config, part="dev", output=config.output / "dev")
        # A control has nothing to be chosen: it takes its method's strength, and runs on the test part alone.
        tried = {
            label for method in config.methods.values() if method.controls is None for label in method.labels
        }
        self.development = Evaluation(dev, workshop=self.workshop, only=tried)
        criterion = self.protocol.criterion
        samples = self.development.benchmarks[criterion.benchmark].samples
        if criterion.name in ("main", "own", "named") and not any(sample.harmful for sample in samples):
            raise DacoError(
                f"{config.path}, protocol: the criterion '{criterion}' is a rate of bad answers, and "
                f"{criterion.benchmark} has harmless questions only; choose a benchmark of harmful ones"
            )

    @property
    def chosen(self) -> dict[str, Any] | None:
        """What ``chosen.json`` says; None before the choice."""
        return read_chosen(self.output / FILE)

    @property
    def test(self) -> Evaluation | None:
        """The test part with the frozen choice; None before the choice."""
        record = self.chosen
        if record is None:
            return None
        budgets = {float(budget): row for budget, row in record["chosen"].items()}
        only = run_on_test(self.config.methods, budgets)
        config = replace(self.config, part="test", output=self.output / "test")
        return Evaluation(config, workshop=self.workshop, only=only, packs=record["packs"])

    @property
    def held(self) -> list[Pending]:
        """Development answers about which a judge that the choice rests on could not be asked."""
        return [row for row in self.development.pending() if row.judge in self.protocol.judges]

    def run(self, *, stop_before_test: bool = False) -> None:
        """Run whatever is missing: trials, choice, test part. While answers are `held` nothing is chosen.

        Raises
        ------
        DacoError
            As `Evaluation.run`; also if the test part has begun under another choice.
        """
        self.development.run()
        if stop_before_test or self.held:
            return
        self.freeze()
        test = self.test
        assert test is not None
        test.run()

    def freeze(self) -> None:
        """Write the choice down. One that the test part has seen stays as it is.

        Raises
        ------
        ArtifactError
            The test part has begun under another choice than would be made now.
        """
        trials = trials_of(self.protocol, summarise(self.development))
        made = {name: self.workshop.checksum(method) for name, method in self.config.methods.items()}
        packs = {name: checksum for name, checksum in made.items() if checksum is not None}
        fresh = freeze(self.development, self.protocol, trials, packs)
        old = self.chosen
        begun = any((self.output / "test" / "answers").rglob("*.jsonl*"))
        if old is not None and begun:
            changed = difference(old, fresh)
            if changed:
                raise ArtifactError(
                    f"{self.output}: the test part was run under the choice of {old['date']} and is not run "
                    f"under another ({changed}); undo the change, or choose another output folder and say "
                    "that the test questions have been seen"
                )
            return
        if begun:
            raise ArtifactError(
                f"{self.output}: there are test answers but no {FILE}, so nothing says what they were chosen "
                "by; choose another output folder"
            )
        write_chosen(self.output / FILE, fresh)
