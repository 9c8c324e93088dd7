"""Fuzz every reader: `python -m tests.fuzz --inputs 1000 [--readers a,b] [--seed 0] [--show READER:NUMBER]`."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.fuzz.engine import Bench, Tally, all_readers, fuzz, make_input


def _print(tally: Tally) -> None:
    print(
        f"{tally.reader:24} {tally.values:6} values {tally.refused:6} refused {len(tally.faults):5} faults  "
        f"{tally.slowest_s:6.2f} s  {tally.most_bytes / 1e6:6.0f} MB",
        flush=True,
    )
    seen = set()
    for fault in tally.faults:
        key = (fault["ending"], fault["detail"][:60])
        if key not in seen and len(seen) < 12:
            print(f"    {fault['number']}: {fault['ending']}: {fault['detail'][:300]}")
        seen.add(key)


def main() -> int:
    """The command; exit code 1 where there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100, help="for each reader (default 100)")
    parser.add_argument("--first", type=int, default=0, help="the number of the first input (default 0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", default="", help="names, with commas between (default: all)")
    parser.add_argument("--show", default="", metavar="READER:NUMBER", help="write this input to a file, and run it")
    parser.add_argument("--file", default="", metavar="READER:FILE", help="run this file")
    options = parser.parse_args()
    readers = all_readers()
    with tempfile.TemporaryDirectory() as scratch:
        if options.show or options.file:
            name, _, which = (options.show or options.file).partition(":")
            bench = Bench(readers[name], Path(scratch) / name)
            data = (
                Path(which).read_bytes()
                if options.file
                else make_input(bench.reader, bench.seeds, options.seed, int(which))
            )
            if options.show:
                Path(f"{name}-{which}.bin").write_bytes(data)
            print(*bench.run(data))
            bench.put(data)
            bench.reader.read(bench.path)
            return 0
        names = [one for one in options.readers.split(",") if one] or list(readers)
        tallies = fuzz(names, options.inputs, options.seed, Path(scratch), options.first, _print)
    faults = sum(len(one.faults) for one in tallies)
    print(json.dumps({"readers": len(tallies), "inputs": sum(one.inputs for one in tallies), "faults": faults}))
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
