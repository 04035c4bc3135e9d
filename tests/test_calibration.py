"""Figures that were measured on a device: how they are fitted, which device they are used for, who uses them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tightfit import accelerator, forecast
from tightfit.catalog import driver_name, gpu, gpu_names
from tightfit.cli.doctor import _environment_record
from tightfit.cli.program import main
from tightfit.core import Device, InvalidInput, Unsupported, dumps, loads
from tightfit.device import calibration
from tightfit.device.calibration import Calibration, found, path_of, read, using
from tightfit.device.cost import LAUNCH_SECONDS, NOMINAL_CPU, op_seconds
from tightfit.forecast import Effort, Setup, calibrating
from tightfit.forecast.calibrating import fitted_line
from tightfit.forecast.room import MARGIN, card_named
from tightfit.plan import account

QUICK = Effort(batches=3, batch_seconds=0.0005, longest_seconds=0.002, sizes=3, largest_bytes=2**18, whole_seconds=5.0)
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


@pytest.fixture
def tiny(model: str) -> Setup:
    return Setup(model=model, method="full", batch=1, seq=32, dtype="bf16", optimizer="sgd")


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of device files of a user who has none."""
    monkeypatch.delenv(calibration.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return calibration.folder()


def measured(name: str, like: Device, **changed: Any) -> Calibration:
    """A file as `calibrate` makes it, for a device with the catalog's figures."""
    figures: dict[str, Any] = {
        "name": name, "usable_bytes": like.memory_bytes // 2, "workspace_bytes": 3 * 2**20, "launch_seconds": 5e-6,
        "source": "measured by a test", **changed,
    }  # fmt: skip
    return Calibration(
        device=dataclasses.replace(like, **figures), date="2026-11-28T12:00:00+00:00", seconds=30.0, samples=100,
        spread={}, settings={}, environment={},
    )  # fmt: skip


# -------------------------------------------------------------------------------------------- the figures


def test_a_line_is_not_moved_by_what_was_disturbed() -> None:
    points = [(float(x), 2.0 + 0.5 * x) for x in range(1, 10)]
    assert fitted_line(points) == pytest.approx((2.0, 0.5))
    points[3], points[7] = (4.0, 90.0), (8.0, 70.0)
    assert fitted_line(points) == pytest.approx((2.0, 0.5))
    assert fitted_line([(3.0, 6.0)]) == (6.0, 0.0)


def test_a_rate_is_that_of_the_device_whatever_comes_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that the runs move: 10 us for each launch, 1e9 a second, and every third batch somebody else's second."""
    now, batches = [0.0], [0]
    bench = calibrating._Bench(torch.device("cpu"), Effort(batches=5, batch_seconds=0.001, longest_seconds=0.02))

    def synchronize(device: torch.device) -> None:
        batches[0] += 1
        if batches[0] % 6 == 0:  # twice a batch
            now[0] += 1.0

    monkeypatch.setattr(calibrating.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(accelerator, "synchronize", synchronize)
    bench.deadline = float("inf")

    def work(amount: float) -> None:
        now[0] += 1e-5 + amount / 1e9

    sizes = [2.0**n for n in range(12, 40)]
    rate = bench.rate("work", iter([(size, functools.partial(work, size)) for size in sizes]))
    assert rate == pytest.approx(1e9, rel=1e-6)
    assert bench.spread["work"] < 1e-6
    assert bench.timed(1.0, functools.partial(work, 0.0)).seconds == pytest.approx(1e-5)


def test_the_cpu_is_measured(devices: Path) -> None:
    before = torch.get_rng_state()
    made = forecast.calibrate(torch.device("cpu"), effort=QUICK)
    assert torch.equal(before, torch.get_rng_state())
    device = made.device
    assert device.kind == "cpu" and device.name == accelerator.model_of(torch.device("cpu"))
    assert {"float32", "bfloat16"} <= device.flops_per_second.keys()
    assert 0 < (device.usable_bytes or 0) < device.memory_bytes == accelerator.host_memory_bytes()
    assert device.workspace_bytes == 0 and 1e-8 < (device.launch_seconds or 0) < 1
    # a matrix product of that rate takes as long as one does here, within what a busy machine does to it
    left = torch.randn(256, 256)
    took = statistics.median(
        calibrating._Bench(torch.device("cpu"), QUICK)._batch(lambda: left @ left, 5) for _ in "abc"
    )
    assert 1e-3 < (2 * 256**3 / device.flops_per_second["float32"]) / took < 1e3
    assert {name.split(" of ")[0] for name in made.spread} == {
        "flops_per_second", "memory_bytes_per_second", "d2h_bytes_per_second", "h2d_bytes_per_second", "launch_seconds",
    }  # fmt: skip
    assert made.samples >= 27 and torch.__version__.startswith(made.environment["torch"])
    made.save(path_of(device.name))
    assert read(path_of(device.name)).device == dataclasses.replace(
        device, calibration=f"measured on {device.name} on {made.date[:10]} ({path_of(device.name)})"
    )


# -------------------------------------------------------------------------------------------- the same device


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 3080 Ti", "rtx-3080-ti"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4060 Ti", "rtx-4060-ti-16gb"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA L40S", "l40s"),
        ("AMD Instinct MI250X", "mi250x-gcd"),
    ],
)
def test_a_card_of_the_catalog_is_known_by_its_drivers_name(driver: str, name: str, devices: Path) -> None:
    card = gpu(name)
    # what a driver calls its memory is a few percent less than what is printed on the box
    made = measured(driver, card, memory_bytes=int(card.memory_bytes * 0.96), usable_bytes=card.memory_bytes // 3)
    made.save(path_of(driver))
    assert [each for each in gpu_names() if card_named(each).calibration] == [name]
    assert card_named(name).usable_bytes == card.memory_bytes // 3
    assert card_named(name).name == name


def test_a_processor_is_known_by_its_name_and_threads(devices: Path) -> None:
    like = dataclasses.replace(gpu("h200"), kind="cpu", compute_capability=None)
    for threads in (1, 2):
        measured(f"A CPU @ 2.20GHz, {threads} threads", like, launch_seconds=threads * 1e-6).save(
            path_of(f"A CPU @ 2.20GHz, {threads} threads")
        )
    for threads in (1, 2):
        made = found(f"A CPU @ 2.20GHz, {threads} threads", kind="cpu", memory_bytes=like.memory_bytes)
        assert made is not None and made.device.launch_seconds == threads * 1e-6
    assert found("A CPU @ 2.20GHz, 4 threads", kind="cpu", memory_bytes=like.memory_bytes) is None


# -------------------------------------------------------------------------------------------- who uses it


def test_check_reckons_with_what_was_measured(devices: Path, tiny: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    estimated = forecast.check(tiny, forecast.device_asked("h200"), search=False)
    assert not estimated.calibration and "the maker's rates" in estimated.error_bar
    card = gpu("h200")
    made = measured("NVIDIA H200", card, launch_seconds=4e-3, flops_per_second={"bfloat16": 1e15})
    made.save(path_of("NVIDIA H200"))
    device = forecast.device_asked("h200")
    assert device.flops_per_second == {"bfloat16": 1e15} == forecast.recording.reached(device).flops_per_second
    answer = forecast.check(tiny, device, search=False)
    assert answer.usable_bytes == int(card.memory_bytes // 2 / (1 + MARGIN))
    assert answer.modes[0].by_category["workspace"] == 3 * 2**20 != estimated.modes[0].by_category["workspace"]
    assert answer.modes[0].step_seconds > 500 * estimated.modes[0].step_seconds
    assert "measured on NVIDIA H200 on 2026-11-28" in answer.calibration and answer.calibration in answer.error_bar
    with using("none"):
        assert forecast.device_asked("h200") == card
    monkeypatch.setattr(forecast.answer, "gpu_names", lambda: ("rtx-4090",))
    with using(path_of("NVIDIA H200")):  # a file that is another card's is refused for one card, not among many
        assert [each.calibration for each in forecast.which_gpus(tiny)] == [""]


def test_a_measured_launch_is_what_an_op_costs_at_least() -> None:
    card = gpu("h200")
    assert op_seconds(0, 0, "float32", card) == LAUNCH_SECONDS
    assert op_seconds(0, 0, "float32", dataclasses.replace(card, launch_seconds=7e-6)) == 7e-6


def test_expandable_segments_are_laid_out_as_such(devices: Path, tiny: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = account.reserved_peak_bytes
    monkeypatch.setattr(account, "reserved_peak_bytes", lambda *a, **k: asked.append(k["expandable"]) or real(*a, **k))
    measured("NVIDIA H200", gpu("h200"), expandable_segments=True).save(path_of("NVIDIA H200"))
    for device in (gpu("h200"), forecast.device_asked("h200")):
        account.bytes_reserved(forecast.trace_for(tiny, device), None)
    assert asked == [False, True]


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch).sum()


def here_measured(**changed: Any) -> Calibration:
    host = torch.device("cpu")
    like = Device(
        name="", memory_bytes=accelerator.memory_bytes(host) or 0, flops_per_second={"float32": 1e11},
        memory_bytes_per_second=1e10, h2d_bytes_per_second=7e9, d2h_bytes_per_second=6e9, source="",
    )  # fmt: skip
    return measured(accelerator.model_of(host), like, **changed)


def test_fit_and_trace_take_the_rates_of_this_machine(devices: Path) -> None:
    model, batch = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(4, 8)
    plain = tightfit.trace(model, batch, loss=_loss)
    assert not plain.calibration
    made = here_measured()
    made.save(path_of(made.device.name))
    for fake in (False, True):
        recorded = tightfit.trace(model, batch, loss=_loss, fake=fake)
        assert (recorded.out_bytes_per_second, recorded.back_bytes_per_second) == (6e9, 7e9)
        assert "measured on" in recorded.calibration and not recorded.copies_beside
    with tightfit.fit(model, batch, "100%", loss=_loss) as applied:
        assert "measured on" in applied.trace.calibration
    with using("none"):
        assert tightfit.trace(model, batch, loss=_loss).out_bytes_per_second == plain.out_bytes_per_second


def test_a_trace_of_before_is_read(devices: Path) -> None:
    model, batch = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(2, 4)
    old = json.loads(dumps(tightfit.trace(model, batch, loss=_loss)))
    del old["calibration"], old["expandable_segments"]
    assert loads(tightfit.Trace, json.dumps(old)).calibration == ""


# -------------------------------------------------------------------------------------------- the command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "calibrate", functools.partial(forecast.calibrate, effort=QUICK))


def test_the_command_writes_what_check_plan_and_doctor_find(
    devices: Path, quick: None, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", model, "--gpu", "here", "--seq", "32", "--no-search"]) == 2
    assert "run tightfit calibrate" in capsys.readouterr().err
    assert main(["calibrate", "--device", "cpu", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    path = Path(document["path"])
    assert path == path_of(accelerator.model_of(torch.device("cpu"))) and path.parent == devices
    assert [each.name for each in devices.iterdir()] == [path.name]  # nothing temporary stays
    assert document["device"] == {**json.loads(path.read_text())["device"]}
    assert json.loads(path.read_text())["schema_version"] == 1

    assert str(path) in forecast.device_asked("here").calibration
    assert main(["check", model, "--calibration", str(path), "--seq", "32", "--no-search"]) == 0
    assert "calibration: measured on" in capsys.readouterr().out
    assert str(path) in str(_environment_record()["calibration"])
    plan = [
        "plan",
        model,
        "--batch",
        "1",
        "--seq",
        "64",
        "--budget",
        "90%",
        "--out",
        str(tmp_path / "p.json"),
    ]
    assert main([*plan, "--json"]) == 0
    assert str(path) in json.loads(capsys.readouterr().out)["calibration"]
    assert main([*plan, "--json", "--calibration", "none"]) == 0
    assert json.loads(capsys.readouterr().out)["calibration"] == ""


def test_the_table_says_what_was_measured(
    devices: Path, quick: None, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.json"
    assert main(["calibrate", "--device", "cpu", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    for row in ("of it usable", "matrix products, float32", "copies to the host", "launch of an op", "--calibration"):
        assert row in said
    assert not devices.exists()


def test_a_place_that_cannot_be_written_is_refused_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(forecast, "calibrate", lambda *_, **__: pytest.fail("it measured"))
    assert main(["calibrate", "--device", "cpu"]) == 2
    assert "cannot write to" in capsys.readouterr().err


def damaged(text: str, **changed: Any) -> str:
    document = json.loads(text)
    document["device"].update(changed)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda text: text[: len(text) // 2], "is not JSON"),
        (lambda text: "[]", "no tightfit calibration"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 99'), "schema version 99"),
        (lambda text: text.replace('"date"', '"dates"'), "unknown key 'dates'"),
        (lambda text: damaged(text, memory_bytes_per_second=-1.0), "memory_bytes_per_second = -1.0"),
        (lambda text: damaged(text, memory_bytes_per_second=1e30), "memory_bytes_per_second = 1e+30: expected"),
        (lambda text: damaged(text, h2d_bytes_per_second=float("inf")), "h2d_bytes_per_second = inf"),
        (lambda text: damaged(text, launch_seconds=3600.0), "launch_seconds = 3600.0"),
        (lambda text: damaged(text, memory_bytes=2**60), f"memory_bytes = {2**60}"),
        (lambda text: damaged(text, name="a card\x1b[2J"), "control characters: 'a card\\x1b[2J'"),
        (lambda text: damaged(text, name=" "), "without the name"),
        (lambda text: text.replace("2026-11-28T12", "2026-99-28T12"), "date = '2026-99-28T12"),
        (lambda text: text.replace('"samples": 100', '"samples": -100'), "samples = -100"),
        (lambda text: text.replace('"estimated": []', '"estimated": ["kind"]'), "'kind' among what was estimated"),
        (lambda text: damaged(text, launch_seconds=None), "launch_seconds = None"),
        (lambda text: damaged(text, flops_per_second={}), "without a rate of matrix products"),
        (lambda text: damaged(text, flops_per_second={"float32": float("nan")}), "nan"),
        (lambda text: damaged(text, workspace_bytes=-1), "workspace_bytes = -1"),
        (lambda text: damaged(text, usable_bytes=2**45), "more usable_bytes than memory_bytes"),
        (lambda text: damaged(text, kind="cuda", name="NVIDIA H200"), "was measured on NVIDIA H200 (cuda)"),
    ],
    ids=[
        "cut",
        "other",
        "schema",
        "key",
        "negative",
        "absurd",
        "infinite",
        "launch",
        "memory",
        "escape",
        "unnamed",
        "date",
        "samples",
        "estimated",
        "none",
        "no-rate",
        "nan",
        "workspace",
        "too-much",
        "foreign",
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line(
    spoil: Any, said: str, devices: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "device.json"
    file.write_text(spoil(dumps(here_measured())))
    arguments = ["plan", model, "--seq", "32", "--batch", "1", "--out", str(tmp_path / "plan.json")]
    assert main([*arguments, "--calibration", str(file)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1] and str(file) in lines[-1]
    assert not [line for line in lines[:-1] if not line.endswith("...")], lines
    assert not (tmp_path / "plan.json").exists()


def test_a_missing_file_and_a_card_that_is_another(
    devices: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", model, "--calibration", str(tmp_path / "no.json")]) == 2
    assert "cannot read the device file" in capsys.readouterr().err
    file = tmp_path / "h200.json"
    measured("NVIDIA H200", gpu("h200")).save(file)
    assert main(["check", model, "--gpu", "rtx-4090", "--calibration", str(file)]) == 2
    assert "was measured on NVIDIA H200 (cuda), and this step is for rtx-4090 (cuda)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["{", dumps(gpu("h200")), "", "\x00\x01"], ids=["cut", "another document", "empty", "no text"]
)
def test_a_broken_file_that_nobody_named_is_left_out_and_said(
    text: str, devices: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It came with an older release, or a disk was full: a step of today must not fail for it."""
    calibration._said.cache_clear()
    devices.mkdir(parents=True)
    path_of("NVIDIA H200").write_text(text)
    assert not card_named("rtx-4090").calibration  # another card's
    assert not caplog.messages
    for _ in range(2):
        assert card_named("h200") == gpu("h200")
    (line,) = caplog.messages  # once, in one line
    assert str(path_of("NVIDIA H200")) in line and "left out: run tightfit calibrate again" in line and "\n" not in line
    with pytest.raises(InvalidInput), using(path_of("NVIDIA H200")):  # who names it is told
        card_named("h200")


def test_fit_doctor_and_check_go_on_beside_a_broken_file(
    devices: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    calibration._said.cache_clear()
    devices.mkdir(parents=True)
    path_of(accelerator.model_of(torch.device("cpu"))).write_text("{")
    module, batch = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(4, 8)
    with tightfit.fit(module, batch, "100%", loss=_loss) as applied:
        assert applied.trace.calibration == ""
    assert _environment_record()["calibration"] in ("", "none", None)
    assert len(caplog.messages) == 1
    assert main(["plan", model, "--seq", "32", "--batch", "1", "--budget", "90%", "--out", str(tmp_path / "p")]) == 0
    capsys.readouterr()


def test_a_part_that_fails_costs_only_itself(devices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_copies(bench: Any, *, outward: bool) -> Any:
        if outward:
            raise RuntimeError("the link is down\nand more of it")
        return real(bench, outward=outward)

    real = calibrating._copies
    monkeypatch.setattr(calibrating, "_copies", no_copies)
    monkeypatch.setattr(calibrating, "_launch_seconds", lambda bench: float("nan"))
    made = forecast.calibrate(torch.device("cpu"), effort=QUICK)
    assert made.estimated == ("d2h_bytes_per_second", "launch_seconds")
    assert made.device.flops_per_second and made.device.h2d_bytes_per_second > 0
    assert len(made.notes) >= 2 and all("\n" not in note for note in made.notes)
    assert any("copies to the host: could not be measured" in n and "the link is down" in n for n in made.notes)
    made.save(path_of(made.device.name))
    again = read(path_of(made.device.name))
    mine = dataclasses.replace(NOMINAL_CPU, d2h_bytes_per_second=123e6, launch_seconds=None)
    over = again.over(mine)
    assert (over.d2h_bytes_per_second, over.launch_seconds) == (123e6, None)  # whoever asks keeps his own
    assert over.h2d_bytes_per_second == made.device.h2d_bytes_per_second
    assert over.name == mine.name and over.calibration


def test_a_device_of_which_nothing_could_be_measured_has_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    for name in ("_launch_seconds", "_product_rates", "_move_rate", "_copies"):
        monkeypatch.setattr(calibrating, name, broken)
    with pytest.raises(Unsupported, match=r"nothing could be measured on cpu: .*an illegal memory access"):
        forecast.calibrate(torch.device("cpu"), effort=QUICK)


def test_usable_memory_is_read_when_all_else_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver takes for kernels and libraries comes with their first use."""
    order: list[str] = []
    for name in ("_workspace_bytes", "_product_rates", "_move_rate", "_usable_bytes"):
        real = getattr(calibrating, name)
        monkeypatch.setattr(calibrating, name, lambda *a, name=name, real=real: (order.append(name), real(*a))[1])
    forecast.calibrate(torch.device("cpu"), effort=QUICK)
    assert order == ["_workspace_bytes", "_product_rates", "_move_rate", "_usable_bytes"]


def test_a_name_is_one_that_a_file_and_a_terminal_can_have(devices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda", 0)
    monkeypatch.setattr(accelerator, "name_of", lambda _: "A card\x1b[31m\n")
    assert accelerator.model_of(card) == "A card [31m"
    for name in ("\u65e5\u672c", "x" * 500):
        made = measured(name, gpu("h200"))
        made.save(path_of(name))
        assert found(name, kind="cuda", memory_bytes=gpu("h200").memory_bytes) is not None


def test_the_variable_names_a_file_or_none(devices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured("NVIDIA H200", gpu("h200")).save(path_of("NVIDIA H200"))
    monkeypatch.setenv(calibration.VARIABLE, "none")
    assert not card_named("h200").calibration
    other = tmp_path / "other.json"
    measured("NVIDIA H200", gpu("h200"), launch_seconds=1.0).save(other)
    monkeypatch.setenv(calibration.VARIABLE, str(other))
    assert card_named("h200").launch_seconds == 1.0
    with using(path_of("NVIDIA H200")):
        assert card_named("h200").launch_seconds == 5e-6
    with contextlib.suppress(KeyError), using("none"):
        assert not card_named("h200").calibration
        raise KeyError
    assert card_named("h200").launch_seconds == 1.0


def test_the_folder_follows_the_standard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("", "relative/path"):
        monkeypatch.setenv("XDG_CONFIG_HOME", given)
        assert calibration.folder() == tmp_path / ".config" / "tightfit" / "devices"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "x"))
    assert path_of("NVIDIA H200") == tmp_path / "x" / "tightfit" / "devices" / "nvidia-h200.json"


def test_drivers_names_are_the_catalogs_own_words_or_given() -> None:
    assert driver_name("h200") == "" and driver_name("h100-sxm") == "NVIDIA H100 80GB HBM3"


# -------------------------------------------------------------------------------------------- on a card

MIB = 2**20


def test_what_a_card_has_left_is_what_its_driver_and_the_caps_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda", 0)
    monkeypatch.setattr(accelerator, "free_bytes", lambda _: 900 * MIB)
    monkeypatch.setattr(accelerator, "reserved_bytes", lambda _: 20 * MIB)
    monkeypatch.setattr(accelerator, "allocator_settings", lambda _: {})
    said: dict[str, str] = {}
    assert calibrating._usable_bytes(card, 1000 * MIB, said) == 920 * MIB and said == {"not_usable": "80.0 MiB"}
    monkeypatch.setattr(accelerator, "allocator_settings", lambda _: {"per_process_memory_fraction": "0.5"})
    assert calibrating._usable_bytes(card, 1000 * MIB, {}) == 500 * MIB
    monkeypatch.setattr(accelerator, "free_bytes", lambda _: None)
    assert calibrating._usable_bytes(card, 1000 * MIB, {}) == 1000 * MIB


def test_what_stays_allocated_is_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    host, counts = torch.device("cpu"), iter([100, 100 + 2 * 8_519_680])
    monkeypatch.setattr(accelerator, "allocated_bytes", lambda _: next(counts))
    backwards = []
    real = calibrating._product_and_back
    monkeypatch.setattr(calibrating, "_product_and_back", lambda *how: (backwards.append(how[1]), real(*how)))
    assert calibrating._workspace_bytes(host) == 2 * 8_519_680
    assert torch.bfloat16 in backwards and torch.float32 in backwards
    monkeypatch.setattr(accelerator, "allocated_bytes", lambda _: None)
    assert calibrating._workspace_bytes(host) is None


def test_rounding_is_seen_on_one_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated, reserved = iter([0, 512]), iter([0, 2 * MIB])
    monkeypatch.setattr(accelerator, "allocated_bytes", lambda _: next(allocated))
    monkeypatch.setattr(accelerator, "reserved_bytes", lambda _: next(reserved))
    assert calibrating._rounding(torch.device("cpu")) == {"granule_bytes": "512", "segment_bytes": str(2 * MIB)}


@pytest.mark.parametrize(
    ("settings", "expandable"),
    [
        ({}, False),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:128, expandable_segments: True"}, True),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True", "expandable_segments": "False"}, False),
    ],
)
def test_expandable_segments_are_what_is_in_force(settings: dict[str, str], expandable: bool) -> None:
    assert calibrating._is_expandable(settings) is expandable
