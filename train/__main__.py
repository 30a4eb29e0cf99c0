"""``python -m svf_fast.train`` is the console script ``svf-fast``."""

import sys

from svf_fast.train.cli import main

if __name__ == "__main__":
    sys.exit(main())
