"""One training step of any model, before anything is recorded or planned.

| module | what it does |
|---|---|
| `run` | call the model, find the loss, count what lives throughout |
| `snapshot` | run a step and leave no mark |
| `modules`, `signature` | the module tree, its units, what a module is known by |
| `modes` | what torch keeps in force while a step runs, and how it comes back after an error |
| `patches` | change how a model runs, and put it back |
| `ops` | what an op is: its name, its FLOPs, whether it draws random numbers |
| `parallel`, `ranks` | steps that several processes share, and how they agree |
| `environment` | what a result depends on |

Invariant: what is changed here is given back exactly. Nothing here knows of traces or plans.
"""

import os

# The profiler, which counts bytes on the CPU, otherwise writes lines of its own to stderr. The setting is read when
# torch is loaded; where that has happened already, it comes too late.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
