"""Write the tables of README.md and benchmarks/RESULTS.md from the result files in benchmarks/results:

    python benchmarks/tables.py            rewrite every table that lies between <!-- table NAME --> and <!-- end NAME -->
    python benchmarks/tables.py --check    write nothing; name the tables that differ from their result files, and exit with 1

NAME is a key of result_tables.TABLES, and for a measurement on one GPU also that GPU: "steps h200" is made from flux_step_h200.json. Below
each table stands its source: the result file, the machine, the date and the command. A table has results of one GPU.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import result_tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = "README.md", "benchmarks/RESULTS.md"
REGION = re.compile(r"(<!-- table ([\w. -]+?) -->\n)(.*?)(<!-- end \2 -->)", re.DOTALL)


class Results:
    """The result files. results("flux_step_h200") is that file's contents; `used` holds the contents of all files that were read."""

    def __init__(self, folder: Path = RESULTS):
        self.folder, self.used = folder, {}

    def __call__(self, name: str) -> dict:
        self.used[name] = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        return self.used[name]

    def names(self, beginning: str) -> list[str]:
        """The files whose names begin so, in alphabetical order."""
        return sorted(path.stem for path in self.folder.glob(f"{beginning}*.json"))


def source(name: str, result: dict, to_results: str) -> str:
    """The line below a table on one of its result files. to_results: the way from the document to the folder of results."""
    runs = [result, *result.get("entries", ())]
    torch = " and ".join(sorted({run["torch"] for run in runs if "torch" in run}))
    dates = " and ".join(sorted({run["date"][:10] for run in runs if "date" in run}))
    command = next(command for beginning, command in result_tables.COMMANDS.items() if name.startswith(beginning))
    return f"[{name}.json]({to_results}/{name}.json): {result['device']}, PyTorch {torch}, {dates}; `{command}`"


def made(name: str, to_results: str, folder: Path = RESULTS) -> str:
    """The text of table NAME: Markdown, and its sources. Raises KeyError for an unknown table, and ValueError if its files are of several
    GPUs."""
    kind, _, machine = name.partition(" ")
    results = Results(folder)
    lines = result_tables.TABLES[kind](results, *machine.split())
    gpus = {result["device"] for result in results.used.values() if "NVIDIA" in result["device"]}
    if len(gpus) > 1:
        raise ValueError(f"The table {name} would have results of {' and '.join(sorted(gpus))}.")
    sources = [source(*used, to_results) for used in results.used.items()]
    return "\n".join(["", *lines, "", f"<sub>Source: {'<br>'.join(sources)}</sub>", "", ""])


def rewritten(text: str, document: str, folder: Path = RESULTS) -> tuple[str, list[str]]:
    """(the text of a document with all its tables made anew, the names of those that changed). document: its path from the root."""
    to_results = "results" if document.startswith("benchmarks/") else "benchmarks/results"
    changed = []

    def table(found: re.Match) -> str:
        begin, name, old, end = found.groups()
        new = made(name, to_results, folder)
        if new != old:
            changed.append(name)
        return begin + new + end

    return REGION.sub(table, text), changed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and exit with 1 if a table differs")
    args = parser.parse_args()
    differing = False
    for document in DOCUMENTS:
        path = ROOT / document
        text, changed = rewritten(path.read_text(encoding="utf-8"), document)
        for name in changed:
            print(f"{document}: {name}")
        differing |= bool(changed)
        if changed and not args.check:
            path.write_text(text, encoding="utf-8")
    return int(args.check and differing)


if __name__ == "__main__":
    sys.exit(main())
