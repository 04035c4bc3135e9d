"""Write `docs/cli.md` from the program's own `--help`, or say that it is stale.

Invariant: the page depends on the program alone, not on the terminal: the width is fixed and colour is off.
Refused: nothing is edited by hand in the page; `--check` exits 1 when the file differs from what would be written.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).with_name("cli.md")
WIDTH = 100
HEAD = """\
<!-- Written by docs/generate.py (`make docs`); do not edit. -->

# Command line
"""


def fix_terminal() -> None:
    """Pin width and colour; must run before typer is imported, because typer reads them on import."""
    os.environ.update(TERMINAL_WIDTH=str(WIDTH), COLUMNS=str(WIDTH), NO_COLOR="1", TERM="dumb")
    os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):
        os.environ.pop(name, None)


def help_texts() -> Iterator[tuple[str, str]]:
    """(`tightfit measure`, its help text) for the program and each of its commands, in the program's order."""
    import typer.main
    from typer.testing import CliRunner

    from tightfit.cli import app

    runner = CliRunner()
    commands = getattr(typer.main.get_command(app), "commands", {})
    visible = [name for name, command in commands.items() if not command.hidden]
    for arguments in ([], *([name] for name in visible)):
        result = runner.invoke(app, [*arguments, "--help"], prog_name="tightfit")
        if result.exit_code != 0:
            raise SystemExit(f"`tightfit {' '.join(arguments)} --help` failed: {result.output}") from result.exception
        yield " ".join(["tightfit", *arguments]), result.output


def render() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, text in help_texts():
        body = "\n".join(line.rstrip() for line in text.strip("\n").splitlines())
        parts.append(f"\n## `{title}`\n\n```text\n{body}\n```\n")
    return "".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/cli.md from the program.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is stale")
    check = parser.parse_args().check
    fix_terminal()
    page = render()
    on_disk = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if check:
        if page == on_disk:
            return 0
        difference = difflib.unified_diff(
            on_disk.splitlines(), page.splitlines(), str(PAGE), "what the program says", lineterm=""
        )
        print("\n".join(difference))
        print(f"{PAGE} is stale: run `make docs`", file=sys.stderr)
        return 1
    if page != on_disk:
        PAGE.write_text(page, encoding="utf-8")
    print(f"{PAGE}: {'unchanged' if page == on_disk else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
