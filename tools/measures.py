"""Measures how the library notebooks are written: cell lengths, definitions per cell, demonstrations, names, lines,
packages.

`python tools/measures.py [PACKAGE ...]` prints the measures and what misses them; tests/test_repository.py holds the
limits.
"""
import argparse
import ast
import json
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ASIDE = ("experiments", "benchmarks", "explore", "results", "sweeps", "figures")
LINE_LENGTH, CELLS_AHEAD = 120, 2
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Cell:
    """One cell of a library notebook. module: `package/name`. lines: non-blank lines of an exported cell without its
    directives."""

    module: str
    kind: str
    source: str
    exported: bool

    @property
    def code(self) -> str: return re.sub(r"^#\|.*\n?", "", self.source, flags=re.M)

    @property
    def lines(self) -> int: return sum(bool(line.strip()) for line in self.code.splitlines())

    def definitions(self) -> list[Definition]:
        """Functions and classes at the top level of an exported cell."""
        return [node for node in ast.parse(self.code).body if isinstance(node, Definition)] if self.exported else []


def read_cells(path: Path) -> list[Cell]:
    """The cells of a notebook at nbs/<package>/<name>.ipynb."""
    module, cells = path.relative_to(ROOT / "nbs").with_suffix("").as_posix(), []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        exported = cell["cell_type"] == "code" and re.search(r"^#\| *exports?\b", source, re.M) is not None
        cells.append(Cell(module, cell["cell_type"], source, exported))
    return cells


def library(packages: list[str] | None = None) -> list[list[Cell]]:
    """The cells of every library notebook, of the given packages or of all."""
    paths = sorted(path for path in (ROOT / "nbs").glob("*/*.ipynb") if path.parent.name not in ASIDE)
    return [read_cells(path) for path in paths if not packages or path.parent.name in packages]


def public_definitions(notebooks: list[list[Cell]]) -> Iterator[tuple[Cell, Definition, bool]]:
    """(cell, definition, whether an unexported code cell among the next two cells names it) of each public
    definition."""
    for cells in notebooks:
        for number, cell in enumerate(cells):
            near = [other.source for other in cells[number + 1:number + 1 + CELLS_AHEAD] if other.kind == "code"
                    and not other.exported]
            for node in cell.definitions():
                if node.name.startswith("_"): continue
                yield cell, node, any(re.search(rf"\b{node.name}\b", source) for source in near)


def names_defined_twice(notebooks: list[list[Cell]]) -> dict[str, list[str]]:
    """Public name -> modules, for names that several modules define."""
    homes: dict[str, set[str]] = {}
    for cell, node, _ in public_definitions(notebooks): homes.setdefault(node.name, set()).add(cell.module)
    return {name: sorted(modules) for name, modules in sorted(homes.items()) if len(modules) > 1}


def exported_lines(module: Path) -> list[str]:
    """The lines of an exported module without nbdev's cell markers."""
    return [line for line in module.read_text(encoding="utf-8").splitlines() if not line.startswith("# %%")]


def package_shares() -> dict[str, float]:
    """Package -> its share of all exported lines."""
    lines = {folder.name: sum(len(exported_lines(path)) for path in folder.glob("*.py"))
             for folder in sorted((ROOT / "kilonb").iterdir()) if (folder / "__init__.py").is_file()}
    return {name: count / sum(lines.values()) for name, count in lines.items()}


def measures(notebooks: list[list[Cell]]) -> dict[str, float]:
    """The numbers whose limits tests/test_repository.py holds."""
    cells = [cell for one in notebooks for cell in one if cell.exported]
    lengths, defining = sorted(cell.lines for cell in cells), [cell for cell in cells if cell.definitions()]
    shown = [ok for *_, ok in public_definitions(notebooks)]
    long = [line for one in notebooks for cell in one if cell.kind == "code" for line in cell.source.splitlines()
            if len(line) > LINE_LENGTH]
    return {
        "cell_lines_median": statistics.median(lengths),
        "cell_lines_p90": lengths[int(.9 * len(lengths))],
        "cell_lines_max": lengths[-1],
        "one_definition_share": sum(len(cell.definitions()) == 1 for cell in defining) / max(1, len(defining)),
        "demonstrated_share": sum(shown) / max(1, len(shown)),
        "names_defined_twice": len(names_defined_twice(notebooks)),
        "lines_over_120": len(long),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure how the library notebooks are written.")
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="only these packages (default: all)")
    options = parser.parse_args()
    notebooks = library(options.packages)
    if not notebooks: parser.error(f"no library notebook in {', '.join(options.packages)}")
    for name, value in measures(notebooks).items(): print(f"{name:24}{value:8.3g}")
    largest = max((share, name) for name, share in package_shares().items())
    print(f"{'largest_package_share':24}{largest[0]:8.3g}  ({largest[1]})")
    for cell in (cell for one in notebooks for cell in one if cell.exported and cell.lines > 40):
        print(f"over 40 lines: {cell.module}: {', '.join(node.name for node in cell.definitions())} ({cell.lines})")
    hidden = [f"{cell.module}:{node.name}" for cell, node, ok in public_definitions(notebooks) if not ok]
    print(f"not demonstrated ({len(hidden)}): {' '.join(hidden)}")
    for name, modules in names_defined_twice(library()).items(): print(f"defined twice: {name} in {', '.join(modules)}")
    return 0


if __name__ == "__main__": sys.exit(main())
