"""The documentation's generated parts: front page, options and reference. ``python docs/site.py`` writes ``options.md``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

#: pages of the site that lie elsewhere in the repository
ELSEWHERE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "datasets.md": "datasets/README.md",
    "results.md": "results/README.md",
}
#: scripts that run commands
SCRIPTS = {"train": "train_sequential.py", "joint": "train_joint.py", "mtl": "train_mtl.py", "evaluate": "evaluate.py"}
_LINK = re.compile(r"(!?)\[([^\]]+)\]\(([^)\s]+)\)")


def options_page() -> str:
    """Return the page of all options of all programs, from their declarations."""
    from taps.cli.main import COMMANDS
    from taps.cli.options import parser_of

    programs: dict[type, list[str]] = {}
    for name, command in COMMANDS.items():
        programs.setdefault(command.settings, []).append(f"`taps {name}`")
        if name in SCRIPTS:
            programs[command.settings].append(f"`{SCRIPTS[name]}`")
    lines = [
        "# Options",
        "",
        "Every option is declared once, in [taps/settings/](../taps/settings/), with its name, default, range and help. Command",
        "lines, `--config` files, `settings.yaml`, the checks of Python arguments and this page are made from that.",
        "`--config FILE` reads a YAML file of settings; options on the command line win. Each run writes `settings.yaml`, and",
        "`--config results/NAME/settings.yaml` repeats it. The published presets of `train_mtl.py` and the demo's are in",
        "[taps/settings/published/](../taps/settings/published/).",
    ]
    for kind, names in programs.items():
        lines += ["", f"## {', '.join(names)}", "", "| option | meaning |", "|---|---|"]
        for group in parser_of(kind)._action_groups:
            for action in group._group_actions:
                if action.dest != "help":
                    names = (
                        ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
                    )
                    text = (action.help or "").replace("%%", "%").replace("|", "\\|").replace("%(prog)s", "")
                    text = (
                        re.sub(r"default: [0-9]+(?=\))", "default: the number of processors", text)
                        if action.dest == "workers"
                        else text
                    )
                    lines.append(f"| {names} | {text} |")
    return "\n".join(lines) + "\n"


def api_page() -> str:
    """Return the reference of the public names, whose docstrings the site's builder fills in."""
    import taps

    lines = ["# Python reference", ""]
    for name in sorted(taps._HOMES, key=lambda name: (name[0].isupper(), name)):
        lines += [f"## `taps.{name}`", "", f"::: taps.{taps._HOMES[name]}.{name}", ""]
    return "\n".join(lines)


def on_files(files, config):
    """Add the generated pages to the site (a hook of mkdocs)."""
    from mkdocs.structure.files import File

    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "api.md", content=api_page()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Make links between pages of the repository links between pages of the site; other files are named without a link."""
    source = Path(ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    pages = {str(Path(path)): name for name, path in ELSEWHERE.items()}

    def moved(match: re.Match) -> str:
        image, text, target = match.groups()
        if target.startswith(("http", "#")):
            return match.group()
        path, _, anchor = target.partition("#")
        found = (ROOT / source.parent / path).resolve().relative_to(ROOT)
        name = pages.get(str(found)) or (str(found.relative_to("docs")) if found.parts[0] == "docs" else None)
        if name is None:
            return text if text.startswith("`") else f"`{text}`"
        return f"{image}[{text}]({name}{'#' + anchor if anchor else ''})"

    return _LINK.sub(moved, markdown)


if __name__ == "__main__":
    (ROOT / "docs" / "options.md").write_text(options_page(), encoding="utf-8")
