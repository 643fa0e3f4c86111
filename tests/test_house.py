"""Rules of the repository: imports go one way, every option is used, and the README's statements hold."""

import ast
import re
import subprocess
import sys
from collections.abc import Collection
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

from taps.methods.registry import METHODS

#: the folders and files of ``taps/`` from the ground up; a line imports from those above it, and its own files form no circle
LEVELS = (
    ("version", "errors", "stop_signals", "memory"),
    ("settings",),
    ("core",),
    ("storage", "multitask"),
    ("methods", "networks"),
    ("task_model",),
    ("data",),
    ("metrics",),
    ("plots",),
    ("training",),
    ("reuse", "benchmarks"),
    ("runs",),
    ("serving",),
    ("cli",),
    ("__init__", "__main__"),
)


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "taps").rglob("*.py")
    }


def imports(module: str, known: Collection[str]) -> set[str]:
    """Return the ``taps`` modules that a module imports: at its top, inside a function, or only for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "taps":
            found |= {name if (name := f"{node.module}.{alias.name}") in known else node.module for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "taps"}
    return found


def place(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def test_imports_go_down_and_never_in_a_circle():
    level = {name: index for index, names in enumerate(LEVELS) for name in names}
    known = set(modules())
    graph = {module: imports(module, known) for module in known}
    for module, others in graph.items():
        for other in others:
            same = place(module) == place(other)
            assert same or level[place(other)] < level[place(module)], f"{module} imports {other}"
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_scripts_are_doors_and_the_library_does_not_know_them():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    for path in modules().values():
        names = {n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)}
        assert not names & scripts, path
    for script in scripts:
        assert len((ROOT / f"{script}.py").read_text().splitlines()) <= 30, script


def test_import_taps_loads_no_optional_part():
    code = "import taps, sys; print([m for m in ('matplotlib', 'tensorboard', 'sklearn.datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_library_never_prints_nor_asserts():
    for path in (ROOT / "taps").rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)], path
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"]
        assert not calls or path.parent.name == "cli", path


def test_every_option_is_read():
    from taps.cli.main import COMMANDS
    from taps.cli.options import parser_of

    of_methods = {name for row in METHODS.values() for name in row.options}  # which are handed on by name
    source = "".join(path.read_text() for name, path in modules().items() if name != "taps.cli.options")
    for command in COMMANDS.values():
        for action in parser_of(command.settings)._actions:
            if action.dest not in ("help", "config", "ignore_unknown") and action.dest not in of_methods:
                assert re.search(rf"\b(options|given|settings|recipe|own|lengths|self)\.{action.dest}\b", source), (
                    action.dest
                )


@pytest.mark.parametrize("page", ["README.md", *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))])
def test_pages_name_what_exists(page):
    text = (ROOT / page).read_text()
    from taps.cli.main import COMMANDS
    from taps.cli.options import parser_of

    parsers = [parser_of(command.settings) for command in COMMANDS.values()]
    known = {option for parser in parsers for option in parser._option_string_actions}
    for script in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', script.read_text()))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known | {"--num_processes"}
    for path in re.findall(r"\]\(([^)#]+)\)", text):
        assert path.startswith("http") or ((ROOT / page).parent / path).exists(), path
    for target in re.findall(r"`make (\w+)`", text):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text()
