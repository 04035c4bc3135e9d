"""`python -m tightfit.cli`, the same as the command `tightfit`."""

from __future__ import annotations

import sys

from tightfit.cli.program import main

sys.exit(main())
