"""The benchmark: `make bench`, or `python -m benchmarks --help`. It takes a machine with nothing else to do."""
