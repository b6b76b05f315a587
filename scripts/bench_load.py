"""How fast a checkpoint is loaded on this machine: `cupaged bench load`, with the figures written to scripts/results."""

import sys
from pathlib import Path

from cupaged.cli import main

if __name__ == "__main__":
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    sys.exit(main(["bench", "load", "--output", str(results), *sys.argv[1:]]))
