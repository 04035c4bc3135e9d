"""`python -m tightfit`, which is how `torchrun -m tightfit train` starts each process."""

import sys

from tightfit.cli import main

if __name__ == "__main__":
    sys.exit(main())
