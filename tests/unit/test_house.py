"""The house rules as tests: floors, light imports, help texts, documents that agree with the code."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from daco_rt.errors import DacoError

ROOT = Path(__file__).resolve().parents[2]
OPERATOR_PAGE = ROOT / "docs" / "operator.md"
MAX_LINES = 450
HEAVY = ("torch", "onnxruntime", "onnxscript", "transformers")


def repository_files() -> list[Path]:
    """Every file that git tracks or would track; all files below the usual folders where git is absent."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"],
            cwd=ROOT,
            capture_output=True,
            check=True,
            text=True,
        ).stdout.split("\0")
        files = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        folders = ("python", "export", "csrc", "cmake", "scripts", "tests", "benchmarks", "docs", ".ci")
        files = [path for folder in folders for path in (ROOT / folder).rglob("*")] + list(ROOT.glob("*"))
    return sorted(path for path in files if path.is_file() and "__pycache__" not in path.parts)


FILES = repository_files()
PAGES = [path for path in FILES if path.suffix == ".md"]
PYTHON = [
    path
    for path in FILES
    if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in ("python", "export", "scripts")
]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "110"} | environment
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


# ---- the floors


def test_arrows_between_packages_point_down():
    done = run(sys.executable, "scripts/assembled_package.py", "layers")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("daco_rt", (*HEAVY, "numpy")),
        ("daco_rt.cli", HEAVY),
        ("daco_rt.artifacts", HEAVY),
        ("daco_rt.concepts", HEAVY),
        ("daco_rt.corpus", (*HEAVY, "pyarrow")),
        ("daco_rt.dictionary", HEAVY),
        ("daco_rt.export", HEAVY),
        ("daco_rt.models", HEAVY),
        ("daco_rt.ops", HEAVY),
        ("daco_rt.runtime", HEAVY),
        ("daco_rt.sae", HEAVY),
        ("daco_rt.steering", HEAVY),
    ],
)
def test_importing_stays_light(module: str, forbidden: tuple[str, ...]):
    code = f"import sys, {module}; print(*sorted(set({forbidden!r}) & set(sys.modules)))"
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], f"import {module} loads {done.stdout}"


def test_native_core_includes_no_framework_and_no_adapter():
    allowed = {"core": ("core/",), "cpu": ("core/", "cpu/")}
    for floor, prefixes in allowed.items():
        for path in FILES:
            if path.is_relative_to(ROOT / "csrc" / floor):
                for included in re.findall(r'^#include "([^"]+)"', path.read_text(), re.M):
                    assert included.startswith(prefixes), f"{named(path)} includes {included}"


# ---- the command line


def verbs_of(text: str) -> list[str]:
    """The sub-commands that a help text lists, in its order."""
    listed = re.search(r"^positional arguments:\n(.*?)(?=^\S|\Z)", text, re.M | re.S)
    return re.findall(r"^    (\w+)\s", listed[1], re.M) if listed else []


@pytest.fixture(scope="module")
def command_help() -> str:
    done = run(sys.executable, "-m", "daco_rt.cli", "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_lists_the_verbs(command_help: str):
    assert {"export", "verify", "generate", "inspect", "models", "doctor"} <= set(verbs_of(command_help))
    assert "daco-rt export --model internvl" in command_help


def test_every_verb_explains_itself_with_an_example(command_help: str):
    mute = []
    for verb in verbs_of(command_help):
        done = run(sys.executable, "-m", "daco_rt.cli", verb, "--help")
        assert done.returncode == 0, f"{verb}: {done.stderr}"
        # The usage line also says "daco-rt VERB"; an example stands on a line of its own.
        if not re.search(rf"^\s*(daco-rt|python -m daco_rt\.)\s*{verb} ", done.stdout, re.M):
            mute.append(verb)
    assert not mute, f"--help of {', '.join(mute)} shows no example"


@pytest.mark.parametrize("verb", [(), ("export",), ("generate", "x"), ("nonsense",)])
def test_bad_usage_ends_without_a_traceback(verb: tuple[str, ...]):
    done = run(sys.executable, "-m", "daco_rt.cli", *verb)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stderr.strip()


# ---- the operator page and the code


def table(heading: str) -> list[list[str]]:
    """The rows of the table below a heading of the operator page, without its title row."""
    page = OPERATOR_PAGE.read_text(encoding="utf-8")
    section = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", page, re.M | re.S)
    assert section, f"{named(OPERATOR_PAGE)} has no section '{heading}'"
    rows = [line.strip().strip("|").split(" | ") for line in section[1].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def documented_inputs(op: str) -> list[str]:
    return [row[1].strip("`") for row in table(f"Inputs of {op}")]


def documented_attributes(op: str) -> dict[str, tuple[str, str]]:
    """Attribute → its type and its default as Python text."""
    return {row[0].strip("`"): (row[1], row[2].strip("`")) for row in table(f"Attributes of {op}")}


OPERATORS = {"SteerSae": "steer_sae", "SteerPursuit": "steer_pursuit"}


@pytest.mark.parametrize("op", OPERATORS)
def test_documented_inputs_are_those_of_the_graph(op: str):
    from daco_rt.models.decoder import OPERANDS
    from daco_rt.ops.onnx_functions import steer_function

    assert documented_inputs(op) == ["z", "slots", *OPERANDS[op]]
    coder = "topk" if op == "SteerSae" else "omp"
    function = steer_function(op, coder=coder, k=2, k_out=1)  # type: ignore[arg-type]
    assert [value.name for value in function.inputs] == documented_inputs(op)
    assert set(documented_attributes(op)) == set(function.attributes) - {"plugin_namespace", "plugin_version"}
    assert len(function.outputs) == len(table("Outputs of both"))


@pytest.mark.parametrize("op", OPERATORS)
def test_documented_inputs_are_those_of_the_packs(op: str):
    from daco_rt.artifacts.operands import OPERANDS

    kind = {"SteerSae": "sae", "SteerPursuit": "pursuit"}[op]
    stored = [name for name in documented_inputs(op) if name not in ("z", "slots")]
    assert stored == list(OPERANDS[kind])


@pytest.mark.parametrize("op", OPERATORS)
def test_documented_schema_is_that_of_the_torch_library(op: str):
    torch = pytest.importorskip("torch")
    try:
        from daco_rt.ops import torch_ops  # noqa: F401  (loads the library)
    except DacoError as error:
        pytest.skip(str(error))
    arguments = getattr(torch.ops.daco, OPERATORS[op]).default._schema.arguments
    assert [a.name for a in arguments if not a.kwarg_only] == documented_inputs(op)
    kinds = {"string": "str", "int": "int", "float": "float"}
    documented = {name: kinds[kind] for name, (kind, _) in documented_attributes(op).items()}
    assert {a.name: str(a.type) for a in arguments if a.kwarg_only} == documented


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("place", ["reference", "numpy", "torch_ops"])
def test_documented_defaults_are_those_of_the_functions(op: str, place: str):
    try:
        module = importlib.import_module(f"daco_rt.ops.{place}")
    except (DacoError, ModuleNotFoundError) as error:
        pytest.skip(str(error))
    parameters = inspect.signature(getattr(module, OPERATORS[op])).parameters
    for name, (_, default) in documented_attributes(op).items():
        assert parameters[name].default == ast.literal_eval(default), name
    assert {*documented_inputs(op), *documented_attributes(op)} <= set(parameters)


def test_documented_affine_operator_is_that_of_the_code():
    from daco_rt.artifacts.operands import OPERANDS as STORED
    from daco_rt.models.decoder import OPERANDS
    from daco_rt.ops import numpy as numpy_ops
    from daco_rt.ops import reference
    from daco_rt.ops.onnx_functions import affine_function

    inputs, attributes = documented_inputs("SteerAffine"), documented_attributes("SteerAffine")
    function = affine_function()
    assert inputs == ["z", "slots", *OPERANDS["SteerAffine"]] == [value.name for value in function.inputs]
    assert inputs[2:] == list(STORED["affine"])
    assert set(attributes) == set(function.attributes) - {"plugin_namespace", "plugin_version"}
    for module in (reference, numpy_ops):
        parameters = inspect.signature(module.steer_affine).parameters
        assert {*inputs, *attributes} <= set(parameters)
        for name, (_, default) in attributes.items():
            assert parameters[name].default == ast.literal_eval(default), name


def test_documented_coders_are_those_of_the_code():
    from daco_rt.artifacts.operands import CODERS
    from daco_rt.ops.checks import PURSUIT_CODERS, SAE_CODERS

    documented: dict[str, list[str]] = {"SteerSae": [], "SteerPursuit": []}
    for row in table("Coders"):
        documented[row[1]].append(row[0].strip("`"))
    assert tuple(documented["SteerSae"]) == SAE_CODERS == CODERS["sae"]
    assert tuple(documented["SteerPursuit"]) == PURSUIT_CODERS == CODERS["pursuit"]


# ---- documents


def prose(page: Path) -> str:
    """A page without its code, in which brackets are no links."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """The fragments under which a page's headings can be linked."""
    found = set()
    for title in re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M):
        plain = re.sub(r"[^\w\- ]", "", title.lower())
        found.add(plain.strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_inside_the_repository_resolve(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{named(page)} links to {target}, which does not exist"
        if fragment and place.suffix == ".md":
            assert fragment in anchors(place), f"{named(page)} links to {target}: no such heading"


def inline_code(page: Path) -> list[str]:
    """The spans of a page between single backticks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_named_paths_and_modules_exist(page: Path):
    folders = ("python", "export", "csrc", "cmake", "scripts", "tests", "benchmarks", "docs")
    for code in inline_code(page):
        if re.fullmatch(rf"({'|'.join(folders)})/[\w./-]+", code):
            assert (ROOT / code).exists(), f"{named(page)} names {code}, which does not exist"
        elif re.fullmatch(r"daco_rt(\.[a-z]\w*)+", code):
            resolve(code, page)


def resolve(dotted: str, page: Path) -> None:
    """Import a module, or the module of a name; a part that this installation lacks is left out."""
    parent, _, name = dotted.rpartition(".")
    try:
        if importlib.util.find_spec(dotted) is None:
            assert hasattr(importlib.import_module(parent), name), f"{named(page)} names {dotted}"
    except ModuleNotFoundError:
        assert hasattr(importlib.import_module(parent), name), f"{named(page)} names {dotted}"
    except DacoError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def help_of() -> dict[str, str]:
    """Help texts by verb, filled as they are asked for."""
    return {}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_documented_commands_take_their_options(page: Path, help_of: dict[str, str]):
    for command in re.findall(r"daco-rt [a-z]+[^`\n]*", page.read_text(encoding="utf-8")):
        verb, options = command.split()[1], re.findall(r"(?<=\s)--[a-z-]+", command)
        if verb not in help_of:
            help_of[verb] = run(sys.executable, "-m", "daco_rt.cli", verb, "--help").stdout
        assert help_of[verb], f"{named(page)}: there is no 'daco-rt {verb}'"
        for option in options:
            assert option in help_of[verb], f"{named(page)}: daco-rt {verb} has no {option}"


def test_documented_floors_are_those_that_are_checked():
    checked = (ROOT / ".importlinter").read_text().split("layers =\n")[1]
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    documented = re.search(r"^```\n(cli\n.*?)^```", page, re.M | re.S)
    assert documented

    def floors(text: str) -> list[set[str]]:
        # Names in parentheses are rooms that may be missing.
        rows = [re.sub(r"\(daco_rt\.\w+\)", "", row).replace("daco_rt.", "") for row in text.splitlines()]
        return [found for row in rows if (found := set(re.findall(r"\w+", row)))]

    assert floors(documented[1]) == floors(checked)


def test_documented_families_are_those_that_are_registered():
    from daco_rt.models import families
    from daco_rt.models.catalogue import models_available

    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for name, spec in families().items():
        row = re.search(rf"^\| `{name}` \|(.*)$", page, re.M)
        assert row, f"docs/models.md does not list the family {name}"
        assert all(f"`{architecture}`" in row[1] for architecture in spec.architectures)
    for model in models_available():
        assert re.search(rf"^\| `{model.name}` \|.*{re.escape(model.licence)}", page, re.M)


def runnable(page: Path) -> list[tuple[int, str]]:
    """Blocks marked ``python run``: (line of the first statement, source)."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python run\n(.*?)^```$", text, re.M | re.S)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=named)
def test_examples_run(page: Path, tmp_path: Path):
    # The blocks of a page are one program; blank lines keep the page's line numbers in a traceback.
    lines: list[str] = []
    for start, source in runnable(page):
        lines += [""] * (start - len(lines)) + source.splitlines()
    program = tmp_path / f"page_{page.stem}.py"
    program.write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = run(sys.executable, str(program), cwd=tmp_path)
    if "DacoError: daco_rt was built without" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, f"{named(page)}\n{done.stdout}\n{done.stderr}"


# ---- sources


def sources(*suffixes: str) -> Iterator[Path]:
    return (path for path in FILES if path.suffix in suffixes)


def test_no_source_file_is_long():
    long = {}
    for path in sources(".py", ".cpp", ".h", ".inl", ".cu", ".cuh"):
        count = path.read_text(encoding="utf-8").count("\n")
        if count > MAX_LINES:
            long[named(path)] = count
    assert not long, f"split these files by idea: {long}"


@pytest.mark.parametrize("path", PYTHON, ids=named)
def test_public_names_are_documented(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    defined = (node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)))
    # A main() is documented by its module, a plain NamedTuple by its fields.
    mute = [
        node.name
        for node in defined
        if not node.name.startswith("_")
        and node.name != "main"
        and not (isinstance(node, ast.ClassDef) and "NamedTuple" in map(ast.unparse, node.bases))
        and ast.get_docstring(node) is None
    ]
    assert path.name == "__main__.py" or ast.get_docstring(tree), f"{named(path)} has no docstring"
    assert not mute, f"{named(path)}: {', '.join(mute)} have no docstring"


def test_no_unfinished_work_and_no_machine_paths():
    marks = re.compile(r"\b(TODO|FIXME|XXX)\b|(?<![\w.])/(work|root)/")
    for path in sources(".py", ".cpp", ".h", ".inl", ".md", ".toml", ".cmake", ".sh", ".yaml", ".txt"):
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            assert not marks.search(line), f"{named(path)}, line {number}: {line.strip()}"


def narrows_a_type(test: ast.expr) -> bool:
    """``x is not None``, alone or joined by ``and``: said for the type checker only."""
    if isinstance(test, ast.BoolOp):
        return all(map(narrows_a_type, test.values))
    return isinstance(test, ast.Compare) and all(isinstance(op, ast.IsNot) for op in test.ops)


def test_user_input_is_never_asserted():
    """``assert`` vanishes under ``python -O``: the package keeps it for types, or says why it cannot fail."""
    for path in PYTHON:
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Assert) and not narrows_a_type(node.test):
                assert "#" in source.splitlines()[node.lineno - 1], f"{named(path)}, line {node.lineno}"
