"""Run a checker on the package as it is installed, where `export/` is `daco_rt.export`.

usage: assembled_package.py mypy | layers

The tree is put together under build/package by symbolic links to the files, so that messages still
name real lines. Exit status: the checker's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ASSEMBLED = ROOT / "build" / "package"


def assemble() -> Path:
    """Link every Python file into build/package/daco_rt and return that folder's parent."""
    shutil.rmtree(ASSEMBLED, ignore_errors=True)
    for source, package in ((ROOT / "python" / "daco_rt", "daco_rt"), (ROOT / "export", "daco_rt/export")):
        for file in source.rglob("*.py"):
            link = ASSEMBLED / package / file.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    return ASSEMBLED


def main() -> int:
    tree = assemble()
    tools = Path(sys.executable).parent
    if sys.argv[1:] == ["mypy"]:
        command = [str(tools / "mypy"), "--config-file", str(ROOT / "pyproject.toml"), "-p", "daco_rt"]
    elif sys.argv[1:] == ["layers"]:
        # An editable install puts its own finder before the path; without it the linked tree is what is read.
        code = (
            "import sys\n"
            "ours = lambda finder: type(finder).__module__.startswith('_editable_')\n"
            "sys.meta_path[:] = [finder for finder in sys.meta_path if not ours(finder)]\n"
            "from importlinter.cli import lint_imports_command\n"
            "lint_imports_command()"
        )
        command = [sys.executable, "-c", code, "--config", str(ROOT / ".importlinter"), "--no-cache"]
    else:
        print(__doc__, file=sys.stderr)
        return 2
    env = os.environ | {"PYTHONPATH": str(tree), "MYPYPATH": str(tree)}
    return subprocess.call(command, cwd=tree, env=env)


if __name__ == "__main__":
    sys.exit(main())
