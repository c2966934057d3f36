"""Benchmarks are collected only when asked for: `make bench`, naming this folder, or COMPANION_BENCH=1."""

import os
import sys

asked = os.environ.get("COMPANION_BENCH") == "1" or any("benchmarks" in argument for argument in sys.argv[1:])
collect_ignore_glob = [] if asked else ["test_*.py"]
