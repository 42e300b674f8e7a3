"""`python -m qjax.recommend benchmarks/results`: makes the tables of measured figures anew."""

import sys
from pathlib import Path

from qjax.recommend.distill import main

if __name__ == "__main__":
    main(Path(sys.argv[1]))
