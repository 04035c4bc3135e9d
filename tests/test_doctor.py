"""The doctor: every trap is sprung for real, is not seen where it is mended, and every number of a fix is simulated."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.names import EVERY_N_LAYERS, NEW, switch_on
from torch import nn
from torch.utils.checkpoint import checkpoint

from tightfit.cli.program import main
from tightfit.core import InvalidInput
from tightfit.doctor import TRAPS, Verdict, case_of, examine, explain_peak, findings, probed, read_run, setup_of
from tightfit.doctor.traps import peaks, use_cache
from tightfit.doctor.traps import trap as shared
from tightfit.doctor.traps.reentrant import _missing
from tightfit.forecast import Adapters, Setup
from tightfit.levers.loss_in_place.loss import in_place
from tightfit.step.run import static_bytes_by_category
from tightfit.verify.measure import every_block_checkpointed
from tightfit.verify.peak import PeakMeter

BY_NAME = {trap.name: trap for trap in TRAPS}
BITES, NOT_HERE, CANNOT_TELL = Verdict.BITES, Verdict.NOT_HERE, Verdict.CANNOT_TELL


def has_avx512bf16() -> bool:
    from bitsandbytes.nn.modules import has_avx512bf16

    return bool(has_avx512bf16())


# ---------------------------------------------------------------------------------------------- the probes
# Each on the installed versions. A release without the trap makes its probe say so, and this table is where to note it.


@pytest.mark.parametrize("name", [name for name in BY_NAME if name != "compiler-budget-with-dropout"])
def test_the_trap_is_there(name: str) -> None:
    seen = probed(BY_NAME[name])
    expected = NOT_HERE if name == "4bit-cpu-after-eval" and not has_avx512bf16() else BITES
    assert seen.verdict is expected, seen.why


def test_what_the_probes_saw() -> None:
    """The effects themselves, not only that there is one."""
    seen = probed(BY_NAME["reentrant-by-default"])
    node = seen.figures["nodes"]
    if NEW:
        assert node["{}"] == "CheckpointFunctionBackward" != node["None"]
    else:  # transformers 5.17 has it in PEFT's preparation alone
        assert seen.figures["peft_prepare_for_kbit_is_reentrant"]
    missing = probed(BY_NAME["missing-input-gradients"]).figures
    assert missing["missing_by_hand"] == missing["parameters"] > 0 == missing["missing_non_reentrant"]
    assert missing["missing_by_switch"] == 0  # since transformers 5 its own switch sees to it
    hook = probed(BY_NAME["input-gradient-hook-left"]).figures
    assert hook["peak_bytes_mended"] == hook["peak_bytes_before"] < hook["peak_bytes_after"]
    fsdp = probed(BY_NAME["random-state-not-preserved"]).figures
    assert fsdp["relative_error"] > 0.1
    assert fsdp["relative_error_mended"] == fsdp["relative_error_without_dropout"] == 0
    trl = probed(BY_NAME["trl-overrides-the-plan"]).figures
    assert trl["on_by_default"]
    assert trl["layers_after"] == [True] * 4 != trl["layers_asked"]
    idle = probed(BY_NAME["off-in-eval"]).figures
    assert idle["saved_bytes_train"] < idle["saved_bytes_eval"] == idle["saved_bytes_off"]
    foreach = probed(BY_NAME["foreach-temporaries"]).figures
    assert foreach["foreach_bytes"] >= foreach["parameter_bytes"]
    if has_avx512bf16():
        packed = probed(BY_NAME["4bit-cpu-after-eval"]).figures
        assert packed["relative_error"] > 0.1
        assert packed["relative_error_mended"] == packed["relative_error_repeated"] == 0


def test_the_compiler_drops_the_mask() -> None:
    seen = probed(BY_NAME["compiler-budget-with-dropout"])
    assert seen.verdict is BITES, seen.why
    errors = seen.figures["relative_error_by_budget"]
    assert errors["1.0"] < 1e-5
    assert errors["0.5"] > 0.1


@pytest.mark.slow
def test_the_compiler_drops_the_mask_in_inductor_too() -> None:
    seen = probed(BY_NAME["compiler-budget-with-dropout"], deep=True)
    assert seen.verdict is BITES, seen.why
    assert seen.figures["backend"] == "inductor"


# What takes the trap out of the installed library: after it the probe must find nothing.


def mend_reentrant(patch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    name = "_activation_checkpointing_enable" if NEW else "gradient_checkpointing_enable"
    original = getattr(PreTrainedModel, name)

    def enable(self: Any, arguments: Any = None, *args: Any, **kwargs: Any) -> None:
        original(self, {"use_reentrant": False, **(arguments or {})}, *args, **kwargs)

    patch.setattr(PreTrainedModel, name, enable)


def mend_missing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        shared, "checkpoint", lambda function, *args, use_reentrant: checkpoint(function, *args, use_reentrant=False)
    )


def mend_hook(patch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    patch.setattr(PreTrainedModel, "enable_input_require_grads", lambda self: None)
    patch.setattr(PreTrainedModel, "disable_input_require_grads", lambda self: None)


def mend_cache(patch: pytest.MonkeyPatch) -> None:
    original = use_cache.peak_of
    patch.setattr(use_cache, "peak_of", lambda model, batch, **said: original(model, batch, use_cache=False))


def mend_fsdp(patch: pytest.MonkeyPatch) -> None:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as module

    original = module.checkpoint_wrapper
    patch.setattr(module, "checkpoint_wrapper", lambda layer, preserve_rng_state=True: original(layer))


def mend_compiler(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "compile", lambda function, backend: function)


def mend_4bit(patch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.nn.modules as modules

    original = modules.Linear4bit.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.support_avx512bf16_for_cpu = False

    patch.setattr(modules.Linear4bit, "__init__", init)


def mend_trl(patch: pytest.MonkeyPatch) -> None:
    import trl
    import trl.models.utils

    patch.setattr(trl, "SFTConfig", lambda **said: SimpleNamespace(gradient_checkpointing=False))
    patch.setattr(trl.models.utils, "disable_gradient_checkpointing", lambda *args: contextlib.nullcontext())


def mend_eval(patch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    patch.setattr(PreTrainedModel, "eval", lambda self: self, raising=False)


def mend_logits(patch: pytest.MonkeyPatch) -> None:
    original = peaks.tiny_model
    patch.setattr(peaks, "tiny_model", lambda **said: original(**{**said, "vocab_size": 64}))


def mend_foreach(patch: pytest.MonkeyPatch) -> None:
    original = torch.optim.AdamW
    patch.setattr(torch.optim, "AdamW", lambda parameters, **said: original(parameters, foreach=False))


MENDS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "reentrant-by-default": mend_reentrant,
    "missing-input-gradients": mend_missing,
    "input-gradient-hook-left": mend_hook,
    "use-cache": mend_cache,
    "random-state-not-preserved": mend_fsdp,
    "compiler-budget-with-dropout": mend_compiler,
    "4bit-cpu-after-eval": mend_4bit,
    "trl-overrides-the-plan": mend_trl,
    "off-in-eval": mend_eval,
    "logits-own-the-peak": mend_logits,
    "foreach-temporaries": mend_foreach,
}


def test_every_trap_has_a_mend_to_try() -> None:
    assert MENDS.keys() == BY_NAME.keys()


@pytest.mark.parametrize("name", MENDS)
def test_a_library_without_the_trap_is_not_accused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MENDS[name](monkeypatch)
    seen = probed(BY_NAME[name])
    assert seen.verdict is NOT_HERE, seen.why


def test_a_probe_that_cannot_run_does_not_say_that_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = dataclasses.replace(BY_NAME["off-in-eval"], probe=lambda: 1 / 0)
    assert probed(broken).verdict is CANNOT_TELL
    assert "ZeroDivisionError" in probed(broken).why
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trl" else object())
    seen = probed(BY_NAME["trl-overrides-the-plan"])
    assert seen.verdict is CANNOT_TELL
    assert "trl" in seen.why


def test_probes_leave_no_trace(capfd: pytest.CaptureFixture[str]) -> None:
    gc.collect()  # other tests' garbage: torch's profiler writes a line where an older block is freed under it
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for trap in TRAPS:
        probed(trap)
    assert torch.equal(before, torch.get_rng_state())
    assert capfd.readouterr() == ("", "")


def test_the_page_is_about_these_traps() -> None:
    result = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "traps.json").read_text())
    shown = [(row["name"], row["sentence"], row["mend"]) for row in result["rows"]]
    assert shown == [(trap.name, trap.sentence, trap.mend) for trap in TRAPS], "run benchmarks/traps.py"


# -------------------------------------------------------------------------------------------- live models


def verdicts(model: nn.Module) -> dict[str, Verdict]:
    return {
        name: seen.verdict for name, trap in BY_NAME.items() if (seen := trap.of_model(model)) is not None
    }  # fmt: skip


def tiny(kind: str = "llama", **changed: Any) -> Any:
    return shared.tiny_model(kind, **{"use_cache": False, **changed})


def lora(**changed: Any) -> Any:
    from tightfit.integrations.peft import add_lora

    return add_lora(tiny(**changed), rank=2)


def test_a_plain_model_has_nothing() -> None:
    assert set(verdicts(tiny()).values()) == {NOT_HERE}
    assert set(verdicts(nn.Linear(3, 3)).values()) == {NOT_HERE}


def test_a_reentrant_model() -> None:
    model = tiny()
    switch_on(model, {})
    assert verdicts(model)["reentrant-by-default"] is BITES
    switch_on(model, {"use_reentrant": False})
    assert verdicts(model)["reentrant-by-default"] is NOT_HERE


def test_inputs_without_gradients() -> None:
    model = lora()
    base = model.get_base_model()
    switch_on(base, {"use_reentrant": True})
    assert verdicts(model)["missing-input-gradients"] is NOT_HERE
    base.disable_input_require_grads()
    assert verdicts(model)["missing-input-gradients"] is BITES
    # and it is so: nothing gets a gradient
    assert _missing(lambda: model) == (28, 28)


def test_a_hook_over_a_frozen_prefix() -> None:
    model = tiny(layers=4)
    model.get_input_embeddings().requires_grad_(False)
    for layer in model.model.layers[:3]:
        layer.requires_grad_(False)
    switch_on(model)
    assert verdicts(model)["input-gradient-hook-left"] is BITES
    model.disable_input_require_grads()
    assert verdicts(model)["input-gradient-hook-left"] is NOT_HERE
    whole = lora()
    switch_on(whole.get_base_model())
    assert verdicts(whole)["input-gradient-hook-left"] is NOT_HERE


def test_a_model_with_its_cache_on() -> None:
    model = tiny(use_cache=True)
    assert verdicts(model)["use-cache"] is BITES
    if EVERY_N_LAYERS:
        switch_on(model, every_n_layers=2)
        assert verdicts(model)["use-cache"] is BITES
    switch_on(model)
    assert verdicts(model)["use-cache"] is NOT_HERE


@pytest.mark.parametrize(("dropout", "verdict"), [(0.1, BITES), (0.0, NOT_HERE)])
def test_wrappers_without_the_random_state(dropout: float, verdict: Verdict) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = tiny("gpt2", resid_pdrop=dropout)
    model.transformer.h[0] = checkpoint_wrapper(model.transformer.h[0])
    assert verdicts(model)["random-state-not-preserved"] is NOT_HERE
    model.transformer.h[1] = checkpoint_wrapper(model.transformer.h[1], preserve_rng_state=False)
    assert verdicts(model)["random-state-not-preserved"] is verdict


def test_a_compiled_model_with_a_budget() -> None:
    import torch._functorch.config as functorch_config

    model = torch.compile(tiny("gpt2", resid_pdrop=0.1))
    assert verdicts(model)["compiler-budget-with-dropout"] is NOT_HERE
    with functorch_config.patch(activation_memory_budget=0.5):
        assert verdicts(model)["compiler-budget-with-dropout"] is BITES
        assert verdicts(torch.compile(tiny("gpt2")))["compiler-budget-with-dropout"] is NOT_HERE


@pytest.mark.skipif(not has_avx512bf16(), reason="the CPU has no AVX512-BF16, so nothing is repacked")
def test_a_4bit_model_after_evaluation() -> None:
    from tightfit.integrations.bitsandbytes import quantise

    model = quantise(tiny(hidden_size=64), torch.float32)
    assert verdicts(model)["4bit-cpu-after-eval"] is CANNOT_TELL
    model.eval()
    with torch.no_grad():
        model(shared.tiny_batch()["input_ids"])
    model.train()
    assert verdicts(model)["4bit-cpu-after-eval"] is BITES
    mended = quantise(tiny(hidden_size=64), torch.float32)
    for module in mended.modules():  # the mend, word for word
        module.support_avx512bf16_for_cpu = False
    assert verdicts(mended)["4bit-cpu-after-eval"] is NOT_HERE


def test_checkpointing_in_a_part_that_is_in_eval_mode() -> None:
    model = tiny(layers=4)
    switch_on(model)
    assert verdicts(model)["off-in-eval"] is NOT_HERE
    model.model.layers[1].eval()
    seen = BY_NAME["off-in-eval"].of_model(model)
    assert seen is not None
    assert seen.verdict is BITES
    assert seen.why.startswith("1 of 4")


def test_examine_looks_at_the_peak_of_the_callers_own_step() -> None:
    model = tiny(layers=2, vocab_size=8192, tie_word_embeddings=True)
    found = {f.name: f for f in examine(model, shared.tiny_batch(8, 64))}
    assert found["logits-own-the-peak"].verdict is BITES
    # the step with an optimizer whose temporaries are the peak
    plain = tiny(layers=2, vocab_size=4096)
    found = {
        f.name: f
        for f in examine(plain, shared.tiny_batch(), optimizer=torch.optim.AdamW(plain.parameters(), foreach=True))
    }
    assert found["foreach-temporaries"].verdict is BITES, found["foreach-temporaries"].why
    found = {
        f.name: f
        for f in examine(plain, shared.tiny_batch(), optimizer=torch.optim.AdamW(plain.parameters(), fused=True))
    }
    assert found["foreach-temporaries"].verdict is NOT_HERE
    assert all(p.grad is None for p in plain.parameters())


# ------------------------------------------------------------------------------------------------- runs


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def of_run(folder: Path, text: str) -> dict[str, Verdict]:
    run = read_run(write(folder, text))
    return {name: seen.verdict for name, trap in BY_NAME.items() if (seen := trap.of_run(run)) is not None}


BASE = "model_name_or_path: gpt2\nmax_length: 128\n"


@pytest.mark.parametrize(
    ("text", "bites"),
    [
        ("", {"trl-overrides-the-plan"}),
        ("gradient_checkpointing: false\n", set()),
        ("gradient_checkpointing: true\n", set()),
        ("activation_checkpointing: true\ngradient_checkpointing_kwargs: {}\n", set()),
        (
            "gradient_checkpointing: true\ngradient_checkpointing_kwargs: {use_reentrant: true}\n",
            {"reentrant-by-default"},
        ),
        ("gradient_checkpointing: true\ngradient_checkpointing_kwargs: {debug: true}\n", {"reentrant-by-default"}),
        ("gradient_checkpointing: true\ngradient_checkpointing_kwargs: {every_n_layers: 2}\n", set()),
        (
            "beta: 0.1\ngradient_checkpointing: true\ngradient_checkpointing_kwargs: {every_n_layers: 2}\n",
            {"trl-overrides-the-plan"},
        ),
        ("gradient_checkpointing: false\nuse_cache: true\n", {"use-cache"}),
        (
            "gradient_checkpointing: false\nfsdp_config: {activation_checkpointing: true, version: 2}\n",
            {"random-state-not-preserved"},
        ),
        ("gradient_checkpointing: false\nfsdp_config: {activation_checkpointing: true, version: 1}\n", set()),
        (
            "gradient_checkpointing: false\nload_in_4bit: true\nuse_cpu: true\neval_strategy: steps\n",
            {"4bit-cpu-after-eval"},
        ),
        ("gradient_checkpointing: false\nload_in_4bit: true\nuse_cpu: true\n", set()),
    ],
)
def test_what_bites_a_run(text: str, bites: set[str], tmp_path: Path) -> None:
    assert {name for name, verdict in of_run(tmp_path, BASE + text).items() if verdict is BITES} == bites


def test_adapters_draw_random_numbers_too(tmp_path: Path) -> None:
    text = "model_name_or_path: llama-2-7b\ngradient_checkpointing: false\n"
    text += "fsdp_config: {activation_checkpointing: true, version: 2}\n"
    assert of_run(tmp_path, text)["random-state-not-preserved"] is NOT_HERE
    assert of_run(tmp_path, text + "use_peft: true\n")["random-state-not-preserved"] is BITES
    assert of_run(tmp_path, text + "use_peft: true\nlora_dropout: 0.0\n")["random-state-not-preserved"] is NOT_HERE


def test_the_launchers_file_alone(tmp_path: Path) -> None:
    text = "distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\n  fsdp_activation_checkpointing: true\n"
    found = of_run(tmp_path, text)
    assert found["random-state-not-preserved"] is CANNOT_TELL  # it does not name the model
    assert BITES not in found.values()


def test_the_step_of_a_run(tmp_path: Path) -> None:
    text = BASE + "use_peft: true\nlora_r: 4\nper_device_train_batch_size: 3\n"
    text += "gradient_accumulation_steps: 2\noptim: adamw_torch\n"
    setup, _ = setup_of(read_run(write(tmp_path, text)))
    assert setup == Setup(
        model="gpt2", method="lora", batch=3, seq=128, dtype="bf16-mixed", optimizer="adamw", rank=4, accumulate=True,
        trainer="sft", settings=(("gradient_accumulation_steps", 2),), adapters=Adapters(targets=None, dropout=0.05),
    )  # fmt: skip
    setup, notes = setup_of(read_run(write(tmp_path, text + "beta: 0.1\n")))
    assert setup is not None
    assert (setup.trainer, setup.batch) == ("dpo", 3)  # pairs
    assert any("chosen and rejected" in note for note in notes)
    changed = case_of(write(tmp_path, text), batch=1, optimizer="sgd").setup
    assert changed is not None
    assert (changed.batch, changed.optimizer, changed.rank) == (1, "sgd", 4)
    liger = case_of(write(tmp_path, text + "use_liger_kernel: true\n"))
    assert liger.setup is None
    assert any("run on a GPU alone" in note for note in liger.notes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "nothing"),
        ("- 1\n", "a list"),
        ("a: [", r"not YAML \(line"),
        ("foo: 1\n", "'foo'"),
        (BASE + "per_device_train_batch_size: many\n", "'many'"),
        (BASE + "lora_r: 0\nuse_peft: true\n", "lora_r"),
        (BASE + "dtype: int3\n", "int3"),
        ("model_name_or_path: gpt3\n", "gpt3"),
        ("!!python/object/apply:os.system ['true']\n", "not YAML"),
    ],
)
def test_a_yaml_that_is_no_run(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=said):
        case_of(write(tmp_path, text))


# -------------------------------------------------------------------------------------------- the peak

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    (path / "config.json").write_text(json.dumps(TINY))
    return str(path)


def test_the_simulated_fixes_are_what_the_allocator_counts(folder: str) -> None:
    from tightfit.integrations.transformers import load_model, random_batch

    setup = Setup(model=folder, batch=8, seq=64, dtype="fp32", optimizer="none")
    why = explain_peak(setup, device=None)
    model, _ = load_model(folder)

    @contextlib.contextmanager
    def both() -> Iterator[None]:
        with every_block_checkpointed(model), in_place():
            yield

    def measured(context: Callable[[], Any], batch: int = 8) -> int:
        tokens = random_batch(model, batch, 64)
        model.zero_grad(set_to_none=True)
        model.config.use_cache = False
        before = sum(static_bytes_by_category(model, tokens).values())
        with context(), PeakMeter("cpu") as meter:
            model(**tokens).loss.backward()
        return before + meter.rise_bytes

    measured(contextlib.nullcontext)
    found = {fix.name: fix.peak_bytes for fix in why.tried}
    blocks = functools.partial(every_block_checkpointed, model)
    assert why.plain.peak_bytes == pytest.approx(measured(contextlib.nullcontext), rel=0.005)
    assert why.checkpointed.peak_bytes == pytest.approx(measured(blocks), rel=0.005)
    assert found["loss-in-place"] == pytest.approx(measured(both), rel=0.005)
    assert why.cheapest is not None
    assert why.cheapest.name == "loss-in-place"
    assert why.cheapest.peak_bytes < 0.75 * why.checkpointed.peak_bytes
    assert why.steps[0] == why.cheapest
    assert [fix.before_bytes for fix in why.steps[1:]] == [fix.peak_bytes for fix in why.steps[:-1]]


@pytest.mark.slow
def test_the_optimizers_step_owns_the_peak(tmp_path: Path) -> None:
    small = {**TINY, "vocab_size": 64, "hidden_size": 128, "intermediate_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(small))
    folder = str(tmp_path)
    why = explain_peak(Setup(model=folder, batch=1, seq=8, dtype="bf16", optimizer="adamw"))
    assert why.checkpointed.phase == "optimizer"
    assert why.cheapest is not None
    assert why.cheapest.name == "fused-optimizer"
    found = {f.name: f for f in findings(peak=why)}
    assert found["foreach-temporaries"].verdict is BITES
    assert found["logits-own-the-peak"].verdict is NOT_HERE
    fused = explain_peak(Setup(model=folder, batch=1, seq=8, dtype="bf16", optimizer="adamw-fused"))
    assert fused.checkpointed.peak_bytes == why.cheapest.peak_bytes
    assert {f.name: f for f in findings(peak=fused)}["foreach-temporaries"].verdict is NOT_HERE


# ------------------------------------------------------------------------------------------ the command


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["doctor", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.slow
def test_the_command_for_a_model(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = told(capsys, folder, "--batch", "8", "--seq", "64", "--json")
    report = json.loads(out)
    assert status == 1
    assert "logits-own-the-peak" in report["bites"]
    assert report["torch"] == torch.__version__.split("+")[0] or report["torch"].startswith(torch.__version__)
    assert {trap["name"] for trap in report["traps"]} == BY_NAME.keys()
    assert all(
        {"verdict", "why", "mend", "sentence", "stack", "here", "versions"} <= trap.keys() for trap in report["traps"]
    )
    why = report["why_no_saving"]
    assert why["cheapest"]["peak_bytes"] < why["checkpointed"]["peak_bytes"]
    assert any("--deep" in note for note in report["notes"])


def test_the_command_for_the_stack_alone(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = told(capsys)
    assert status == 0
    assert "transformers" in out
    assert all(name in out for name in BY_NAME)
    assert "mend:" in out


@pytest.mark.slow
def test_nothing_bites(tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"model_name_or_path: {folder}\ngradient_checkpointing: false\nmax_length: 16\n"
    text += "per_device_train_batch_size: 1\n"
    status, out, _ = told(capsys, write(tmp_path, text), "--json")
    assert json.loads(out)["bites"] == []
    assert status == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gpt3",), "unknown model"),
        (("gpt2", "--batch", "0"), "at least 1"),
        (("gpt2", "--kernels", "tpu"), "tpu"),
        (("gpt2", "--trainer", "sft"), "--trainer"),
        (("--batch", "2"), "--batch"),
        (("train.py",), "script"),
        (("none.yaml",), "none.yaml"),
    ],
)
def test_wrong_input(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = told(capsys, *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_real_preference_run_loses_every_n_layers(tmp_path: Path) -> None:
    """The probe's finding in TRL's own trainer: the first step after the reference's forward ends with an error."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{chr(97 + i): 3 + i for i in range(26)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny(layers=4).save_pretrained(tmp_path / "model")

    def run(**kwargs: Any) -> None:
        arguments = DPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=2, save_strategy="no",
            per_device_train_batch_size=2, gradient_checkpointing=True, disable_tqdm=True, **kwargs,
        )  # fmt: skip
        DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": "a b c", "chosen": " d e", "rejected": " f g"}] * 8),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
            ),
        ).train()

    run()
    with pytest.raises(ValueError, match="every_n_layers"):
        run(gradient_checkpointing_kwargs={"every_n_layers": 2})
