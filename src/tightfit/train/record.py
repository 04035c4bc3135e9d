"""What a run knows, and its folder: `record.json`, `plan.json`, `losses.jsonl`.

Invariant: `record.json` is always whole, and says whether the run was completed, interrupted or failed.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import Progress, TaskID

from tightfit import accelerator
from tightfit.core import (
    Account,
    Backing,
    Check,
    Interrupts,
    InvalidInput,
    MicroBatches,
    Plan,
    Proof,
    from_json,
    parse_bytes,
    parse_host_budget,
    require_part,
    to_json,
    write_text,
)
from tightfit.fitting.planning import what_is_given
from tightfit.integrations.own_step import running_trainer
from tightfit.integrations.recovery import Recovery, Retry
from tightfit.integrations.transformers import (
    TightfitCallback,
)
from tightfit.plan.account import account, host_bytes
from tightfit.report import study
from tightfit.step.environment import environment
from tightfit.train.asked import Asked
from tightfit.train.checkpoints import read_lines
from tightfit.train.options import END_STEPS, RunResult
from tightfit.train.progress import Figures, Losses, figures_of, progress_bar

RECORD_VERSION = 1


class RunRecord:
    """What is known of one run so far, and its folder once there is something to write.

    One thing because its fields are the keys of `record.json`.
    """

    def __init__(self, asked: Asked, folder: Path, progress: Console | None) -> None:
        self.asked, self.folder, self.progress = asked, folder, progress
        self.options = asked.resolved()
        self.device = asked.recipe().args.device
        self.started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.data: dict[str, Any] = {}
        self.origin = ""
        self.parameters = self.trainable = 0
        self.total_steps = self.options.steps or 0
        self.callback: TightfitCallback | None = None
        self.plan: Plan | None = None
        self.proof: Proof | None = None
        self.steps: list[dict[str, Any]] = []  # the lines of losses.jsonl
        self.compared: list[float] | None = None  # None: not yet
        self.unplanned_peak_bytes: int | None = None
        self.budget: str | int | Plan = self._budget()
        self.budget_bytes: int | None = None
        self.micro_batches: MicroBatches | None = None
        self.host_bytes: dict[str, int] = {}  # that the plan has wait in host memory, by lever
        self.account: Account | None = None  # of the plan
        self.reserved_bytes: int | None = None  # by the caching allocator, at most; None: the device has none
        self.taken = {backing.value: 0 for backing in Backing}  # by what waits off the device, at most
        self.retries: list[Retry] = []
        self.retries_before = 0  # of a process that this one goes on for: not counted against what is allowed
        self.resumed_at: list[int] = []
        self.notes: list[str] = []  # what was switched off, planned, proven, in one line each
        self.status = "running"
        self.error: str | None = None
        self.opened = False
        self.interrupts = Interrupts()
        self.tokenizer: Any = None
        self.datasets: tuple[Any, Any, bool] = (None, None, False)

    def say(self, what: str) -> None:
        if self.progress is not None:
            self.progress.print(f"[dim]{what} ...[/dim]", highlight=False)

    def tell(self, line: str) -> None:
        if self.progress is not None:
            self.progress.print(line, highlight=False, markup=False, soft_wrap=True)

    def take_up(self, record: Mapping[str, Any]) -> None:
        """What the run knew when it wrote `record`."""
        observed = record["observed"]
        self.started, self.data = record["started"], dict(record["data"])
        self.origin = record["model"]["origin"]
        self.parameters, self.trainable = record["model"]["parameters"], record["model"]["trainable_parameters"]
        planned = (self.folder / "plan.json").is_file()  # so the comparison was done, if there was to be one
        self.compared = list(observed["compared_losses"]) if planned else None
        self.unplanned_peak_bytes = observed["unplanned_peak_bytes"]
        self.retries = [Retry(**retry) for retry in observed.get("retries", ())]
        self.retries_before = len(self.retries)
        self.resumed_at = list(observed.get("resumed_at", ()))
        self.notes = list(observed.get("notes", ()))
        self.host_bytes = dict(observed.get("host_bytes", {}))
        if observed.get("account") is not None:
            self.account = from_json(Account, observed["account"], "the run's record")
        self.reserved_bytes = observed.get("reserved_bytes")
        self.taken |= observed.get("host_taken_bytes", {})
        if observed.get("micro_batches") is not None:
            self.micro_batches = from_json(MicroBatches, observed["micro_batches"], "the run's record")
        if observed["checks"]:
            checks = tuple(Check(**check) for check in observed["checks"])
            self.proof = Proof(checks=checks, environment=record["environment"])
        if planned:
            self.plan = Plan.load(self.folder / "plan.json")
            if self.asked.options.budget == record["given"]["options"].get("budget"):
                self.budget = self.plan.budget_bytes if self.options.plan is None else self.plan
                self.budget_bytes = record["constraint"]["budget_bytes"]
        self.steps = read_lines(self.folder / "losses.jsonl")
        self.opened = True
        if record["status"] == "completed":
            self.status = "completed"
        elif record["environment"] != environment():
            self.say(
                "the versions or the machine are not those that the run began with: losses may differ from there on"
            )

    def note(self, line: str) -> None:
        """Say `line` and write it into the record, once."""
        if line not in self.notes:
            self.notes.append(line)
            self.tell(line)

    def _budget(self) -> str | int | Plan:
        """A percentage is of the GPU's memory where there is one, else of the unplanned step's peak. Or the plan that
        was given; a run that goes on has it in its folder."""
        if self.options.plan is not None:
            own = self.folder / "plan.json"
            return what_is_given(self.options.budget, own if own.is_file() else self.options.plan)
        budget = str(self.options.budget)
        if not accelerator.is_card(self.device) or "%" not in budget:
            return budget
        require_part(budget, "the GPU's memory")
        asked_bytes = parse_bytes(budget, whole_bytes=accelerator.memory_bytes(self.device))
        allowed_bytes = accelerator.limit_bytes(self.device)  # of the process, which may be less
        return asked_bytes if allowed_bytes is None else min(asked_bytes, allowed_bytes)

    def open(self, args: Any) -> None:
        """Make the folder and say that the run has begun, or goes on."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(f"cannot make the run folder {str(self.folder)!r}: {error.strerror or error}") from None
        self.opened = True
        args.output_dir = str(self.folder / "checkpoints")
        self.note_plan()

    def note_plan(self) -> None:
        """The plan in force is another than before."""
        assert self.callback is not None
        if self.callback.plan is not None and self.callback.plan is not self.plan:
            self.plan = self.callback.plan
            self.plan.save(self.folder / "plan.json")
            assert self.callback.trace is not None
            self.host_bytes = host_bytes(self.callback.trace, self.plan)
            self.account = account(self.callback.trace, self.plan, spilled=self.callback.spill is not None)
            if self.budget_bytes is None:
                self.budget_bytes = self.plan.budget_bytes
        self.micro_batches = self.micro_batches or self.callback.micro_batches
        self.proof = self.callback.proof or self.proof
        for line in self.callback.said:
            self.note(line)
        self._write_record()

    def measure(self) -> None:
        """A step is over: what the allocator and the pool have from the system now."""
        reserved_bytes = accelerator.reserved_peak_bytes(self.device)
        if reserved_bytes is not None:
            self.reserved_bytes = max(self.reserved_bytes or 0, reserved_bytes)
        assert self.callback is not None
        if self.callback.applied is not None:
            for backing, size_bytes in self.callback.applied.pool.taken.items():
                self.taken[backing.value] = max(self.taken[backing.value], size_bytes)

    def finish(self, status: str) -> None:
        self.status = status
        if status == "completed":
            self._write_record()
            return
        # what ended the run may be a full disk: it must not hide behind an error of its own record
        with suppress(OSError, InvalidInput):
            if not self.opened:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.opened = True
            for path in (self.folder / "checkpoints").glob("checkpoint-*"):
                if not (path / "trainer_state.json").is_file():
                    shutil.rmtree(path, ignore_errors=True)
            self._write_record()

    def _study(self) -> None:
        assert self.callback is not None
        if self.callback.trace is not None and self.callback.plan is not None:
            self.say("planning for other budgets too, for the report")
            found = study(self.callback.trace, self.callback.plan)
            write_text(self.folder / "study.json", json.dumps(to_json(found), separators=(",", ":")) + "\n")

    def _save(self, model: Any) -> None:
        half = self.folder / ".model"
        try:
            shutil.rmtree(half, ignore_errors=True)  # of a run that was killed here
            model.save_pretrained(half, safe_serialization=True)
            self.tokenizer.save_pretrained(half)
            shutil.rmtree(self.folder / "model", ignore_errors=True)
            os.replace(half, self.folder / "model")
        except BaseException:
            shutil.rmtree(half, ignore_errors=True)
            raise

    def result(self) -> RunResult:
        seconds = math.fsum(row["seconds"] for row in self.steps)
        tokens = sum(row["tokens"] for row in self.steps)
        return RunResult(
            folder=self.folder,
            status=self.status,
            options=self.options,
            plan=self.plan,
            proof=self.proof,
            losses=tuple(row["loss"] for row in self.steps),
            budget_bytes=self.budget_bytes,
            peak_bytes=max((row["peak_bytes"] for row in self.steps), default=None),
            unplanned_peak_bytes=self.unplanned_peak_bytes,
            compared_losses=tuple(self.compared or ()),
            retries=tuple(self.retries),
            seconds=seconds,
            tokens_per_second=tokens / seconds if seconds else 0.0,
            micro_batches=self.micro_batches,
        )

    def _write_record(self) -> None:
        write_text(self.folder / "record.json", json.dumps(self._record(), indent=2) + "\n")

    def _record(self) -> dict[str, Any]:
        result, options, asked = self.result(), self.options, self.asked.options
        plan = result.plan
        given = {k: v for k, v in to_json(asked).items() if k not in ("arguments", "out", "json", "resume")}
        return {
            "type": "Run",
            "schema_version": RECORD_VERSION,
            "status": self.status,
            "error": self.error,
            "started": self.started,
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "given": {"options": given, "arguments": list(asked.arguments), "config": self.asked.config},
            "options": {**to_json(options), "steps": options.steps or self.total_steps},
            "model": {
                "name": options.model,
                "origin": self.origin,
                "parameters": self.parameters,
                "trainable_parameters": self.trainable,
            },
            "data": self.data,
            "seed": options.seed,
            "device": str(self.device)
            if accelerator.is_host(self.device)
            else f"{self.device}: {accelerator.name_of(self.device)}",
            "environment": environment(),
            "constraint": {
                "budget": options.budget,
                "plan": options.plan,
                "budget_bytes": result.budget_bytes,
                "host_budget_bytes": parse_host_budget(options.host_budget),
                "batch": options.batch if options.global_batch is None else options.global_batch,
                "seq": options.seq,
                "depends_on": "peaks hold for batches of this size on this device with these versions; losses are "
                "equal bit for bit only with the same versions, device and number of threads",
            },
            "observed": {
                "steps": len(self.steps),
                "seconds": result.seconds,
                "tokens_per_second": result.tokens_per_second,
                "loss_start": result.loss_start,
                "loss_end": result.loss_end,
                "loss_end_steps": min(END_STEPS, len(self.steps)),
                "peak_bytes": result.peak_bytes,
                "predicted_peak_bytes": plan.peak_bytes if plan else None,
                "host_bytes": self.host_bytes,
                "account": to_json(self.account),
                "reserved_bytes": self.reserved_bytes,
                "host_taken_bytes": self.taken,
                "unplanned_peak_bytes": result.unplanned_peak_bytes,
                "predicted_unplanned_peak_bytes": plan.unplanned_peak_bytes if plan else None,
                "recompute_flops": plan.recompute_flops if plan else None,
                "forward_flops": plan.forward_flops if plan else None,
                "recompute_seconds": plan.recompute_seconds if plan else None,
                "replays": plan.replays if plan else None,
                "micro_batches": to_json(self.micro_batches),
                "compared_steps": len(self.compared or ()),
                "compared_losses": list(self.compared or ()),
                "losses_identical": result.losses_identical,
                "checks": to_json(result.proof.checks) if result.proof else [],
                "retries": to_json(self.retries),
                "resumed_at": self.resumed_at,
                "notes": self.notes,
            },
            "files": sorted(path.name for path in self.folder.iterdir() if not path.name.startswith(".")),
        }


class Watch(Losses):
    """Opens the run folder, writes each step's line to `losses.jsonl` and moves the progress bar."""

    def __init__(self, run: RunRecord, recovery: Recovery) -> None:
        super().__init__()
        self.run, self.recovery = run, recovery
        self.before = list(run.retries)
        self.file: IO[str] | None = None
        self.bar: Progress | None = None
        self.task = TaskID(0)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.run.retries = [*self.before, *self.recovery.survived]
        if self.bar is not None:
            self.bar.stop()
        if self.file is not None:
            self.file.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        run = self.run
        run.total_steps = state.max_steps
        run.open(args)
        if state.global_step >= state.max_steps:  # cut short after the last step; the Trainer would train one more
            running_trainer()._run_epoch = lambda **kwargs: None
        self.file = open(run.folder / "losses.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        if run.progress is not None:
            self.bar = progress_bar(run.progress)
            self.task = self.bar.add_task(
                "train", total=state.max_steps, completed=state.global_step, figures=Figures()
            )
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        run, callback = self.run, self.run.callback
        if run.interrupts.came:  # what it interrupted was a finaliser, which lets no error through
            raise KeyboardInterrupt
        assert self.file is not None and callback is not None and callback.plan is not None
        row = {**self.rows[-1], "peak_bytes": callback.peaks[-1]}
        run.steps.append(row)
        run.measure()
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if len(run.retries) < len(self.before) + len(self.recovery.survived):
            run.retries = [*self.before, *self.recovery.survived]
            run.note_plan()
        elif (
            callback.plan is not run.plan
            or callback.proof not in (None, run.proof)
            or set(callback.said) - set(run.notes)
        ):
            run.note_plan()
        if self.bar is not None:
            self.bar.update(
                self.task,
                completed=state.global_step,
                figures=figures_of(
                    row["loss"], row["tokens_per_second"], row["peak_bytes"], callback.plan.budget_bytes
                ),
            )
