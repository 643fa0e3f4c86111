"""The house: imports go one way, every option is used, and what the README says is so."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from taps.methods import METHODS

#: module of taps -> the modules of taps that it may import at its top
LAYERS = {
    "errors": (), "gates": ("errors",), "delta": ("encoding",), "layer": ("delta", "errors", "gates"),
    "mixed": ("errors", "gates", "layer"), "branches": ("errors", "gates"),
    "together": ("branches", "errors", "gates", "layer"), "adapt": ("errors", "gates", "layer"),
    "blocks": ("adapt", "errors"), "skips": ("adapt", "blocks", "errors"), "adashare": ("adapt", "errors", "gates"),
    "sparse": ("adapt", "errors", "gates"), "support": ("cost", "errors", "model", "sparse"),
    "activations": ("gates", "layer", "model"),
    "products": ("gates", "layer"),
    "reuse": ("activations", "branches", "cost", "errors", "gates", "layer", "model", "products", "together"),
    "video": ("activations", "errors", "layer", "products", "reuse"),
    "trainer": ("data", "errors", "layer", "methods", "model", "plan", "policy", "presets", "train"),
    "sub_tasks": ("errors", "files", "model", "mtl", "plan", "reuse", "scores", "support"),
    "automtl": ("adapt", "adashare", "errors", "gates"),
    "dynashare": ("adapt", "adashare", "errors", "gates", "layer"),
    "methods": ("adapt", "adashare", "automtl", "blocks", "dynashare", "gates", "skips", "sparse"),
    "files": ("errors",), "backbones": ("errors", "files"), "cost": ("layer",),
    "encoding": (), "taskfile": ("cost", "encoding", "errors", "files"), "library": ("cost", "errors", "taskfile"),
    "tasks": ("arguments", "commands", "library"), "arguments": (),
    "certificate": ("errors", "layer", "model", "taskfile"),
    "budget": ("encoding", "errors", "files", "layer", "model", "taskfile"),
    "model": ("adapt", "backbones", "cost", "errors", "gates", "layer", "library", "methods", "mixed", "taskfile",
              "together"),
    "checkpoint": ("errors", "files"),
    "recipe": ("errors", "methods", "model"), "signals": (), "metrics": ("layer", "model"),
    "train": ("activations", "budget", "checkpoint", "cost", "data", "errors", "methods", "model", "recipe", "signals",
              "support"),
    "results": ("cost", "errors", "files", "library", "taskfile"), "plots": ("cost", "files"),
    "commands": ("backbones", "data", "errors", "files", "model", "results", "signals"),
    "experiment": ("budget", "certificate", "checkpoint", "commands", "data", "errors", "files", "layer", "metrics", "model",
                   "plots", "recipe", "results", "signals", "taskfile", "train"),
    "curve": ("budget", "errors", "plots", "results"),
    "policy": ("errors", "files", "gates", "model"), "plan": ("errors", "methods", "recipe"), "presets": (),
    "residual": ("errors",), "heads": ("backbones", "errors", "residual"), "losses": ("data",),
    "contours": ("data",), "record_meters": ("data", "errors", "losses"),
    "meters": ("contours", "data", "losses", "record_meters"),
    "record_plots": ("losses", "plots"),
    "scores": ("benchmarks", "data", "errors", "files", "plots", "policy"),
    "mtl": ("benchmarks", "checkpoint", "commands", "cost", "errors", "files", "layer", "methods", "model", "plan", "plots",
            "policy", "results", "scores", "signals", "train"),
    "__init__": ("backbones", "errors", "gates", "methods", "model"),
}  # fmt: skip

#: package inside taps -> the modules of taps that its files may import
PACKAGES = {
    "benchmarks": ("backbones", "benchmarks", "commands", "data", "errors", "heads", "layer", "losses", "meters", "metrics",
                   "model", "plots", "record_plots", "residual"),
    "data": ("arguments", "commands", "data", "errors", "files"),
}  # fmt: skip


def imports(path, top_only: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" if node.module == "taps" else node.module for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("module", LAYERS)
def test_imports_go_one_way(module):
    names = {name.split(".")[1] for name in imports(ROOT / "taps" / f"{module}.py", True) if name.startswith("taps.")}
    assert names <= set(LAYERS[module])


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_what_is_below_them(package):
    for path in (ROOT / "taps" / package).glob("*.py"):
        names = {name.split(".")[1] for name in imports(path, False) if name.startswith("taps.")}
        assert names <= set(PACKAGES[package]), path


def test_every_module_is_in_the_table_and_none_imports_the_options():
    files = list((ROOT / "taps").rglob("*.py"))
    assert {path.stem for path in files if path.parent.name == "taps"} == set(LAYERS)
    assert not any("options" in imports(path, False) for path in files)


def test_import_taps_loads_no_optional_part():
    code = "import taps, sys; print([m for m in ('matplotlib', 'tensorboard', 'sklearn.datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_library_never_prints_nor_asserts():
    for path in (ROOT / "taps").rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)], path
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"]
        assert not calls or path.name in ("commands.py", "tasks.py", "__main__.py"), path


def test_every_option_is_read():
    from options import evaluate_parser, joint_parser, mtl_parser, sequential_parser

    names = (
        "train_sequential.py",
        "train_joint.py",
        "evaluate.py",
        "options.py",
        "taps/commands.py",
        "taps/experiment.py",
        "taps/benchmarks/__init__.py",
        "taps/benchmarks/classes.py",
        "taps/benchmarks/dense.py",
        "taps/benchmarks/shared.py",
        "taps/benchmarks/stays.py",
        "taps/benchmarks/volumes.py",
        "taps/mtl.py",
        "taps/plan.py",
        "taps/sub_tasks.py",
    )
    of_methods = {name for row in METHODS.values() for name in row.options}  # which are handed on by name
    source = "".join((ROOT / name).read_text() for name in names)
    for parser in (sequential_parser(), joint_parser(), evaluate_parser(), mtl_parser()):
        for action in parser._actions:
            if action.dest != "help" and action.dest not in of_methods:
                assert re.search(rf"\b(options|given)(\.{action.dest}\b|\.get\(.{action.dest})", source), action.dest


@pytest.mark.parametrize("page", ["README.md", *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))])
def test_pages_name_what_exists(page):
    text = (ROOT / page).read_text()
    from options import evaluate_parser, joint_parser, mtl_parser, sequential_parser

    parsers = (sequential_parser(), joint_parser(), evaluate_parser(), mtl_parser())
    known = {option for parser in parsers for option in parser._option_string_actions}
    for script in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', script.read_text()))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known | {"--num_processes"}
    for path in re.findall(r"\]\(([^)#]+)\)", text):
        assert path.startswith("http") or ((ROOT / page).parent / path).exists(), path
    for target in re.findall(r"`make (\w+)`", text):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text()


def test_readme_python_example_runs(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    monkeypatch.chdir(tmp_path)
    code = code.replace("pretrained=True", "pretrained=False").replace("224, 224", "64, 64")
    namespace: dict = {}
    exec(compile(code, "README.md", "exec"), namespace)
    assert (tmp_path / "tasks/sketch/task.safetensors").is_file()
