"""Measure, show, and keep the figures in the docs."""

import argparse
import signal
import sys
import time
from pathlib import Path

from benchmarks import report, scenarios, speed


def main() -> None:
    """Run the parts that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = ["speed", *scenarios.ALL]
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(names)}; default: all of them")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the part speed; default: 5")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works, not how fast it is")
    parser.add_argument("--out", type=Path, help="folder for the figures; default: docs, and none with --quick")
    parser.add_argument("--files", type=Path, help="folder for the broker's files; default: one in memory, if there is")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(names):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    folder = options.out or (None if options.quick else report.DOCS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an orderly end: broker and files go too
    files = options.files.resolve() if options.files else speed.folder_for_files()
    with speed.start_kafka(files) as kafka:
        for name in options.parts or names:
            began = time.monotonic()
            measured = report.machine(files)
            if name == "speed":
                part = speed.run(kafka, 1 if options.quick else options.rounds, quick=options.quick)
            else:
                part = scenarios.ALL[name](kafka, quick=options.quick)
            print(report.on_screen(part), flush=True)
            report.progress(f"{name}: {time.monotonic() - began:.0f} s")
            if folder:
                report.write(name, part | {"measured": measured}, folder)


if __name__ == "__main__":
    main()
