"""What `tightfit train` does: fine-tune inside a byte budget with TRL's `SFTTrainer`, and keep the evidence.

The training is TRL's, the settings are TRL's dataclasses and YAML; `TightfitCallback` plans the step, proves it and
counts its peaks, `Recovery` survives running out of memory. Around them: data that is on every machine, a tokenizer
that needs no files, a short run without a budget from the same start to compare losses bit by bit, and a run folder
with `record.json`, `plan.json`, `losses.jsonl`, `checkpoints/` and `model/`.

Invariant: nothing is written before model, data, options and plan are known to be good (the gradients are proven on
the first batch, when the folder is there); `record.json` is always whole
and says whether the run was completed, interrupted or failed; whatever a run was killed by, `resume` goes on from its
last whole checkpoint with the losses that the uninterrupted run would have had, bit for bit.
Refused: a run folder that is not empty, a run that is to go on with other options, data too short for one batch,
options that no run can have (`InvalidInput`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import (
    DefaultFlowCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from trl import SFTTrainer, get_peft_config, get_quantization_config

from tightfit.accelerator import has_streams
from tightfit.core import (
    AUTO,
    InvalidInput,
    Plan,
    TightfitError,
    Unsupported,
    parse_levers,
    write_text,
)
from tightfit.integrations import conflicts, trl
from tightfit.integrations.bitsandbytes import no_repacking, quantise
from tightfit.integrations.peft import no_input_gradients
from tightfit.integrations.recovery import Recovery, Retry, TornStep, free_memory, lower
from tightfit.integrations.transformers import (
    PeakCallback,
    TightfitCallback,
    dtype_named,
    load_model,
    positions_of,
)
from tightfit.train.asked import as_asked
from tightfit.train.checkpoints import is_older, keeps_checkpoints, last_checkpoint
from tightfit.train.options import RunResult, TrainOptions, check_options
from tightfit.train.progress import Losses, PlainLoss, Stop, one_line, quiet_libraries
from tightfit.train.recipe import Recipe, load_data
from tightfit.train.record import RunRecord, Watch
from tightfit.train.tokenizer import tokenizer_for


def train(options: TrainOptions, progress: Console | None = None) -> RunResult:
    """Train, write the run folder, return what happened. Ctrl-C returns a result with `status="interrupted"`.

    Raises `InvalidInput` (nothing written), `BudgetInfeasible` (nothing written), and whatever the training raises
    after a record that says so.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise Unsupported(
            f"tightfit train is one process, and this is one of {os.environ['WORLD_SIZE']}: train with Trainer or "
            "SFTTrainer and TightfitCallback under torchrun (docs/how_to/several_gpus.md)"
        )
    check_options(options)
    with quiet_libraries():
        asked, folder, record = as_asked(options)
        run = Run(asked, folder, progress)
        if record is not None:
            run.take_up(record)
            if run.status == "completed":
                run.say(f"{folder} is completed, there is nothing to resume")
                return run.result()
        elif options.resume:
            run.say(f"there is no run in {folder} yet: it begins")
        with ExitStack() as stack:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="tightfit-"))
            try:
                with run.interrupts:
                    if asked.recipe().fit.base_config is not None:
                        run.make_base()
                    run.prepare()
                    run.compare(scratch)
                    run.train(scratch)
            except KeyboardInterrupt:
                run.finish("interrupted")
            except TightfitError as error:
                if run.opened:
                    run.error = str(error)
                    run.finish("failed")
                raise
            except BaseException as error:
                run.error = f"{type(error).__name__}: {error}"
                run.finish("failed")
                raise
    return run.result()


class Run(RunRecord):
    """One run: its model, data and trainer, and the attempts to train within the budget.

    One thing because an attempt after running out of memory goes on with what the last one made.
    """

    def make_base(self) -> None:
        """Run the config that makes the model, or go on with it, or find that it is done."""
        base = str(self.asked.recipe().fit.base_config)
        config = self.asked.options.config
        path = Path(base).expanduser()
        if not path.is_absolute() and config is not None:
            path = Path(config).expanduser().absolute().parent / path
        folder = self.folder / "base"
        self.say(f"the base model: {base}")
        known = (folder / "record.json").is_file()
        options = TrainOptions(config=None if known else str(path), out=str(folder), resume=True)
        made = train(options, self.progress)
        if made.status == "interrupted":
            raise KeyboardInterrupt
        self.asked = dataclasses.replace(self.asked, model=str(folder / "model"))
        self.options = self.asked.resolved()
        if made.loss_start is not None and made.loss_end is not None:
            self.say(f"the base model is there: loss {made.loss_start:.3f} to {made.loss_end:.3f}")

    def prepare(self) -> None:
        """Load tokenizer and data."""
        self.say("loading the model and the data")
        recipe = self.asked.recipe()
        name = str(recipe.model.model_name_or_path)
        self.tokenizer = tokenizer_for(name, recipe.args.trust_remote_code)
        training, held_out, source, running = load_data(recipe)
        if self.data.get("sha256") not in (None, source.get("sha256")):
            raise InvalidInput(
                f"the data {source['path']!r} is not what the run in {str(self.folder)!r} began with (another sha256): "
                "put it back, or start another run"
            )
        self.data = source
        self.datasets = (training, held_out, running)

    def build(self) -> Any:
        """The model at its start; the same every time it is called."""
        recipe = self.asked.recipe()
        args, asked = recipe.args, recipe.model
        name = str(asked.model_name_or_path)
        init: dict[str, Any] = {
            "trust_remote_code": args.trust_remote_code,
            "attn_implementation": asked.attn_implementation,
            **(args.model_init_kwargs or {}),
        }
        if asked.model_revision != "main":
            init["revision"] = asked.model_revision
        dtype: Any = "auto" if asked.dtype == "auto" else dtype_named(asked.dtype or "float32")
        packed = get_quantization_config(asked)
        random_weights = not Path(name).expanduser().is_dir() and "/" not in name
        if packed is not None and not random_weights:
            init |= {"quantization_config": packed, "device_map": {"": self.device}}
        model: Any
        model, self.origin = load_model(
            name, dtype=dtype, device=self.device, seed=args.seed, **{k: v for k, v in init.items() if v is not None}
        )
        if packed is not None and random_weights:
            if not (packed.load_in_4bit and packed.bnb_4bit_quant_type == "nf4" and packed.bnb_4bit_use_double_quant):
                raise InvalidInput("random weights are quantised to nf4 with double quantisation only")
            quantise(model, model.dtype)
        if len(self.tokenizer) > int(model.config.get_text_config().vocab_size):
            raise InvalidInput(
                f"the tokenizer has {len(self.tokenizer)} tokens, but the model {name!r} knows "
                f"{model.config.get_text_config().vocab_size}: use the tokenizer it was made with"
            )
        return model

    def trainer(self, scratch: str, callbacks: list[TrainerCallback]) -> Any:
        """TRL's trainer on a new model, with its own checkpointing off."""
        recipe = self.asked.recipe()
        args = recipe.args
        args.output_dir = scratch
        args.disable_tqdm = True  # the bar here shows the peak too
        args.dataloader_pin_memory = args.dataloader_pin_memory and has_streams(self.device)
        self._switch_off_checkpointing(args)
        trl.refuse_offloading(args)  # before TRL's own context is made, which fails without a GPU
        training, held_out, running = self.datasets
        if running:  # not documents of their own: cut into windows of equal length
            args.packing, args.packing_strategy = True, "wrapped"
        with warnings.catch_warnings(), one_line("TRL refuses this model, these data or these settings"):
            warnings.simplefilter("ignore")
            # with a config, TRL's own loss; its fused output layer computes tiles of 4,096 tokens on the CPU, however
            # few there are: more than the logits of the short runs that need no config
            made = PlainLoss if self.asked.config is None else SFTTrainer
            trainer = made(
                model=self.build(),
                args=args,
                train_dataset=training,
                eval_dataset=held_out,
                processing_class=self.tokenizer,
                peft_config=get_peft_config(recipe.model),
            )
            optimizer, options = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
            if issubclass(optimizer, torch.optim.Optimizer) and optimizer.__module__.startswith("torch."):
                optimizer([torch.nn.Parameter(torch.zeros(1))], **options)  # raises for what it does not take
        if running:
            rows = trainer.train_dataset
            whole = [i for i, ids in enumerate(rows["input_ids"]) if len(ids) == args.max_length]
            trainer.train_dataset = rows.select(whole)
        conflicts.refuse(trainer, trainer.model)
        self._look_at(trainer)
        for unwanted in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(unwanted)
        # before the reporters, which read the logs in this order
        others = trainer.callback_handler.callbacks
        flow = [each for each in others if isinstance(each, DefaultFlowCallback)]
        trainer.callback_handler.callbacks = [*flow, *callbacks, *(each for each in others if each not in flow)]
        return trainer

    def _switch_off_checkpointing(self, args: Any) -> None:
        """A YAML serves unchanged: its own checkpointing gives way to the plan, in the steps to compare with too."""
        names = ("activation_checkpointing", "gradient_checkpointing")
        config, given = self.asked.config or {}, [a.lstrip("-").replace("-", "_") for a in self.asked.options.arguments]
        for name in names:
            if config.get(name) or any(a.split("=")[0] == name and not a.lower().endswith("=false") for a in given):
                self.note(f"{name} in these settings is off: the plan decides what is recomputed")
            setattr(args, name, False)

    def _look_at(self, trainer: Any) -> None:
        """Note what is trained on what. Raises `InvalidInput` where that cannot be."""
        model, args = trainer.model, trainer.args
        self.parameters = sum(p.numel() for p in model.parameters())
        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows = trainer.train_dataset
        if not hasattr(rows, "data") or "input_ids" not in rows.column_names:
            return
        import pyarrow.compute as pc

        lengths = pc.list_value_length(rows.with_format("arrow")[:]["input_ids"]) if len(rows) else None
        tokens = 0 if lengths is None else int(pc.sum(lengths).as_py())
        self.data |= {"windows": len(rows), "tokens": tokens}
        least = args.per_device_train_batch_size if args.dataloader_drop_last else 1
        if len(rows) < least:
            raise InvalidInput(
                f"the data has {len(rows)} examples of at most {args.max_length} tokens, one batch takes "
                f"{args.per_device_train_batch_size}: give more data, or a smaller --batch or --seq"
            )
        longest = int(pc.max(lengths).as_py())
        positions = positions_of(model.config)
        if positions is not None and longest > positions:
            raise InvalidInput(f"--seq {longest} was asked for, but the model has {positions} positions")

    def compare(self, scratch: str) -> None:
        """The first steps without a budget: their losses and their peak."""
        steps = self.options.compare_steps or 0
        if self.total_steps:
            steps = min(steps, self.total_steps)
        if self.compared is not None or not steps:
            self.compared = self.compared or []
            return
        self.compared = []
        peaks, losses = PeakCallback(), Losses()
        with ExitStack() as stack:
            stack.callback(peaks.close)
            trainer = self.trainer(scratch, [peaks, losses, Stop(steps)])
            stack.enter_context(no_repacking(trainer.model))
            self.say(f"{steps} steps without a budget, to compare with")
            try:
                trainer.train()
            except torch.OutOfMemoryError:
                # the usual reason to want a budget: there is nothing to compare with then
                losses.rows.clear()
                peaks.peaks.clear()
                self.say("they do not fit on this device, so there is nothing to compare with")
        self.compared = [row["loss"] for row in losses.rows]
        self.unplanned_peak_bytes = max(peaks.peaks, default=None)
        del trainer
        free_memory()

    def train(self, scratch: str) -> None:
        recipe = self.asked.recipe()
        while True:
            try:
                trainer = self._attempt(scratch, recipe)
                break
            except TornStep as error:
                self._after_torn(error, recipe.fit.oom_retries)
            free_memory()
        self.say("saving")
        self._save(trainer.model)
        if recipe.args.push_to_hub:
            trainer.args.output_dir = str(self.folder / "model")
            trainer.push_to_hub(dataset_name=recipe.script.dataset_name)
        if not keeps_checkpoints(self.asked):
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        self._study()
        self.finish("completed")

    def _attempt(self, scratch: str, recipe: Recipe) -> Any:
        """From the last whole checkpoint, or from the start, to the end."""
        retries = recipe.fit.oom_retries
        found = last_checkpoint(self.folder / "checkpoints") if self.opened else None
        step = 0 if found is None else found[1]
        if self.opened:
            self._rewind(found)
        # once chosen, the size stays: it depends on measured seconds, and a resumed run adds up as before
        cut = self.micro_batches.size if self.micro_batches is not None else None
        given = self.budget
        self.callback = TightfitCallback(
            None if isinstance(given, Plan) else given,
            plan=given if isinstance(given, Plan) else None,
            levers=parse_levers(recipe.fit.levers),
            host_budget=recipe.fit.host_budget,
            spill=recipe.fit.spill,
            micro_batch=(cut or AUTO) if self.options.batch == AUTO else None,
        )
        recovery = Recovery(self.callback, retries - len(self.retries) + self.retries_before, self.tell)
        with ExitStack() as stack:
            stack.callback(self.callback.close)
            stack.callback(recovery.close)
            watch = stack.enter_context(Watch(self, recovery))
            trainer = self.trainer(scratch, [self.callback, recovery, watch])
            self.callback.watch_loading(trainer)
            stack.enter_context(no_repacking(trainer.model))
            stack.enter_context(no_input_gradients(trainer.model))
            if step:
                self.resumed_at.append(step)
                self.say(f"going on after step {step}")
            self.say("tracing and planning the step, proving its gradients on the first batch")
            trainer.train(resume_from_checkpoint=None if found is None else str(found[0]))
        return trainer

    def _rewind(self, checkpoint: tuple[Path, int] | None) -> None:
        """Forget what came after the checkpoint: unfinished checkpoints, losses of steps that are done again."""
        step = 0 if checkpoint is None else checkpoint[1]
        for path in (self.folder / "checkpoints").glob("checkpoint-*"):
            if checkpoint is None or int(path.name.rpartition("-")[2]) > step or path != checkpoint[0]:
                if checkpoint is not None and is_older(path, step):
                    continue
                shutil.rmtree(path, ignore_errors=True)
        self.steps = [row for row in self.steps if row["step"] <= step]
        write_text(self.folder / "losses.jsonl", "".join(json.dumps(row) + "\n" for row in self.steps))

    def _after_torn(self, error: TornStep, retries: int) -> None:
        """The optimizer changed some parameters and not others: back to the last checkpoint, with a smaller plan."""
        callback = self.callback
        assert callback is not None and callback.plan is not None and callback.trace is not None
        if len(self.retries) - self.retries_before >= retries:
            raise error
        found = last_checkpoint(self.folder / "checkpoints")
        smaller = lower(callback.trace, callback.plan, callback.levers)
        self.retries.append(
            Retry(
                step=error.step,
                phase="optimizer",
                error=error.cause,
                budget_bytes_before=callback.plan.budget_bytes,
                budget_bytes_after=smaller.budget_bytes,
                peak_bytes_after=smaller.peak_bytes,
                went_back_to=0 if found is None else found[1],
            )
        )
        self.budget = smaller.budget_bytes
        self.say(f"out of memory in the optimizer's step {error.step}: back to step {self.retries[-1].went_back_to}")
        self._write_record()
