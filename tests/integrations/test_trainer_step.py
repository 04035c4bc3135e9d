"""The forecast of TRL's step is that of the step that TRL's trainer runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import load_benchmark
from transformers import AutoConfig, AutoModelForCausalLM

from tightfit.core import InvalidInput, Unsupported
from tightfit.device.cost import NOMINAL_CUDA
from tightfit.doctor import case_of, peak_of
from tightfit.forecast import Adapters, Setup, trace_setup
from tightfit.forecast.recording import optimizer_record
from tightfit.forecast.setup import build_model
from tightfit.integrations.trainer_step import _tokenizer
from tightfit.plan import every_block, simulate
from tightfit.verify.peak import PeakMeter, static_bytes

harness = load_benchmark("trainer_step")
FAST = ("llama, dft", "llama, LoRA with dropout")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("model")
    (made / "config.json").write_text(json.dumps({**harness.LLAMA, "vocab_size": 4096}))
    return str(made)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in harness.CASES]
)
def test_the_forecast_is_what_the_trainer_needs(name: str) -> None:
    row = harness.compared(name, harness.CASES[name])
    assert abs(row["off"]) <= 0.005, row
    assert abs(row["own_loss_off"]) > 0.1  # what a forecast of the model's own loss says is about another step


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_forecast_of_dpo_is_what_the_trainer_needs(method: str) -> None:
    """Both references: the model with its adapters off, and a second model. `CASES` has the larger ones."""
    small = {**harness.LLAMA, "vocab_size": 2048}
    row = harness.compared(method, harness.Case(config=small, trainer="dpo", method=method, batch=2, seq=96))
    assert abs(row["off"]) <= 0.005, row
    assert abs(row["own_loss_off"]) > 0.1


@pytest.mark.slow
def test_the_forecast_of_trls_own_defaults_is_what_the_trainer_needs(tmp_path: Path) -> None:
    """bf16 by autocast, float32 weights, every block checkpointed by torch: what `SFTTrainer` does if it is told
    nothing. Autocast ends with the model's forward, and its copies of weights with it."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = {**harness.LLAMA, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = Setup(model=str(tmp_path), batch=4, seq=96, dtype="bf16-mixed", optimizer="none", trainer="sft")
    forecast = every_block(trace_setup(asked)).peak_bytes
    needed: list[int] = []

    class Measured(SFTTrainer):  # type: ignore[misc]  # TRL is untyped
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            static = static_bytes(self.model, None, dict(inputs))
            with PeakMeter("cpu") as meter:
                loss = super().training_step(model, inputs, num_items_in_batch)
            needed.append(static + meter.rise_bytes)
            return loss

    torch.manual_seed(0)
    rows = [{"input_ids": [3] * asked.seq, "labels": [3] * asked.seq} for _ in range(2 * asked.batch)]
    args = SFTConfig(
        output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        max_steps=2, per_device_train_batch_size=asked.batch, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    assert args.bf16 and args.gradient_checkpointing
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(tmp_path))).train()
    trainer = Measured(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=_tokenizer()
    )  # fmt: skip
    trainer.train()
    assert forecast == pytest.approx(needed[-1], rel=5e-3)


def setup(folder: str, **more: Any) -> Setup:
    return Setup(model=folder, batch=4, seq=128, dtype="bf16", optimizer="none", **more)


def test_on_cuda_the_trainers_kernels_stand_for_themselves(folder: str) -> None:
    """There is no card here. The path is CUDA's: only tokens that count, no float32 copies of what is multiplied."""
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    before = chunked_logprob._use_triton, chunked_logprob._forward_kernel, utils._use_triton
    on_card = trace_setup(setup(folder, trainer="sft"), NOMINAL_CUDA)
    names = {op.name for op in on_card.ops}
    assert "aten.masked_scatter.default" in names and "aten.addmm.dtype_out" in names
    assert sum(op.flops for op in on_card.ops if op.name == "aten.addmm.dtype_out") > 0
    assert not on_card.losses and any("ChunkedLogProbFunction" in note for note in on_card.notes)
    here = trace_setup(setup(folder, trainer="sft"))
    assert simulate(on_card).peak_bytes < simulate(here).peak_bytes
    assert before == (chunked_logprob._use_triton, chunked_logprob._forward_kernel, utils._use_triton)


#: The least that has linear layers to put in 4 bits.
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.mark.parametrize(
    ("trainer", "method"), [("sft", "full"), ("sft", "qlora"), ("dpo", "full"), ("dpo", "lora"), ("dpo", "qlora")]
)
def test_the_model_is_given_back(trainer: str, method: str, tmp_path: Path) -> None:
    small = {**harness.GPT2, "vocab_size": 512, "n_embd": 32} if method != "qlora" else LLAMA
    (tmp_path / "config.json").write_text(json.dumps(small))
    asked = setup(
        str(tmp_path), trainer=trainer, method=method, settings=(("neftune_noise_alpha", 5.0),),
        adapters=Adapters(dropout=0.1),
    )  # fmt: skip
    model = build_model(asked)

    def seen() -> dict[str, Any]:
        found: dict[str, Any] = {name: set(vars(module)) for name, module in model.named_modules()}
        found |= {f"{name}.p": each.p for name, each in model.named_modules() if isinstance(each, torch.nn.Dropout)}
        found |= {f"{name} trains": (each.requires_grad, each.dtype) for name, each in model.named_parameters()}
        found |= {"config": dict(vars(model.config)), "generation": dict(vars(model.generation_config))}
        return found

    before, hooks = seen(), len(model.get_input_embeddings()._forward_hooks)
    assert any(value for name, value in before.items() if name.endswith(".p"))
    trace_setup(asked)
    assert "forward" not in vars(model)
    assert seen() == before
    assert len(model.get_input_embeddings()._forward_hooks) == hooks
    own = trace_setup(dataclasses.replace(asked, trainer="model", settings=()))
    assert own.losses  # the model's own loss, as if nothing had been


@pytest.mark.parametrize("trainer", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_the_adapters_of_4_bit_models_are_trained_in_bfloat16(trainer: str, tmp_path: Path) -> None:
    """TRL makes them so. The state of the optimizer is in the dtype of what it trains, whatever was forecast before."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    asked = dataclasses.replace(setup(str(tmp_path), trainer=trainer, method="qlora"), optimizer="adamw")
    adapters = sum(p.numel() for p in build_model(asked).parameters() if p.requires_grad)

    def state_bytes(asked: Setup) -> int:
        optimizer_record.cache_clear()
        return trace_setup(asked, NOMINAL_CUDA).static_bytes["optimizer_state"]

    own = dataclasses.replace(asked, trainer="model", settings=())
    before, theirs, after = state_bytes(own), state_bytes(asked), state_bytes(own)
    scalars = len([p for p in build_model(asked).parameters() if p.requires_grad]) * 512  # the counters of the steps
    assert before == after and 2 * 4 * adapters <= before <= 2 * 4 * adapters + 3 * scalars
    assert 2 * 2 * adapters <= theirs <= 2 * 2 * adapters + 3 * scalars


def test_what_trl_refuses_is_one_line(folder: str) -> None:
    for trainer, settings in (("sft", {"loss_type": "no such loss"}), ("dpo", {"loss_weights": (0.5, 0.5)})):
        with pytest.raises(Unsupported, match=f"{trainer.upper()}Trainer cannot be made here") as error:
            trace_setup(setup(folder, trainer=trainer, settings=tuple(settings.items())))
        assert "\n" not in str(error.value)
    with pytest.raises(InvalidInput, match=r"unknown trainer 'ppo'; did you mean 'dpo'\?: use model, sft, dpo"):
        setup(folder, trainer="ppo").checked()
    with pytest.raises(Unsupported, match="how FSDP2 shards DPO's reference is not forecast"):
        setup(folder, trainer="dpo", strategy="fsdp2", world_size=2).checked()


def test_doctor_reads_the_adapters_of_a_run(folder: str, tmp_path: Path) -> None:
    def read(lines: str) -> Any:
        (tmp_path / "run.yaml").write_text(f"model_name_or_path: {folder}\nmax_length: 64\n{lines}\n")
        return case_of(str(tmp_path / "run.yaml"))

    asked = read("use_peft: true").setup.adapters
    assert asked == Adapters(targets=None, dropout=0.05)  # TRL's dropout, and PEFT's own targets
    lines = "use_peft: true\nlora_target_modules: [q_proj, v_proj]\nuse_dora: true\nlora_dropout: 0.1"
    asked = read(f"{lines}\nlora_modules_to_save: [lm_head]\nmodel_init_kwargs: {{attn_implementation: eager}}").setup
    assert asked.adapters == Adapters(targets=("q_proj", "v_proj"), saved=("lm_head",), dropout=0.1, dora=True)
    assert asked.attention == "eager"
    assert not read("load_in_4bit: true").setup.double_quantised
    assert read("load_in_4bit: true\nuse_bnb_nested_quant: true").setup.double_quantised
    flash = read("attn_implementation: flash_attention_2\nactivation_offloading: true")
    assert flash.setup.attention is None
    assert any(note.startswith("attn_implementation flash_attention_2") for note in flash.notes)
    assert any(note.startswith("activation_offloading") for note in flash.notes)
    assert read("model_init_kwargs: {dtype: bfloat16}").setup.dtype == "bf16"
    for wrong in ("lora_dropout: 1.5", "lora_target_modules: 3"):
        with pytest.raises(InvalidInput, match=f"{wrong.split(':')[0]} in .* is {wrong.split(': ')[1]}: expected"):
            read(f"use_peft: true\n{wrong}")
    with pytest.raises(InvalidInput, match="PEFT cannot put LoRA on 'no_such' of this model"):
        trace_setup(read("use_peft: true\nlora_target_modules: [no_such]").setup)


@pytest.mark.parametrize(
    ("lines", "method", "reference"),
    [
        ("use_peft: true", "lora", "the model with its adapters off"),
        ("beta: 0.2", "full", "a second model"),
        ("precompute_ref_log_probs: true", "full", "the reference's answers are in the data"),
    ],
)
def test_doctor_takes_a_run_of_dpo(lines: str, method: str, reference: str, folder: str, tmp_path: Path) -> None:
    run = tmp_path / "dpo.yaml"
    run.write_text(
        f"model_name_or_path: {folder}\nper_device_train_batch_size: 3\nmax_length: 64\nloss_type: [ipo, sft]\n"
        f"loss_weights: [0.8, 0.2]\n{lines}\n"
    )
    case = case_of(str(run))
    assert case.setup is not None
    assert (case.setup.trainer, case.setup.method, case.setup.batch) == ("dpo", method, 3)
    assert dict(case.setup.settings)["loss_type"] == ("ipo", "sft")
    assert any("3 pairs, so 6 sequences" in note and reference in note for note in case.notes)


@pytest.mark.parametrize(
    ("trainer", "line"), [("KTO", "desirable_weight: 1.0"), ("Reward", "center_rewards_coefficient: 0.1")]
)
def test_another_trainers_run_is_not_read_as_dpo(trainer: str, line: str, folder: str, tmp_path: Path) -> None:
    """`beta` and `disable_dropout` are DPO's, and others' too."""
    run = tmp_path / "run.yaml"
    run.write_text(f"model_name_or_path: {folder}\nbeta: 0.1\ndisable_dropout: true\n{line}\n")
    with pytest.raises(Unsupported, match=f"a run of TRL's {trainer}Trainer"):
        case_of(str(run))


@pytest.mark.slow
def test_doctor_sells_nothing_that_has_nothing_to_act_on(folder: str, tmp_path: Path) -> None:
    run = tmp_path / "sft.yaml"
    run.write_text(
        f"model_name_or_path: {folder}\nper_device_train_batch_size: 4\nmax_length: 128\nuse_cpu: true\nbf16: false\n"
    )
    case = case_of(str(run))
    assert case.setup is not None and case.setup.trainer == "sft"
    _, why = peak_of(case)
    assert why is not None and not why.whole_logits
    assert all(fix.name != "loss-in-place" for fix in (*why.tried, *why.steps))
    assert why.plain.peak_bytes == simulate(trace_setup(case.setup)).peak_bytes
    case = case_of(str(run), trainer="transformers")
    _, why = peak_of(case)
    assert why is not None and any(fix.name == "loss-in-place" for fix in why.tried)


def test_a_mask_that_is_known_lets_a_known_number_through() -> None:
    from tightfit.trace.fake import FakeStep, faked

    step, model = FakeStep(), torch.nn.Linear(2, 2)
    batch = {"mask": torch.tensor([[True, False], [True, True]]), "x": torch.randn(2, 2, 3)}
    with faked(model, batch, step) as fake:
        out = step.run(torch.ops.aten.index.Tensor, (fake["x"], [fake["mask"]]), {})
        assert tuple(out.shape) == (3, 3)


def test_a_layer_drop_of_nothing_is_known_and_another_is_not() -> None:
    from tightfit.trace.fake import FakeStep, faked

    aten, step = torch.ops.aten, FakeStep()

    def dropped(share: float) -> bool:
        drawn = step.run(aten.rand.default, ([],), {})
        return bool(step.run(aten._local_scalar_dense.default, (step.run(aten.lt.Scalar, (drawn, share), {}),), {}))

    with faked(torch.nn.Linear(2, 2), {}, step):
        assert not dropped(0.0)
        with pytest.raises(Unsupported, match="asks for the value"):
            dropped(0.1)


def test_a_constant_is_known_until_it_is_written_to() -> None:
    """A mask of ones is asked whether it is all ones; one that was changed, through a view too, is not known."""
    from tightfit.trace.fake import FakeStep, faked

    aten, step = torch.ops.aten, FakeStep()

    def made() -> torch.Tensor:
        out: torch.Tensor = step.run(aten.ones.default, ([2, 3],), {})
        return out

    def truth(mask: torch.Tensor) -> bool:
        boolean = step.run(aten._to_copy.default, (mask,), {"dtype": torch.bool})
        return bool(step.run(aten._local_scalar_dense.default, (step.run(aten.all.default, (boolean,), {}),), {}))

    with faked(torch.nn.Linear(2, 2), {}, step):
        assert truth(made())
        for write in (lambda mask: mask, lambda mask: mask[:, 1:]):
            mask = made()
            step.run(aten.zero_.default, (write(mask),), {})
            with pytest.raises(Unsupported, match="asks for the value"):
                truth(mask)


@pytest.mark.parametrize(
    "line", ["use_kernels: true", "model_init_kwargs: {use_kernels: true}", "use_liger_kernel: true"]
)
def test_kernels_that_run_on_a_gpu_alone_are_named(line: str, folder: str, tmp_path: Path) -> None:
    run = tmp_path / "sft.yaml"
    run.write_text(f"model_name_or_path: {folder}\n{line}\n")
    assert any("run on a GPU alone" in note for note in case_of(str(run)).notes)
