"""The callback in real trainings: whole runs with evaluation, generation, saving and resuming are those without it."""

from __future__ import annotations

import copy
import importlib.util
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, prepare_model_for_kbit_training
from tests.integrations.runs import Generates, model, tokens, told, trainer
from tests.names import NEW, PREFIX, is_on, switch_on
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

import tightfit
from tightfit.core import BudgetInfeasible, Unsupported, parse_levers
from tightfit.engine import applied_to
from tightfit.integrations import conflicts, own_step
from tightfit.integrations import trainer as subject
from tightfit.integrations.longest import Extent, longest_batch
from tightfit.integrations.transformers import PeakCallback, TightfitCallback
from tightfit.levers.state_in_host import host
from tightfit.levers.step_in_backward import hooks
from tightfit.step.run import static_bytes_by_category

slow = pytest.mark.slow
#: A TRL whose own loss goes through the logits in chunks, which a plan makes next to nothing of.
CHUNKED = importlib.util.find_spec("trl.kernels") is not None
KINDS = [
    ("trainer", "full", "85%"),
    pytest.param("dpo", "lora", "15%" if CHUNKED else "95%", marks=slow),
    pytest.param("sft", "4bit", "15%" if CHUNKED else "95%", marks=slow),
    pytest.param("trainer", "4bit", "85%", marks=slow),
    pytest.param("packing", "lora", "20%" if CHUNKED else "95%", marks=slow),
    pytest.param("trainer", "lora", "85%", marks=slow),
    pytest.param("sft", "full", "20%" if CHUNKED else "95%", marks=slow),
    pytest.param("dpo", "full", "20%" if CHUNKED else "95%", marks=slow),
]  # fmt: skip


def untouched(run: Any) -> bool:
    """Is nothing of the callback left on the model and on the Trainer?"""
    clean = not any("forward" in vars(m) and hasattr(m.forward, "__tightfit__") for m in run.model.modules())
    return clean and not {"get_batch_samples", "_run_epoch"} & vars(run).keys()


@pytest.mark.parametrize(("kind", "method", "budget"), KINDS)
def test_a_whole_run_is_the_one_without_the_callback(kind: str, method: str, budget: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 12,
    }  # fmt: skip
    samples, others = Generates(), Generates()
    checkpointing = {} if kind == "trainer" else {"gradient_checkpointing": False}
    plain = trainer(kind, tmp_path / "plain", [samples], method=method, **changes, **checkpointing)
    plain.train()
    callback = TightfitCallback(budget)
    ours = trainer(kind, tmp_path / "ours", [callback, others], method=method, **changes)
    ours.train()
    assert callback.plan is not None and callback.plan.replays > 0
    assert callback.proof is not None and callback.proof.passed, callback.proof.checks
    assert len(callback.peaks) == len([e for e in told(ours) if "loss" in e]) == 20
    assert max(callback.peaks) <= callback.plan.budget_bytes * 1.005
    assert told(ours) == told(plain)
    assert others.texts == samples.texts and len(samples.texts) == 2
    resumed = trainer(kind, tmp_path / "ours", [TightfitCallback(budget)], method=method, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-12"))
    again = trainer(kind, tmp_path / "plain", method=method, **changes, **checkpointing)
    again.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-12"))
    assert told(resumed) == told(again)
    if method != "4bit":  # bitsandbytes' CPU layers compute with other weights once they were evaluated
        losses = [[e["loss"] for e in told(r) if e["step"] > 12 and "loss" in e] for r in (plain, resumed)]
        assert len(losses[0]) == len(losses[1]) == 8
        if kind != "dpo" or NEW:  # under transformers 5.17 DPO with adapters does not resume where it was, plan or none
            assert losses[0] == losses[1]
    assert untouched(ours) and untouched(resumed)
    saved = sorted(p.relative_to(tmp_path / "plain") for p in (tmp_path / "plain").rglob("*config.json"))
    for file in [*saved, *(p.relative_to(tmp_path / "plain") for p in (tmp_path / "plain").rglob("*.safetensors"))]:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file


HOSTILE: dict[str, dict[str, Any]] = {
    "label smoothing": {"label_smoothing_factor": 0.1},
    "bf16": {"bf16": True},
    "unequal accumulated batches": {"gradient_accumulation_steps": 4, "max_steps": 6},
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
    "noisy embeddings": {"neftune_noise_alpha": 5.0},
    "evaluated before": {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 3},
    "average over tokens off": {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2},
}


SELDOM = ("grouped by length", "evaluated before", "average over tokens off")


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow) if name in SELDOM else name for name in HOSTILE])
def test_arguments_that_people_use(name: str, tmp_path: Path) -> None:
    changes = {"max_steps": 5, **HOSTILE[name]}
    plain = trainer("trainer", tmp_path, **changes)
    plain.train()
    callback = TightfitCallback("88%")
    ours = trainer("trainer", tmp_path, [callback], **changes)
    ours.train()
    assert told(ours) == told(plain)
    assert callback.plan is not None and callback.plan.replays > 0
    assert max(callback.peaks) <= callback.plan.budget_bytes * 1.005


class Switches(TrainerCallback):
    """Trains one of two adapters at a time, each for two steps."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].set_adapter(("default", "other")[state.global_step // 2 % 2])


class Freezes(TrainerCallback):
    """Trains the last layer alone, every third and fourth step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in kwargs["model"].named_parameters():
            parameter.requires_grad_(state.global_step // 2 % 2 == 0 or ".layers.2." in name)


def with_another_adapter() -> Any:
    subject = model("lora")
    subject.add_adapter("other", LoraConfig(r=16, target_modules=["q_proj", "o_proj", "down_proj"]))
    subject.base_model.set_adapter(["default", "other"])  # so the optimizer has both
    return subject


@pytest.mark.parametrize(
    ("make", "other", "budget"),
    [pytest.param(with_another_adapter, Switches, "72%", marks=pytest.mark.slow), (model, Freezes, "80%")],
)
def test_each_set_of_trained_parameters_has_its_plan(make: Any, other: Any, budget: str, tmp_path: Path) -> None:
    plain = trainer("trainer", tmp_path, [other()], subject=make(), max_steps=8)
    plain.train()
    callback = TightfitCallback(budget)
    ours = trainer("trainer", tmp_path, [other(), callback], subject=make(), max_steps=8)
    replayed: list[tuple[int, int]] = []

    class Counts(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert callback.applied is not None
            found = callback.applied.stats()
            replayed.append((found.replays, found.fallbacks))

    ours.add_callback(Counts())
    ours.train()
    assert told(ours) == told(plain) and untouched(ours)
    assert all(map(torch.equal, ours.model.parameters(), plain.model.parameters()))
    anew = [line for line in callback.said if "trains other parameters" in line]
    assert callback.plans == 1 + len(anew) == (3 if other is Switches else 2)  # the first is for both adapters
    assert replayed[-1][0] > 0 and not any(fallbacks for _, fallbacks in replayed)
    assert callback.plan is not None and max(callback.peaks) <= callback.plan.budget_bytes * 1.005


def summed(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    logits, wanted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, wanted, reduction="sum") / num_items_in_batch


def test_trls_own_loss_is_made_smaller(tmp_path: Path) -> None:
    """Where there is no Triton its chunks own the peak, with several tensors of their size beside them."""
    subject = LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=4096)
    )
    runs, callback = [], TightfitCallback("50%")
    for callbacks in ([], [callback]):
        runs.append(trainer("sft", tmp_path, callbacks, subject=copy.deepcopy(subject), max_steps=3))
        runs[-1].train()
    plain, ours = runs
    assert callback.plan is not None and callback.plan.exact and callback.plan.in_place_loss
    assert max(callback.peaks) <= callback.plan.budget_bytes
    assert told(ours) == told(plain)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], value), name


@slow
def test_a_trainer_of_a_model_whose_frozen_weights_wait(tmp_path: Path) -> None:
    """`fit` came first, and the Trainer sends the model to its device."""
    kept = model("lora")
    runs = []
    ids = torch.randint(0, 250, (4, 16))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    for streams in (False, True):
        one = copy.deepcopy(kept)
        applied = tightfit.fit(one, batch, "70%", beside="stream_weights", longer="allow") if streams else None
        runs.append(trainer("trainer", tmp_path, subject=one, max_steps=4))
        runs[-1].train()
        if applied is not None:
            assert applied.stats().levers["stream_weights"].copies > 0
            applied.remove()
    plain, ours = runs
    assert told(ours) == told(plain)
    assert all(map(torch.equal, ours.model.state_dict().values(), plain.model.state_dict().values()))


def test_a_loss_function_of_the_users(tmp_path: Path) -> None:
    more = {"compute_loss_func": summed}
    plain = trainer("trainer", tmp_path, more=more, max_steps=4, gradient_accumulation_steps=2)
    plain.train()
    ours = trainer(
        "trainer", tmp_path, [TightfitCallback("88%")], more=more, max_steps=4, gradient_accumulation_steps=2
    )
    ours.train()
    assert told(ours) == told(plain)


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Short examples for a long time, then long ones."""

    def __init__(self, late: int = 300) -> None:
        self.late = late

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(400):
            yield {"input_ids": [5 + index % 90] * (6 if index < self.late else 50)}


def test_a_longer_batch_of_a_stream_is_planned_for_when_it_comes(tmp_path: Path) -> None:
    changes = {"max_steps": 16, "per_device_train_batch_size": 20, "accelerator_config": {"dispatch_batches": False}}
    plain = trainer("trainer", tmp_path, [counted := PeakCallback()], data=Stream(), **changes)
    plain.train()
    budget_bytes = max(counted.peaks) * 9 // 10
    callback = TightfitCallback(budget_bytes)
    ours = trainer("trainer", tmp_path, [callback], data=Stream(), **changes)
    ours.train()
    assert told(ours) == told(plain)
    assert callback.plans == 2 and any("longer batch" in line for line in callback.said)
    assert any("a stream" in line for line in callback.said)
    assert max(callback.peaks) <= budget_bytes * 1.005 < max(counted.peaks)
    assert max(callback.peaks) == pytest.approx(callback.plan.peak_bytes, rel=0.005)  # type: ignore[union-attr]


@slow
def test_a_longer_batch_that_nothing_holds_does_not_end_the_training(tmp_path: Path) -> None:
    changes = {"max_steps": 16, "per_device_train_batch_size": 20, "accelerator_config": {"dispatch_batches": False}}
    callback = TightfitCallback("90%")
    ours = trainer("trainer", tmp_path, [callback], data=Stream(), **changes)
    ours.train()
    plain = trainer("trainer", tmp_path, data=Stream(), **changes)
    plain.train()
    assert told(ours) == told(plain)
    assert any("leanest plan" in line for line in callback.said)


def test_a_callback_serves_two_trainings(tmp_path: Path) -> None:
    callback = TightfitCallback("88%")
    plain, ours = trainer("trainer", tmp_path, max_steps=3), trainer("trainer", tmp_path, [callback], max_steps=3)
    for seed in range(2):
        torch.manual_seed(seed)
        plain.train()
        torch.manual_seed(seed)
        ours.train()
        assert told(ours) == told(plain)
        assert len(callback.peaks) == 3 and untouched(ours)


@pytest.mark.slow
def test_a_checkpoints_state_is_loaded_into_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[int] = []

    def loaded_on_host(optimizer: Any) -> Any:
        loaded.append(len(optimizer.state))
        return host.loaded_on_host(optimizer)

    def losses(run: Any) -> list[float]:
        return [entry["loss"] for entry in told(run) if "loss" in entry]

    monkeypatch.setattr(subject, "loaded_on_host", loaded_on_host)
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    plain = trainer("trainer", tmp_path / "plain", **settings)
    plain.train()
    callback = TightfitCallback("70%", beside="state_in_host")
    ours = trainer("trainer", tmp_path / "ours", [callback], **settings)
    ours.train()
    assert told(ours) == told(plain)
    resumed = trainer("trainer", tmp_path / "ours", [callback], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))
    assert losses(resumed) == losses(plain)
    assert callback.plan and "state_in_host" in callback.plan.settings and len(loaded) == 1 and untouched(resumed)
    resumed.remove_callback(callback)
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))
    assert losses(resumed) == losses(plain) and len(loaded) == 1


class Fails(TrainerCallback):
    def __init__(self, event: str, error: type[BaseException]) -> None:
        setattr(self, event, self.fail)
        self.error = error

    def fail(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise self.error("in the middle")


@pytest.mark.parametrize(
    ("event", "error"),
    [("on_step_begin", RuntimeError), ("on_pre_optimizer_step", KeyboardInterrupt), ("on_log", KeyboardInterrupt)],
)
def test_an_exception_in_the_middle_leaves_nothing(event: str, error: type[BaseException], tmp_path: Path) -> None:
    callback = TightfitCallback("95%")
    ours = trainer("sft", tmp_path, [callback, Fails(event, error)], max_steps=4)
    ours.model.config.use_cache = True  # which TRL's SFTTrainer had switched off
    with pytest.raises(error, match="in the middle"):
        ours.train()
    assert untouched(ours) and is_on(ours.model)
    assert ours.model.config.use_cache is True
    assert callback.applied is None and callback.plan is not None


@pytest.mark.slow
def test_a_budget_below_a_single_example_is_still_said(tmp_path: Path) -> None:
    run = trainer(
        "trainer", tmp_path, [TightfitCallback("1MiB")], max_steps=2, per_device_train_batch_size=2,
        auto_find_batch_size=True,
    )  # fmt: skip
    with pytest.raises(BudgetInfeasible, match="cannot hold this step"):
        run.train()


def test_a_callback_that_comes_late(tmp_path: Path) -> None:
    late = TrainerCallback()
    run = trainer("trainer", tmp_path, [late], max_steps=3)
    late.on_step_end = lambda *_, **__: run.add_callback(TightfitCallback("90%"))  # type: ignore[method-assign]
    with pytest.raises(Unsupported, match="in the middle"):
        run.train()


@pytest.mark.slow
def test_a_batch_size_is_found_for_the_budget(tmp_path: Path) -> None:
    changes = {"max_steps": 3, "per_device_train_batch_size": 16, "auto_find_batch_size": True}
    probe = trainer("trainer", tmp_path, [counted := PeakCallback()], max_steps=3, per_device_train_batch_size=2)
    probe.train()
    callback = TightfitCallback(max(counted.peaks))  # less than any plan of the whole batch takes
    ours = trainer("trainer", tmp_path, [callback], **changes)
    ours.train()
    assert ours._train_batch_size < 16
    assert max(callback.peaks) <= max(counted.peaks)
    assert untouched(ours)


# ------------------------------------------------------------------------------------------- conflicts


@pytest.mark.parametrize("part", [False, True])
def test_a_model_that_is_compiled_already_is_refused(part: bool, tmp_path: Path) -> None:
    run = trainer("trainer", tmp_path, [TightfitCallback("90%")], max_steps=1)
    whole: Any = run.model
    (whole.model.layers[0] if part else whole).compile(backend="eager")
    with pytest.raises(Unsupported, match=f"^{'model.layers.0' if part else 'the model'} is compiled"):
        run.train()
    assert untouched(run)


def test_a_trainer_that_generates_in_its_step_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer("trainer", tmp_path, [TightfitCallback("90%")], max_steps=1)
    kind = type(run)
    monkeypatch.setattr(kind, "generate_on_policy_outputs", lambda *_: None, raising=False)  # as in TRL's GKDTrainer
    run.args.lmbda = 0.5
    with pytest.raises(Unsupported, match="generates text inside its training step"):
        run.train()
    run.args.lmbda = 0.0
    run.train()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"gradient_checkpointing": True}, ["gradient_checkpointing"]),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
            ["activation_checkpointing=True", "every_n_layers"],
        ),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}},
            ["activation_checkpointing=True", "offload"],
        ),
        ({"torch_compile": True}, ["torch_compile=True"]),
        ({"use_liger_kernel": True}, ["use_liger_kernel=True"]),
    ],
)
def test_what_was_asked_for_is_refused_by_both_names(
    changes: dict[str, Any], named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not {"activation_checkpointing"} & set(TrainingArguments.__dataclass_fields__):
        pytest.skip("this transformers has the old names only")
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda *_: None)
    run = trainer("trainer", tmp_path, [TightfitCallback("90%")], **changes)
    with pytest.raises(Unsupported) as refused:
        run.train()
    for name in [*named, "TightfitCallback(budget=...)"]:
        assert name in str(refused.value)
    assert untouched(run)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "use_reentrant"),
        ({"gradient_checkpointing_kwargs": {"selective": True}}, "selective"),
        ({"gradient_checkpointing": False}, "activation_offloading=True"),
    ],
)
def test_what_was_asked_of_trl_is_refused(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    run = trainer("sft", tmp_path, [TightfitCallback("90%")], **changes)
    run.args.activation_offloading = "activation" in named  # TRL itself cannot offload without a GPU
    with pytest.raises(Unsupported, match=named):
        run.train()


# the second is longer, but shorter than the longest completion
PROMPTS = ["say ", "the quick brown fox jumps "]


def generating(folder: Path, callbacks: list[Any], kind: str = "GRPO", method: str = "full", **changes: Any) -> Any:
    import trl
    from datasets import Dataset
    from tests.integrations.runs import tokenizer

    options: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "max_steps": 2, "bf16": False,
        "num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 32, "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-3, "shuffle_dataset": False,
        "generation_kwargs": {"max_new_tokens": 10},  # fewer than there may be
    }  # fmt: skip
    policy, seen = model(method), []

    def rewards(completions: list[str], **_: Any) -> list[float]:
        torch.zeros(1 << 24)  # 64 MiB that are not the step's
        seen.append((policy.config.use_cache, applied_to(policy) is None))
        return [len(set(each)) / 10 for each in completions]

    torch.manual_seed(0)
    run = getattr(trl, f"{kind}Trainer")(
        model=policy, reward_funcs=rewards,
        args=getattr(trl, f"{kind}Config")(**{**options, **changes}), callbacks=callbacks,
        train_dataset=Dataset.from_list([{"prompt": each} for each in PROMPTS * 8]), processing_class=tokenizer(),
    )  # fmt: skip
    run.seen = seen
    return run


TOLD = ("loss", "reward", "reward_std", "grad_norm", "entropy", "kl", "completions/mean_length")


@pytest.mark.parametrize(
    ("kind", "method", "changes"),
    [
        ("GRPO", "full", {}),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [
            ("GRPO", "full", {"gradient_accumulation_steps": 2}),
            ("GRPO", "lora", {"beta": 0.1}),
            ("GRPO", "full", {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 6}),
            ("GRPO", "full", {"loss_type": "dapo", "temperature": 0.7, "scale_rewards": "none"}),
            ("RLOO", "full", {"beta": 0.0}),
        ]),
    ],
)  # fmt: skip
def test_generated_batches_are_planned_for_as_they_come(
    kind: str, method: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    def outcome(callbacks: list[Any]) -> tuple[Any, list[Any], dict[str, torch.Tensor]]:
        run = generating(tmp_path, callbacks, kind, method, **changes)
        run.train()
        told = [{k: v for k, v in each.items() if k in TOLD} for each in run.state.log_history if "loss" in each]
        return run, told, {name: each.detach().clone() for name, each in run.model.named_parameters()}

    plain, expected, weights = outcome([])
    callback = TightfitCallback("25%" if CHUNKED else "97%")
    run, told, found = outcome([callback])
    assert expected and "reward" in expected[0] and told == expected
    assert all(torch.equal(weights[name], found[name]) for name in weights)
    assert callback.proof is not None and callback.proof.passed and callback.plan is not None
    assert callback.plan.slowdown > 1
    assert callback.plans == 2 or changes  # a longer prompt comes, where it is not in the first batch
    assert callback.batch["completion_ids"].shape[1] == 32  # what the settings allow
    assert callback.peaks and max(callback.peaks) <= callback.plan.budget_bytes * 1.005
    assert not [line for line in callback.said if "something beside the planned step" in line]
    assert run.seen == plain.seen
    assert is_on(run.model) and "_prepare_inputs" not in vars(run)


def test_what_was_not_tried_with_generated_batches_is_refused(tmp_path: Path) -> None:
    run = generating(tmp_path, [TightfitCallback("90%")])
    run.use_vllm = True
    with pytest.raises(Unsupported, match="use_vllm=True"):
        run.train()
    with pytest.raises(Unsupported, match=r"GRPOTrainer generates its batches while it trains.*leave micro_batch out"):
        generating(tmp_path, [TightfitCallback("90%", micro_batch=1)]).train()


@pytest.mark.parametrize("kind", ["sft", pytest.param("dpo", marks=slow)])
def test_trls_default_makes_way_and_comes_back(kind: str, tmp_path: Path) -> None:
    callback = TightfitCallback("95%")
    run = trainer(kind, tmp_path, [callback], method="lora", max_steps=2)
    embeddings = run.model.get_input_embeddings()
    hooks = dict(embeddings._forward_hooks)
    seen: list[tuple[bool, int]] = []
    watch = TrainerCallback()
    watch.on_step_end = lambda *_, **__: seen.append(  # type: ignore[method-assign]
        (is_on(run.model), len(embeddings._forward_hooks))
    )
    run.add_callback(watch)
    run.train()
    assert [line for line in callback.said if f"default {PREFIX}_checkpointing=True" in line]
    assert seen == [(False, 0)] * 2
    assert is_on(run.model) and embeddings._forward_hooks.keys() >= hooks.keys() and hooks


def test_a_model_prepared_for_4_bit_training(tmp_path: Path) -> None:
    def prepared() -> Any:
        from tightfit.integrations.bitsandbytes import quantise
        from tightfit.integrations.peft import add_lora

        base = model()
        return add_lora(prepare_model_for_kbit_training(quantise(base, torch.float32)), rank=4)

    plain = trainer("trainer", tmp_path, subject=prepared(), max_steps=4)
    plain.train()
    callback = TightfitCallback("88%")
    ours = trainer("trainer", tmp_path, [callback], subject=prepared(), max_steps=4)
    ours.train()
    assert [e["loss"] for e in told(ours) if "loss" in e] == [e["loss"] for e in told(plain) if "loss" in e]
    assert [e["grad_norm"] for e in told(ours) if "loss" in e] == [e["grad_norm"] for e in told(plain) if "loss" in e]
    assert any("was on in the model" in line and "hook" in line for line in callback.said)
    assert is_on(ours.model)


def test_the_hooks_of_trained_embeddings_stay() -> None:
    whole = model()
    switch_on(whole)
    whole.enable_input_require_grads()
    count = len(whole.get_input_embeddings()._forward_hooks)
    suspended = conflicts.Suspended(types.SimpleNamespace(args=types.SimpleNamespace()), whole)
    assert len(whole.get_input_embeddings()._forward_hooks) == count > 0
    suspended.restore()
    assert is_on(whole)


# ------------------------------------------------------------------------------------- what is reported


def test_one_line_above_the_progress_bar(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.logging.get_verbosity", lambda: 30)
    callback = TightfitCallback("88%")
    run = trainer("trainer", tmp_path, [callback], max_steps=3, disable_tqdm=False)
    run.train()
    err = capfd.readouterr().err
    said = [line for line in err.split("\n") if "tightfit:" in line]
    assert len(said) == len(callback.said) == 1
    shown = said[0].split("\r")[-1].removeprefix("\x1b[A")
    assert shown.startswith("tightfit: budget "), repr(said[0])
    for part in ("predicted peak", "measured", "gradients of the first batch: 30 identical"):
        assert part in shown
    assert "%|" in err, "there was no bar to write above"


def test_other_processes_say_nothing(tmp_path: Path, capfd: Any) -> None:
    callback = TightfitCallback("88%")
    callback._say(types.SimpleNamespace(is_world_process_zero=False), "a line")
    assert "a line" not in capfd.readouterr().err and callback.said == ["a line"]


class Reports(TrainerCallback):
    """Sees what tensorboard, wandb and trackio see."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_reporters_see_peak_and_prediction(tmp_path: Path) -> None:
    callback, reporter = TightfitCallback("88%"), Reports()
    run = trainer("trainer", tmp_path, [reporter, callback], max_steps=4, logging_steps=2)
    run.train()
    logged = [entry for entry in reporter.logs if "loss" in entry]
    assert callback.plan is not None
    assert [e["tightfit/peak_bytes"] for e in logged] == [max(callback.peaks[:2]), max(callback.peaks[2:])]
    assert {e["tightfit/predicted_peak_bytes"] for e in logged} == {callback.plan.peak_bytes}
    assert {e["tightfit/budget_bytes"] for e in logged} == {callback.plan.budget_bytes}
    saved = [e for e in run.state.log_history if "loss" in e]
    assert (
        json.loads(json.dumps(saved)) == saved and saved[0]["tightfit/peak_bytes"] == logged[0]["tightfit/peak_bytes"]
    )


def test_the_figures_are_in_tensorboards_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    callback = TightfitCallback("88%")
    run = trainer("trainer", tmp_path, [callback], max_steps=4, logging_steps=2, report_to="tensorboard")
    run.train()
    found = reader.EventAccumulator(str(next((tmp_path / "events").rglob("*tfevents*"))))
    found.Reload()
    plan = callback.plan
    assert plan is not None and plan.recompute_seconds > 0
    expected = {
        "peak_bytes": [max(callback.peaks[:2]), max(callback.peaks[2:])], "budget_bytes": [plan.budget_bytes] * 2,
        "predicted_peak_bytes": [plan.peak_bytes] * 2, "unplanned_peak_bytes": [plan.unplanned_peak_bytes] * 2,
        "predicted_slowdown": [plan.slowdown] * 2, "exact": [1.0] * 2, "gradients_identical": [1.0] * 2,
        "recompute_share": [plan.recompute_seconds / plan.step_seconds] * 2,
    }  # fmt: skip
    tags = {tag for tag in found.Tags()["scalars"] if "tightfit/" in tag}
    assert {tag.partition("tightfit/")[2] for tag in tags} == set(expected)
    for tag in tags:
        events = found.Scalars(tag)
        assert [event.step for event in events] == [2, 4]
        assert [event.value for event in events] == pytest.approx(expected[tag.partition("tightfit/")[2]])


def test_the_highest_since_the_last_log_is_logged() -> None:
    counted, state, logs = PeakCallback(), types.SimpleNamespace(log_history=[]), [{"loss": 1.0} for _ in range(3)]
    for peaks, each in zip(([7, 9, 8], [5, 3], []), logs, strict=True):
        counted.peaks += peaks
        counted.on_log(None, state, None, logs=each)
    assert [each.get("tightfit/peak_bytes") for each in logs] == [9, 5, None]


def test_a_reference_models_weights_count(tmp_path: Path) -> None:
    callback = TightfitCallback("95%")
    run = trainer("dpo", tmp_path, [callback], max_steps=2)
    run.train()
    reference_bytes = sum(static_bytes_by_category(run.ref_model).values())
    assert callback.trace is not None and callback.trace.static_bytes["inputs"] >= reference_bytes * 0.99
    assert max(callback.peaks) <= callback.plan.budget_bytes * 1.005  # type: ignore[union-attr]


# -------------------------------------------------------------------------------- steps that do not fit


def test_a_step_that_does_not_fit_is_planned_on_fake_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced, checked = own_step.trace, subject.gradient_checks
    ways: list[str] = []

    def trace(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("fake"):
            ways.append("real trace")
            raise torch.OutOfMemoryError("no room")
        return traced(*args, **kwargs)

    def gradient_checks(*args: Any, **kwargs: Any) -> Any:
        if "reference" not in kwargs:
            ways.append("plain gradients")
            raise torch.OutOfMemoryError("no room")
        return checked(*args, **kwargs)

    monkeypatch.setattr(own_step, "trace", trace)
    monkeypatch.setattr(subject, "gradient_checks", gradient_checks)
    plain = trainer("trainer", tmp_path, max_steps=3)
    plain.train()
    callback = TightfitCallback("88%")
    ours = trainer("trainer", tmp_path, [callback], max_steps=3)
    ours.train()
    assert ways == ["real trace", "plain gradients"]
    assert told(ours) == told(plain) and callback.plan is not None and callback.plan.replays
    assert "torch's checkpointing" in callback.said[-1]
    assert max(callback.peaks) <= callback.plan.budget_bytes * 1.005


# ------------------------------------------------------------------------------------------ the overhead


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        return func(*args, **(kwargs or {}))


class Steady(TrainerCallback):
    """Ops and forwards between the end of one step and the end of the next."""

    def __init__(self) -> None:
        self.ops: list[int] = []
        self.forwards: list[int] = []
        self.count: Count | None = None
        self.calls = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].register_forward_pre_hook(lambda *_: setattr(self, "calls", self.calls + 1))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.count is not None:
            self.count.__exit__(None, None, None)
            self.ops.append(self.count.ops)
            self.forwards.append(self.calls)
        self.calls, self.count = 0, None
        if state.global_step < args.max_steps:
            self.count = Count()
            self.count.__enter__()


def test_in_steady_state_there_is_nothing_but_the_replays(tmp_path: Path) -> None:
    same = [{"input_ids": [7] * 24}] * 40
    found = {}
    for name, budget in (("none", None), ("loose", "100%"), ("tight", "80%")):
        steady, callback = Steady(), TightfitCallback(budget or "1B")
        callbacks = [steady] if budget is None else [steady, callback]
        run = trainer("trainer", tmp_path, callbacks, data=same, max_steps=5, gradient_accumulation_steps=2)
        run.train()
        found[name] = steady
    # the first of these intervals still counts the optimizer's new state
    assert found["loose"].ops[1:] == found["none"].ops[1:]
    assert found["tight"].ops[1] > found["none"].ops[1]
    for steady in found.values():
        assert steady.forwards == [2] * 4


# ---------------------------------------------------------------------------------------- longest batch


class Loader:
    def __init__(self, dataset: Any, collate_fn: Any) -> None:
        self.dataset, self.collate_fn = dataset, collate_fn


def test_the_longest_batch_is_padded_and_has_the_most() -> None:
    run = trainer("trainer", Path("unused"), data=tokens())
    loader = Loader(tokens(), run.data_collator)
    longest = max(len(row["input_ids"]) for row in tokens())
    batch, unseen = longest_batch(loader, 4)
    assert batch["input_ids"].shape == (4, longest) and not unseen
    assert not batch["attention_mask"].all(), "a padded batch costs its mask too"


def test_a_batch_without_padding_does_not_lose_its_longest() -> None:
    loader = Loader(
        [{"input_ids": [1] * n} for n in (9, 9, 9, 2)],
        lambda rows: {"input_ids": torch.tensor([[i for r in rows for i in r["input_ids"]]])},
    )
    batch, _ = longest_batch(loader, 3)
    assert batch["input_ids"].shape == (1, 27)


def test_examples_are_as_long_as_the_collator_makes_them() -> None:
    rows = [{"prompt": [1] * 2, "answer": [1] * 9}, {"prompt": [1] * 8, "answer": [1] * 8}]
    loader = Loader(rows, lambda rows: {"ids": torch.tensor([rows[0]["prompt"] + rows[0]["answer"]])})
    batch, _ = longest_batch(loader, 1)
    assert Extent.of(batch).length == 16


def test_a_data_set_that_looking_would_use_up(tmp_path: Path) -> None:
    class Once(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            return {"input_ids": [1]}

    with pytest.raises(Unsupported, match="batch="):
        longest_batch(Loader(Once(), lambda rows: rows), 2)


def test_a_budget_that_nothing_fits(tmp_path: Path) -> None:
    run = trainer("sft", tmp_path, [TightfitCallback("5%")], max_steps=2)
    with pytest.raises(BudgetInfeasible):
        run.train()
    assert untouched(run) and is_on(run.model)


def wide() -> Any:
    """Logits are most of its step, so that tiles are what takes the peak down."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=4096)
    )


@pytest.mark.parametrize(
    ("levers", "budget"), [("recompute,tile", "60%"), pytest.param("", "35%", marks=pytest.mark.slow)]
)
def test_a_plan_in_tiles_is_proven_with_a_tolerance(levers: str, budget: str, tmp_path: Path) -> None:
    """Asked for by name, and where nothing exact fits."""
    rows = [{"input_ids": list(range(7, 135))}] * 8
    options: dict[str, Any] = {"data": rows, "max_steps": 4, "save_strategy": "no"}
    plain = trainer("trainer", tmp_path, subject=wide(), **options)
    plain.train()
    callback = TightfitCallback(budget, levers=parse_levers(levers))
    ours = trainer("trainer", tmp_path, [callback], subject=wide(), **options)
    ours.train()
    assert callback.plan is not None and not callback.plan.exact
    assert callback.proof is not None and callback.proof.passed, callback.proof.checks
    assert "float64" in callback.proof["gradients"].expected
    assert max(callback.peaks) <= callback.plan.budget_bytes * 1.005
    logged = [entry for entry in ours.state.log_history if "loss" in entry]
    assert all(entry["tightfit/gradients_within_tolerance"] == 1.0 for entry in logged)
    assert not any("tightfit/gradients_identical" in entry for entry in logged)
    losses = [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logged] == pytest.approx(losses, rel=1e-4)


def test_what_the_plan_may_not_use_it_does_not_use(tmp_path: Path) -> None:
    data = [{"input_ids": list(range(7, 135))}] * 8
    callback = TightfitCallback("35%", levers=parse_levers("recompute,nest"))
    run = trainer("trainer", tmp_path, [callback], subject=wide(), data=data, max_steps=1)
    run.teacher = nn.Sequential(*(nn.Linear(5, 5) for _ in range(8)))  # held beside the batch, and no part of it
    with pytest.raises(BudgetInfeasible, match=r"a batch of [123] instead of 4 would need"):
        run.train()


@pytest.mark.parametrize(
    ("clips", "beside"),
    [
        pytest.param(True, "", marks=pytest.mark.slow),
        (True, "step_in_backward"),
        pytest.param(False, "", marks=pytest.mark.slow),
    ],
)
def test_the_optimizer_steps_in_backward_where_nothing_reads_gradients(
    clips: bool, beside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []
    honest = hooks._Step.clipping
    monkeypatch.setattr(
        hooks._Step, "clipping", lambda self, limit, norm: (limits.append(limit), honest(self, limit, norm))[1]
    )

    def wide() -> nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2, vocab_size=260,
            attention_dropout=0.1,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    changes = {"max_steps": 6, "max_grad_norm": 0.7 if clips else 0.0}
    callback = TightfitCallback("80%", exact=True, beside=beside)
    ours = trainer("trainer", tmp_path / "ours", [callback], subject=wide(), **changes)
    if clips and not beside:  # clipping needs all gradients at once, or the step twice, which is for the user to say
        with pytest.raises(BudgetInfeasible, match="beside='state_in_host'"):
            ours.train()
        return
    ours.train()
    plain = trainer("trainer", tmp_path / "plain", subject=wide(), **changes)
    plain.train()
    assert callback.plan is not None and "step_in_backward" in callback.plan.settings
    assert max(callback.peaks) <= callback.plan.budget_bytes * 1.005
    assert told(ours) == told(plain)
    for one, other in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert untouched(ours) and not {"training_step"} & vars(ours).keys()
    assert "step" not in vars(ours.optimizer.optimizer)
    norms = [each["grad_norm"] for each in told(ours) if "grad_norm" in each]
    assert callback.proof is not None and callback.proof.passed
    assert limits == ([0.7] * 8 if clips else [])  # six steps, and the two of the peak that is proven
    assert len(norms) == 6 and (not clips or min(norms) > 0.7)  # there was something to clip
