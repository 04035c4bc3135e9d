"""Every trap of `tightfit doctor` on this machine's versions, the slow probes too: benchmarks/results/traps.json.

`python benchmarks/traps.py`; docs/traps.md is written from the result.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import drawn

from tightfit.core import to_json
from tightfit.doctor import TRAPS, probed
from tightfit.step.environment import environment, versions

RESULT = Path(__file__).parent / "results" / "traps.json"


def main() -> None:
    rows = []
    for trap in TRAPS:
        seen = {"quick": to_json(probed(trap))}
        if trap.deep is not None:
            seen["deep"] = to_json(probed(trap, deep=True))
        print(f"{trap.name}: {seen['quick']['verdict']}: {seen['quick']['why']}")
        installed = versions()
        rows.append(
            {
                "name": trap.name, "sentence": trap.sentence, "mend": trap.mend, **seen,
                "versions": {package: installed[package] for package in trap.packages if package in installed},
            }
        )  # fmt: skip
    document = {"environment": environment(), "date": datetime.now(UTC).date().isoformat(), "rows": rows}
    drawn.write(RESULT, document)


if __name__ == "__main__":
    main()
