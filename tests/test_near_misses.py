"""A name that is nearly right gets a suggestion, wherever a name is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

import tightfit
from tightfit.cli.program import main
from tightfit.core import InvalidInput
from tightfit.core.errors import did_you_mean, nearly


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("chek gpt2", "Did you mean 'check'?"),
        ("check gpt2 --gpus a100", "--gpu"),
        ("check gpt22", "did you mean gpt2 or gpt2-xl?"),
        ("check gpt2 --gpu rtx4090x", "did you mean rtx-4090"),
        ("check gpt2 --method qlra", "did you mean 'qlora'?: use full, lora, qlora"),
        ("check gpt2 --optimizer adam", "did you mean 'adamw'?"),
        ("check gpt2 --dtype bf16_mixed", "did you mean 'bf16-mixed'?"),
        ("check gpt2 --trainer spo", "did you mean 'dpo'?"),
        ("check gpt2 --strategy fsdp", "did you mean 'fsdp2'?"),
        ("check gpt2 --max 1GiB --max-of every_block", "did you mean 'every-block'?"),
        ("measure gpt2 --budgt 50%", "--budget"),
        ("measure gpt2 --levers recmpute", "did you mean 'recompute'?"),
        ("measure gpt2 --method lor", "did you mean 'lora'?"),
        ("plan gpt2 --optimizer adamw8bt", "did you mean 'adamw8bit'?"),
        ("plan gpt2 --dtype bf17", "did you mean 'bf16'?"),
        ("train --method ful", "did you mean 'full'?"),
        ("train --learning_rat 0.1", "did you mean '--learning_rate'?"),
        ("doctor gpt2 --kernels cudaa", "did you mean 'cuda'?"),
    ],
)
def test_a_near_miss_gets_a_suggestion(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("key", "meant"), [("budgt", "budget"), ("per_device_train_bach_size", "per_device_train_batch_size")]
)
def test_a_near_miss_in_a_yaml(key: str, meant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "sft.yaml"
    run.write_text(f"model_name_or_path: tightfit-demo\n{key}: 4\n")
    assert main(["train", "--config", str(run)]) == 2
    assert f"did you mean {meant!r}?" in capsys.readouterr().err


def test_doctor_names_the_key_that_was_meant(tmp_path: Path) -> None:
    from tightfit.doctor import read_run

    run = tmp_path / "sft.yaml"
    run.write_text("model_name_or_path: gpt2\nper_device_train_bach_size: 4\nnothing_like_it_zzz: 1\n")
    (note,) = [note for note in read_run(run).notes if note.startswith("not looked at")]
    assert "per_device_train_bach_size (did you mean per_device_train_batch_size?)" in note
    with pytest.raises(InvalidInput, match="unknown trainer 'sfd'; did you mean 'sft'"):
        read_run(run, "sfd")
    assert "nothing_like_it_zzz" in note and "nothing_like_it_zzz (" not in note


def test_a_lever_in_python() -> None:
    with pytest.raises(InvalidInput, match="unknown lever 'of-load'; did you mean 'offload'"):
        tightfit.plan(None, "50%", levers=("of-load",))  # type: ignore[arg-type]


def test_case_is_no_difference_and_nothing_like_it_gets_no_suggestion() -> None:
    assert nearly("LORA", ("full", "lora")) == "lora"
    assert nearly("cuda", ("Full", "LoRA")) is None
    assert did_you_mean("zzz", ("full", "lora")) == ""
