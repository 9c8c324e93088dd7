"""The process that runs mutated inputs for the fuzzer: `[reader, seed, first, last]` in, a line of JSON an input out.

Processor time and the growth of resident memory are measured for each input, the latter by the kernel's own peak, which
is set back before it. Memory is limited, so that an absurd allocation fails here instead of taking the machine.
"""

import contextlib
import gc
import json
import os
import resource
import sys
import time
from pathlib import Path

from tests.fuzz.engine import Bench, all_readers, make_input

MOST_MORE_BYTES = 6 * 2**30


def _status(key: str) -> int:
    """A number of kilobytes in /proc/self/status, in bytes; 0 where there is none."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return 0


def _reset_peak() -> int:
    """Set the peak of resident memory back; what is resident now."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    return _status("VmRSS")


def main() -> None:
    """Run what is asked for until the input ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    folder, readers, benches = Path(sys.argv[1]), all_readers(), {}
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + MOST_MORE_BYTES,) * 2)
    for line in sys.stdin:
        name, seed, first, last = json.loads(line)
        if name not in benches:
            benches[name] = Bench(readers[name], folder / name)
        bench = benches[name]
        # compiles and imports what the reader needs, so that it is not measured
        unchanged = [bench.run(one) for one in bench.seeds]
        print(json.dumps({"ready": True, "unchanged": unchanged}), file=out)
        for number in range(first, last):
            data = make_input(bench.reader, bench.seeds, seed, number)
            before, began = _reset_peak(), time.process_time()
            ending, detail = bench.run(data)
            row = {
                "number": number,
                "ending": ending,
                "detail": detail[:600],
                "cpu_s": time.process_time() - began,
                "bytes": max(0, _status("VmHWM") - before),
            }
            print(json.dumps(row), file=out)
            if number % 500 == 499:
                gc.collect()
        print('{"done": true}', file=out)


if __name__ == "__main__":
    main()
