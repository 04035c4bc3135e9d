"""Standard output is the result's: what libraries print, whenever and however they do, lands on standard error."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tightfit.cli import stdout
from tightfit.cli.program import app, main

#: Imported at the start of the process: it prints to descriptor 1 by every way there is, at once and whenever torch,
#: transformers or HiGHS are imported, and HiGHS prints a banner whenever it is made.
NOISY = """
import ctypes, os, sys, importlib.abc, importlib.machinery

def noise(what):
    os.write(1, f"descriptor: {what}\\n".encode())
    ctypes.CDLL(None).printf(b"native, in a buffer: %s\\n", what.encode())
    print(f"python: {what}")

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("torch", "transformers", "highspy", "trl"):
            noise(f"before {name}")
            sys.meta_path.remove(self)
            try:
                spec = importlib.util.find_spec(name)
            finally:
                sys.meta_path.insert(0, self)
            if spec is None or spec.loader is None:
                return spec
            run = spec.loader.exec_module
            def exec_module(module):
                run(module)
                noise(f"after {name}")
                if name == "highspy":
                    made = module.Highs
                    def Highs():
                        noise("Running HiGHS")
                        return made()
                    module.Highs = Highs
            spec.loader.exec_module = exec_module
            return spec
        return None

import importlib.util
if "tightfit" in " ".join(sys.argv) or "-m" in sys.orig_argv:
    sys.meta_path.insert(0, Finder())
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 2, "n_embd": 16, "n_head": 2,
                "n_positions": 64, "vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0,
            }
        )
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("noisy")
    (folder / "sitecustomize.py").write_text(NOISY)
    source = str(Path(stdout.__file__).parents[2])
    return {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(folder), source, os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def shell(line: str, environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    # The command stands as this Python's module: a checkout's .venv need not be on the path.
    command = re.sub(r"^tightfit\b", lambda _: f"{shlex.quote(sys.executable)} -m tightfit", line)
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, env=environment, cwd=folder,
        check=False, timeout=300,
    )  # fmt: skip


def of_each_command(tiny: Path) -> dict[str, str]:
    return {
        "measure": f"tightfit measure {tiny} --batch 2 --seq 16 --budget 95% --repeats 1 --json",
        "plan": f"tightfit plan {tiny} --batch 2 --seq 16 --budget 95% --json",
        "check": f"tightfit check {tiny} --gpu 24GiB --seq 32 --json",
        "doctor": f"tightfit doctor {tiny} --batch 1 --seq 16 --json",
    }


def test_every_command_keeps_libraries_off_its_result() -> None:
    for command in app.registered_commands:
        assert command.cls is not None and command.cls.__name__ == "Command", command.callback


@pytest.mark.parametrize(
    "command", [pytest.param("measure", marks=pytest.mark.slow), "plan", pytest.param("check", marks=pytest.mark.slow),
                pytest.param("doctor", marks=pytest.mark.slow)]
)  # fmt: skip
def test_one_document_whatever_libraries_print(command: str, tiny: Path, noisy: dict[str, str], tmp_path: Path) -> None:
    done = shell(of_each_command(tiny)[command] + " | cat", noisy, tmp_path)
    assert isinstance(json.loads(done.stdout), dict), done.stderr[-2000:]
    for way in ("descriptor: before torch", "native, in a buffer: after torch", "python: after torch"):
        assert way in done.stderr
    assert command == "doctor" or "descriptor: Running HiGHS" in done.stderr


@pytest.mark.slow
def test_train_and_report_print_one_document(noisy: dict[str, str], tmp_path: Path) -> None:
    done = shell("tightfit train --steps 2 --compare-steps 0 --out run --json > out.json", noisy, tmp_path)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    assert json.loads((tmp_path / "out.json").read_text())["budget_bytes"]
    done = shell("tightfit report run --json | cat", noisy, tmp_path)
    assert json.loads(done.stdout)["path"] == "run/report.html"


def test_closed_streams(tiny: Path, noisy: dict[str, str], tmp_path: Path) -> None:
    asked = f"tightfit plan {tiny} --batch 2 --seq 16 --budget 95%"
    done = shell("tightfit --version 2>&-", noisy, tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("tightfit ") and not done.stderr
    done = shell("tightfit --version >&-", noisy, tmp_path)
    assert done.returncode == 0 and not done.stdout
    done = shell(f"{asked} --json --out c.json >&- 2>&-", noisy, tmp_path)
    assert done.returncode == 0 and json.loads((tmp_path / "c.json").read_text())  # nobody else's words in the file


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_traceback(tiny: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(stdout.__file__).parents[2])}
    done = shell("tightfit doctor --json | true", environment, tmp_path)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_result_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(stdout.__file__).parents[2])}
    environment.pop("PYTHONUNBUFFERED", None)  # what waits in a buffer fails once more at exit
    done = shell("tightfit --version > /dev/full", environment, tmp_path)
    assert done.returncode == 1
    assert done.stderr == "tightfit: cannot write the result: No space left on device\n"
    done = shell("tightfit plan no-such-model 2> /dev/full", environment, tmp_path)
    assert done.returncode == 2 and not done.stdout
    (tmp_path / "long.py").write_text(  # longer than a buffer, so that it is written where it is made
        "from tightfit.cli import program, stdout\n"
        "program._run = lambda asked: stdout.results().write('x' * 100_000)\n"
        "raise SystemExit(program.main())\n"
    )
    done = shell(f"{sys.executable} long.py > /dev/full", environment, tmp_path)
    assert done.returncode == 1
    assert done.stderr == "tightfit: cannot write the result: No space left on device\n"


@pytest.mark.parametrize(
    "lost", ["2>&-", *(pytest.param(way, marks=pytest.mark.slow) for way in ("2> /dev/full", "2> >(true)"))]
)
@pytest.mark.parametrize(
    ("budget", "code", "key"),
    [("95%", 0, "choices"), pytest.param("1KiB", 1, "least_bytes", marks=pytest.mark.slow)],
)
def test_what_cannot_be_said_takes_no_result_with_it(
    budget: str, code: int, key: str, lost: str, tiny: Path, tmp_path: Path
) -> None:
    if "full" in lost and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    environment = {**os.environ, "PYTHONPATH": str(Path(stdout.__file__).parents[2])}
    done = shell(f"tightfit plan {tiny} --batch 2 --seq 16 --budget {budget} --json {lost}", environment, tmp_path)
    assert done.returncode == code
    assert key in json.loads(done.stdout)


def test_help_and_version_are_results(noisy: dict[str, str], tmp_path: Path) -> None:
    for line, word in (("--version", "tightfit "), ("--help", "Usage"), ("plan --help", "--explain")):
        done = shell(f"tightfit {line}", noisy, tmp_path)
        assert done.returncode == 0 and word in done.stdout


def test_afterwards_all_is_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    where = [os.fstat(number) for number in (1, 2)]
    streams = sys.stdout, sys.stderr
    main(["--version"])
    with stdout.own(), stdout.for_libraries():
        os.write(1, b"a library\n")
        print("a package")
        print("the result", file=stdout.results())
    assert [os.fstat(number).st_ino for number in (1, 2)] == [each.st_ino for each in where]
    assert (sys.stdout, sys.stderr) == streams and stdout.results() is sys.stdout
    out, err = capfd.readouterr()
    assert "the result" in out and "a library" in err and "a package" in err
    assert "a library" not in out and "a package" not in out


def test_a_caller_that_captures_in_memory_gets_the_result() -> None:
    before, sys.stdout = sys.stdout, io.StringIO()
    try:
        assert main(["--version"]) == 0
        assert sys.stdout.getvalue().startswith("tightfit ")
    finally:
        sys.stdout = before


def test_an_error_inside_leaves_nothing_turned() -> None:
    inode = os.fstat(1).st_ino
    with pytest.raises(KeyError), stdout.own():
        raise KeyError
    assert os.fstat(1).st_ino == inode


def test_shells_complete_commands_and_options(tmp_path: Path) -> None:
    for words, place, expected in (("tightfit me", 1, "measure"), ("tightfit check --me", 2, "--method")):
        environment = {
            **os.environ,
            "_TIGHTFIT_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(place),
        }
        environment["PYTHONPATH"] = str(Path(stdout.__file__).parents[2])
        assert shell("tightfit", environment, tmp_path).stdout.split() == [expected]


def test_without_arguments_it_says_what_to_try(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(stdout.__file__).parents[2])}
    done = shell("tightfit", environment, tmp_path)
    assert "Try: tightfit check llama-2-7b" in done.stdout + done.stderr
