"""What `tightfit train` does: fine-tune inside a byte budget with TRL's `SFTTrainer`, and keep the evidence.

| module | what it does |
|---|---|
| `options`, `recipe`, `settings` | what may be asked: options, a configuration file |
| `asked` | what this run does, after the record of an earlier run |
| `run` | the run itself: model, data, trainer, plan |
| `record` | what is known of it, and its folder |
| `checkpoints` | which checkpoints are whole |
| `progress` | what is seen while it goes on |
| `summary` | what came of it |
| `tokenizer` | a tokenizer that needs no files |

Invariant: `record.json` is always whole, and a run that was killed goes on bit for bit.
Refused: options that no run can have (`InvalidInput`).
"""

from __future__ import annotations

from tightfit.train.checkpoints import last_checkpoint
from tightfit.train.options import RunResult, TrainOptions
from tightfit.train.run import train
from tightfit.train.summary import summary, to_report
from tightfit.train.tokenizer import byte_tokenizer

__all__ = ["RunResult", "TrainOptions", "byte_tokenizer", "last_checkpoint", "summary", "to_report", "train"]
