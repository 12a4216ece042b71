"""What a verification found: a list of checks, each with what was measured and what it had to be."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

State = Literal["pass", "fail", "skip"]
_COLOURS = {"pass": "green", "fail": "bold red", "skip": "yellow"}


@dataclass(frozen=True)
class Check:
    """One line of the verification table."""

    name: str
    state: State
    measured: str
    bound: str = ""


@dataclass
class Report:
    """All checks of one bundle, and one question answered with and without steering.

    ``passed`` is False as soon as one check failed; skipped checks say why they could not run.
    """

    bundle: str
    checkpoint: str
    policy: str
    checks: list[Check] = field(default_factory=list)
    example: dict[str, Any] | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.state != "fail" for check in self.checks)

    def add(self, name: str, ok: bool, measured: str, bound: str = "") -> None:
        """Record a check that ran."""
        self.checks.append(Check(name, "pass" if ok else "fail", measured, bound))

    def skip(self, name: str, reason: str) -> None:
        """Record a check that could not run here."""
        self.checks.append(Check(name, "skip", reason))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {**asdict(self), "passed": self.passed}

    def print(self) -> None:
        """Print the table, the example and the verdict for a person."""
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
        table = Table(title=f"{self.bundle} ({self.checkpoint}, policy {self.policy})", title_justify="left")
        for column in ("check", "", "measured", "must be"):
            table.add_column(column, overflow="fold")
        for check in self.checks:
            colour = _COLOURS[check.state]
            table.add_row(
                check.name, f"[{colour}]{check.state}[/]", escape(check.measured), escape(check.bound)
            )
        console.print(table)
        if self.example is not None:
            console.print(f"[bold]{escape(self.example['question'])}[/]")
            console.print(f"  off      {escape(self.example['off'])}")
            console.print(f"  {self.policy:<8} {escape(self.example['steered'])}")
            console.print(f"  removed  {escape(self.example['removed'] or 'nothing')}")
        failed = sum(check.state == "fail" for check in self.checks)
        verdict = "[green]verified[/]" if not failed else f"[bold red]{failed} check(s) failed[/]"
        console.print(f"{verdict} in {self.seconds:.1f} s")
        if not failed:
            console.print(f"next: daco-rt generate {escape(self.bundle)} --prompt 'What is a dagger?'")
