"""Gather what must travel to a machine with a card and no package registry.

    python benchmarks/gpu/prepare.py                  # fills benchmarks/gpu/carry/, which git ignores
    python benchmarks/gpu/prepare.py --also peft trl  # where the machine lacks these too

The machine has Python 3.12 on Linux x86-64, torch, transformers, accelerate, peft and triton. What it lacks travels as
wheels: tightfit's own, the solver, and bitsandbytes where all of it stays within 60 MiB. Wheels are taken without what
they need, since that is there; what each of them needs is printed, so that nothing is missing without a word.

Exit status: 0, or 1 if a wheel cannot be had or the solver alone is too much.
"""

from __future__ import annotations

import argparse
import email
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CARRY = Path(__file__).resolve().parent / "carry"
MOST_BYTES = 60 << 20
NEEDED, WELCOME = ("highspy",), ("bitsandbytes",)
PYTHON = "3.12"
#: pip takes each of these by its very name.
PLATFORMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28, 31, 34)) + ("manylinux2014_x86_64",)


def download(package: str, folder: Path) -> Path:
    """The newest wheel of `package` for the machine. Raises `SystemExit` where there is none."""
    asked = [f"--platform={name}" for name in PLATFORMS]
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps",
            "--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", *asked,
            f"--dest={folder}", package,
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise SystemExit(f"no wheel of {package} for Python {PYTHON} on Linux x86-64: {last}")
    return found[0]


def own(folder: Path) -> Path:
    """tightfit's own wheel, of this checkout."""
    done = subprocess.run(
        [
            sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps",
            "--no-build-isolation", f"--wheel-dir={folder}", str(ROOT),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = sorted(folder.glob("tightfit-*.whl"))
    if done.returncode or not found:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise SystemExit(f"tightfit's own wheel could not be built: {last}")
    return found[0]


def needs(wheel: Path) -> list[str]:
    """What a wheel says that it needs, extras left out."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        said = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    return [each for each in said if "extra ==" not in each]


def gather(needed: list[str], welcome: list[str], carry: Path, most_bytes: int) -> list[str]:
    """Fill `carry`; what is welcome is left out, and named, where it would be too much."""
    left_out = []
    with tempfile.TemporaryDirectory() as temporary:
        chosen = [own(Path(temporary))]
        for package in [*needed, *welcome]:
            folder = Path(temporary) / package
            folder.mkdir()
            wheel = download(package, folder)
            if sum(each.stat().st_size for each in [*chosen, wheel]) <= most_bytes:
                chosen.append(wheel)
            elif package in needed:
                raise SystemExit(f"with {package} it is more than {most_bytes >> 20} MiB")
            else:
                left_out.append(package)
        shutil.rmtree(carry, ignore_errors=True)
        carry.mkdir(parents=True)
        for wheel in chosen:
            shutil.move(wheel, carry / wheel.name)
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    (carry / "commit").write_text(done.stdout, encoding="utf-8")  # the card's machine may have no git
    return left_out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--also", nargs="*", default=[], metavar="PACKAGE", help="packages that the machine lacks too")
    parser.add_argument("--carry", type=Path, default=CARRY, help="the folder to fill (default: %(default)s)")
    given = parser.parse_args(arguments)
    left_out = gather([*NEEDED, *given.also], list(WELCOME), given.carry, MOST_BYTES)
    for wheel in sorted(given.carry.glob("*.whl")):
        print(f"{wheel.stat().st_size / 2**20:6.1f} MiB  {wheel.name}  needs {', '.join(needs(wheel)) or 'nothing'}")
    for package in left_out:
        print(f"left out, since all of it would be more than {MOST_BYTES >> 20} MiB: {package}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
