"""`python -m tightfit`, which is how `torchrun -m tightfit train` starts each process."""

import sys

from tightfit.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
