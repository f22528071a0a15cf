"""Run every benchmark of this folder and put the tables into results/README.md: run_all.py [NAME...]."""

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def scripts(folder: Path = HERE) -> list[Path]:
    """The benchmarks: files beside this one that run as a script; each takes ``--json FILE``."""
    return [
        path for path in sorted(folder.glob("*.py")) if path.name != "run_all.py" and "__main__" in path.read_text()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these (file names without .py)")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    found = {path.stem: path for path in scripts()}
    unknown = sorted(set(arguments.names) - set(found))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(found)}")
    arguments.results.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in arguments.names or found:
        print(f"== {name}", flush=True)
        target = arguments.results / f"{name}.json"
        if subprocess.run([sys.executable, found[name], "--json", target], check=False).returncode:
            failed.append(name)
    page = render(read(arguments.results, found))
    (arguments.results / "README.md").write_text(page)
    print(f"== tables in {arguments.results / 'README.md'}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def read(folder: Path, names: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """The kept outcomes by script name; a file holds one object or a list of them."""
    kept = {}
    for name in names:
        path = folder / f"{name}.json"
        if path.exists():
            content = json.loads(path.read_text())
            kept[name] = content if isinstance(content, list) else [content]
    return kept


def render(outcomes: dict[str, list[dict[str, Any]]]) -> str:
    """A page with one line a benchmark, then every table."""
    lines = [
        "# Benchmarks",
        "",
        "Made by `make bench`. Each ratio compares the library with a named peer in one run.",
    ]
    lines += [
        f"Last run on {machine()}.",
        "",
        "| benchmark | peer | ratio | goal | reached |",
        "| --- | --- | --- | --- | --- |",
    ]
    for each in (each for several in outcomes.values() for each in several):
        ratio, goal = each["ratio"], each["goal"]
        numbers = isinstance(ratio, int | float) and isinstance(goal, int | float)
        reached = ("yes" if ratio >= goal else "no") if numbers else "-"
        lines.append(f"| {cell(each['name'])} | {cell(each['peer'])} | {cell(ratio)} | {cell(goal)} | {reached} |")
    for script, several in outcomes.items():
        lines += ["", f"## {script}"]
        for each in several:
            columns = list(dict.fromkeys(key for row in each["rows"] for key in row))
            if columns:
                lines += [
                    "",
                    f"{each['name']}, against {each['peer']}:",
                    "",
                    f"| {' | '.join(columns)} |",
                    "| --- " * len(columns) + "|",
                ]
                lines += [
                    "| " + " | ".join(cell(row.get(column, "")) for column in columns) + " |" for row in each["rows"]
                ]
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def machine() -> str:
    system = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}"
    return f"{system}, Python {platform.python_version()}, torch {version('torch')}"


if __name__ == "__main__":
    sys.exit(main())
