"""README.md, CONTRIBUTING.md and every page of docs/ are executed: their Python runs, their commands run, and what is
not run says why.

A page is one story, told in order: its ```python blocks are one program, its ```sh and ```console blocks run after it,
in one temporary folder. A block with `title="sft.yaml"` is a file of that folder. `tightfit` and `python` lines run (a
pipe or a redirection after them too); `make` lines are checked with `make -n`, because running them would call this
test again; `cd`, `git`, `pip` and activating an environment are what a reader does once. Any other command fails the
test, and so does a YAML block that is no file: nothing goes untested without a word. `examples/` and `benchmarks/` of
the checkout can be reached from the temporary folder.

Comments right before a block steer it:

    <!-- test: slow -->         only with -m slow, which runs the whole page
    <!-- test: skip REASON -->  not run; the reason is shown
    <!-- test: exit 1 -->       the last command's exit status is 1 ("the answer is no")
    <!-- test: needs PACKAGE -->  a program of its own (or commands) beside the page's files, run with -m slow where
                                  that package can be imported
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.fsdp import FSDPModule

ROOT = Path(__file__).parents[2]
FOUND = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
PAGES = {path.relative_to(ROOT).as_posix(): path for path in FOUND}

PYTHON = frozenset({"python", "py"})
SHELL = frozenset({"sh", "bash", "shell", "console"})
FILES = frozenset({"yaml", "yml", "toml", "json"})

SECONDS_ALLOWED = 180
SLOW_SECONDS_ALLOWED = 1800

DIRECTIVE = re.compile(r"\s*<!--\s*test:\s*(?P<verb>\S+)\s*(?P<rest>.*?)\s*-->\s*")
FENCE = re.compile(r"(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})\s*(?P<info>[^`]*)")
TITLE = re.compile(r'title="([^"/]+)"')


# --------------------------------------------------------------------------------------------- parser


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One fenced block: `line` is the number of its opening fence, `source` its text without indentation."""

    language: str
    line: int
    source: str
    title: str | None = None
    slow: bool = False
    skip: str | None = None
    exit_status: int = 0
    needs: str | None = None  # a package that the project does not install


def parse(text: str) -> list[Block]:
    """Every fenced block of a Markdown text. Raises `ValueError` on an unclosed fence and on a stray directive."""
    blocks: list[Block] = []
    directives: list[tuple[int, str, str]] = []
    lines = enumerate(text.splitlines(), start=1)
    for number, line in lines:
        if directive := DIRECTIVE.fullmatch(line):
            directives.append((number, directive["verb"], directive["rest"]))
        elif opening := FENCE.fullmatch(line):
            body = []
            closing = re.compile(rf"\s*{re.escape(opening['fence'][0])}{{{len(opening['fence'])},}}\s*")
            for _, inner in lines:
                if closing.fullmatch(inner):
                    break
                body.append(inner)
            else:
                raise ValueError(f"line {number}: this block is never closed")
            blocks.append(_block(opening["info"], number, textwrap.dedent("\n".join(body)), directives))
            directives = []
        elif line.strip() and directives:
            raise ValueError(f"line {directives[-1][0]}: a test comment must stand right before a block")
    if directives:
        raise ValueError(f"line {directives[-1][0]}: a test comment must stand right before a block")
    return blocks


def _block(info: str, line: int, source: str, directives: list[tuple[int, str, str]]) -> Block:
    language, title = (info.split() or [""])[0].lower(), TITLE.search(info)
    slow, skip, exit_status, needs = False, None, 0, None
    for number, verb, rest in directives:
        if verb == "slow" and not rest:
            slow = True
        elif verb == "skip" and rest:
            skip = rest
        elif verb == "exit" and rest.isdigit():
            exit_status = int(rest)
        elif verb == "needs" and rest.isidentifier() and language in PYTHON | SHELL:
            needs = rest
        else:
            raise ValueError(
                f"line {number}: expected `slow`, `skip REASON`, `exit N` or `needs PACKAGE`, found `{verb} {rest}`"
            )
    if language in PYTHON and exit_status:
        raise ValueError(f"line {line}: `exit N` is for commands")
    return Block(
        language=language, line=line, source=source, title=title and title[1], slow=slow, skip=skip,
        exit_status=exit_status, needs=needs,
    )  # fmt: skip


def commands(block: Block) -> list[str]:
    """The commands of a shell block: without comments and output, with continued lines joined."""
    found: list[str] = []
    continues = False
    for line in block.source.splitlines():
        text = line.rstrip()
        if continues:
            text = text.strip().removeprefix("> ")
        elif block.language == "console":
            if not text.startswith("$ "):
                continue  # what the program printed
            text = text.removeprefix("$ ")
        elif not text.strip() or text.lstrip().startswith("#"):
            continue
        joined = text.removesuffix("\\").strip()
        if continues:
            found[-1] = f"{found[-1]} {joined}"
        else:
            found.append(joined)
        continues = text.endswith("\\")
    return found


def treatment(command: str) -> str:
    """What the test does with a command: `run`, `dry run`, `leave` (a reader's set-up) or `unknown`."""
    words = command.split()
    while words and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=\S*", words[0]):  # VARIABLE=value before the command
        words.pop(0)
    name = words[0].removeprefix(".venv/bin/") if words else ""
    if name in {"tightfit", "python", "python3", "axolotl", "swift"}:
        # `python -m venv .venv` and `python -m pip install` are set-up, whoever calls them.
        return "leave" if words[1:2] == ["-m"] and words[2:3] in (["venv"], ["pip"]) else "run"
    if name == "make":
        return "dry run"
    return "leave" if name in {"cd", "git", "pip", "pip3", "source", "."} else "unknown"


# ------------------------------------------------------------------------------------- pages, executed


def blocks_of(page: str) -> list[Block]:
    """What there is to execute on a page."""
    blocks = parse(PAGES[page].read_text(encoding="utf-8")) if PAGES[page].exists() else []
    return [block for block in blocks if block.title or block.language in PYTHON | SHELL | FILES]


def stories() -> Iterator[object]:
    """(page, with its slow blocks?) for each page that has something to run, as pytest parameters."""
    for page in PAGES:
        todo = [block for block in blocks_of(page) if block.skip is None and block.needs is None]
        if any(not block.slow and not block.title for block in todo):
            yield pytest.param(page, False, id=page)
        if any(block.slow for block in todo):
            yield pytest.param(page, True, id=f"{page}-slow", marks=pytest.mark.slow)


def left_out() -> Iterator[object]:
    for page in PAGES:
        for block in blocks_of(page):
            if block.skip is not None:
                reason = f"{page} line {block.line}: {block.skip}"
                yield pytest.param(block, id=f"{page}-{block.line}", marks=pytest.mark.skip(reason=reason))


def run(arguments: list[str], folder: Path, where: str, slow: bool = False) -> subprocess.CompletedProcess[str]:
    """Run in `folder` with this environment's programs first on the path, away from the network."""
    for name in ("examples", "benchmarks"):
        if (ROOT / name).is_dir() and not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    environment = os.environ | {
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
        "HF_HUB_OFFLINE": "1",  # a block that needs the hub would hang here and must be marked
        "PYTHONUNBUFFERED": "1",
    }
    allowed = SLOW_SECONDS_ALLOWED if slow else SECONDS_ALLOWED
    try:
        return subprocess.run(
            arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=allowed, check=False
        )
    except subprocess.TimeoutExpired:
        advice = "" if slow else "; mark the block with <!-- test: slow -->"
        pytest.fail(f"{where}: still running after {allowed} s{advice}")


def program(blocks: list[Block]) -> str:
    """The blocks as one program, each at the line that it has on the page, so that a traceback names the page's."""
    lines: list[str] = []
    for block in blocks:
        lines += [""] * (block.line - len(lines))
        lines += block.source.splitlines()
    return "\n".join(lines) + "\n"


def tell(page: str, blocks: list[Block], folder: Path) -> None:
    """Write a page's files, run its Python, then its commands; fails at the first that does not do as it should."""
    for block in blocks:
        if block.title:
            (folder / block.title).write_text(block.source + "\n", encoding="utf-8")
        else:
            assert block.language not in FILES, f'{page} line {block.line}: give it title="its file\'s name"'
    if python := [block for block in blocks if block.language in PYTHON and not block.title]:
        script = folder / "page.py"
        script.write_text(program(python), encoding="utf-8")
        done = run([sys.executable, str(script)], folder, page, any(block.slow for block in python))
        assert done.returncode == 0, f"{page}\n{done.stdout}\n{done.stderr}"
    for block in blocks:
        if block.language in SHELL and not block.title:
            run_commands(page, block, folder)


def run_commands(page: str, block: Block, folder: Path) -> None:
    todo = commands(block)
    assert todo, f"{page} line {block.line}: a {block.language} block without a command"
    for command in todo:
        expected = block.exit_status if command == todo[-1] else 0
        action, where = treatment(command), f"{page} line {block.line}"
        assert action != "unknown", (
            f"{where}: `{command}` is no command this test knows; mark the block with <!-- test: skip REASON -->"
        )
        if action == "dry run":
            dry = command.split("#", 1)[0].replace("make", "make --dry-run", 1)
            done = run(["bash", "-c", f"cd '{ROOT}' && {dry}"], folder, where, block.slow)
            assert done.returncode == 0, f"{where}: `{command}`\n{done.stderr}"
        elif action == "run":
            here = command.replace(".venv/bin/", "", 1)
            done = run(["bash", "-o", "pipefail", "-c", here], folder, where, block.slow)
            assert done.returncode == expected, (
                f"{where}: `{command}` ended with {done.returncode}, expected {expected}\n{done.stdout}\n{done.stderr}"
            )


def test_readme_has_a_python_block() -> None:
    assert any(block.language in PYTHON for block in blocks_of("README.md"))


@pytest.mark.parametrize(("page", "slow"), list(stories()))
def test_page(page: str, slow: bool, tmp_path: Path) -> None:
    if page == "docs/how_to/several_gpus.md" and not hasattr(FSDPModule, "reset_iter_state"):
        pytest.skip("torch before 2.13 cannot take back a step of FSDP2")
    todo = [block for block in blocks_of(page) if block.skip is None and block.needs is None]
    tell(page, [block for block in todo if slow or not block.slow], tmp_path)


def of_packages() -> Iterator[object]:
    for page in PAGES:
        for block in blocks_of(page):
            if block.needs is not None:
                yield pytest.param(page, block, id=f"{page}-{block.needs}")


@pytest.mark.slow
@pytest.mark.parametrize(("page", "block"), list(of_packages()))
def test_block_that_needs_a_package(page: str, block: Block, tmp_path: Path) -> None:
    if importlib.util.find_spec(str(block.needs)) is None:
        pytest.skip(f"{page} line {block.line} needs {block.needs}, which is not installed here")
    files = [each for each in blocks_of(page) if each.title and each.needs is None]
    tell(page, [*files, block], tmp_path)


def test_a_block_that_needs_a_package_is_found_and_can_fail(tmp_path: Path) -> None:
    text = "<!-- test: needs json -->\n```python\nimport json\nassert json.loads('1') == {}\n```\n"
    (block,) = parse(text.format(1))
    assert block.needs == "json"
    tell("a page", [block], tmp_path)
    with pytest.raises(AssertionError, match="line 4"):
        tell("a page", parse(text.format(2)), tmp_path)
    assert len(list(of_packages())) >= 4


@pytest.mark.parametrize("block", list(left_out()))
def test_left_out(block: Block) -> None:
    raise AssertionError(f"{block} is marked as skipped")


# ---------------------------------------------------------------------------------- commands in sentences

INLINE = re.compile(r"`(tightfit(?: [^`]+)?)`")


def inline_commands() -> list[tuple[str, str]]:
    """(page, command) for each `tightfit ...` in running text; generated reference pages say what the program says."""
    found = []
    for page, path in PAGES.items():
        text = re.sub(r"(?ms)^(```|~~~).*?^\1$", "", path.read_text(encoding="utf-8"))
        found += [(page, command) for command in INLINE.findall(text) if page != "docs/reference.md"]
    return sorted(set(found))


def unknown_word(command: str) -> str | None:
    """The first word of `tightfit COMMAND ... --option` that the program does not know."""
    import typer.main

    from tightfit.cli.program import app

    root: Any = typer.main.get_command(app)
    words, chosen = command.split()[1:], root
    if words and not words[0].startswith("--"):
        chosen = root.commands.get(words[0])
        if chosen is None:
            return words[0]
    known = {name for option in chosen.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
    takes_more = words[:1] == ["train"]  # TRL's options
    options = [word.split("=")[0] for word in words if word.startswith("--")]
    return next((option for option in options if option not in known and not takes_more), None)


def test_commands_in_sentences_exist() -> None:
    found = inline_commands()
    assert len(found) > 20
    wrong = [f"{page}: `{command}`: {word}" for page, command in found if (word := unknown_word(command))]
    assert not wrong, "\n".join(wrong)


def test_a_command_that_is_none_is_found() -> None:
    assert unknown_word("tightfit check gpt2 --gpu all") is None
    assert unknown_word("tightfit chekc gpt2") == "chekc"
    assert unknown_word("tightfit check gpt2 --card all") == "--card"


# ------------------------------------------------------------------------------- the parser's own tests


def test_parse_finds_blocks_with_language_line_and_text() -> None:
    text = "# Title\n\n```python\nx = 1\n\ny = 2\n```\n\ntext\n\n~~~sh title\nls\n~~~\n\n```\nplain\n```\n"
    assert parse(text) == [
        Block(language="python", line=3, source="x = 1\n\ny = 2"),
        Block(language="sh", line=11, source="ls"),
        Block(language="", line=15, source="plain"),
    ]


def test_parse_removes_the_indentation_of_a_list_item() -> None:
    assert parse("1. do\n\n    ```python\n    if x:\n        y()\n    ```\n")[0].source == "if x:\n    y()"


def test_a_longer_fence_holds_a_shorter_one() -> None:
    (block,) = parse("````md\n```python\nx\n```\n````\n")
    assert (block.language, block.source) == ("md", "```python\nx\n```")


def test_inline_backticks_are_no_fence() -> None:
    assert parse("```not a fence``` in a line\n") == []


def test_directives_apply_to_the_next_block_only() -> None:
    text = (
        "<!-- test: slow -->\n<!-- test: exit 1 -->\n\n```sh\na\n```\n<!-- test: skip needs a GPU -->\n```sh\nb\n```\n"
    )
    first, second = parse(text + "```sh\nc\n```\n")[:2]
    assert (first.slow, first.exit_status, first.skip) == (True, 1, None)
    assert (second.slow, second.exit_status, second.skip) == (False, 0, "needs a GPU")
    assert parse(text + "```sh\nc\n```\n")[2] == Block(language="sh", line=11, source="c")


def test_a_directive_inside_a_block_is_text() -> None:
    assert parse("```md\n<!-- test: slow -->\n```\n") == [Block(language="md", line=1, source="<!-- test: slow -->")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nx = 1\n", "line 1: this block is never closed"),
        ("<!-- test: slow -->\ntext\n```sh\na\n```\n", "line 1: a test comment must stand right before"),
        ("text\n<!-- test: slow -->\n", "line 2: a test comment must stand right before"),
        ("<!-- test: skip -->\n```sh\na\n```\n", "line 1: expected `slow`, `skip REASON`, `exit N` or `needs PACKAGE`"),
        ("<!-- test: quick -->\n```sh\na\n```\n", "found `quick"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(text)


def test_commands_of_a_script() -> None:
    block = Block(
        language="sh", line=1, source="# first\ntightfit doctor\n\ntightfit check gpt2 \\\n    --gpu all\nmake test\n"
    )
    assert commands(block) == ["tightfit doctor", "tightfit check gpt2 --gpu all", "make test"]


def test_commands_of_a_session_leave_out_the_output() -> None:
    block = Block(
        language="console", line=1, source="$ tightfit plan gpt2 \\\n>   --seq 8\nstatus optimal\n$ make lint\nok"
    )
    assert commands(block) == ["tightfit plan gpt2 --seq 8", "make lint"]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("tightfit doctor", "run"),
        (".venv/bin/tightfit doctor --json > out.json", "run"),
        ("OMP_NUM_THREADS=1 tightfit doctor", "run"),
        ("python examples/lora.py", "run"),
        ("python -m venv .venv", "leave"),
        ("python3 -m pip install tightfit", "leave"),
        ("make demo", "dry run"),
        ("make test ARGS=-x", "dry run"),
        ("git clone https://example.org/tightfit", "leave"),
        ("pip install -c constraints.txt torch", "leave"),
        (". .venv/bin/activate", "leave"),
        ("rm -rf /", "unknown"),
        ("", "unknown"),
    ],
)
def test_treatment(command: str, expected: str) -> None:
    assert treatment(command) == expected


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_an_unknown_make_target_is_found(tmp_path: Path) -> None:
    block = Block(language="sh", line=1, source="make no-such-target")
    with pytest.raises(AssertionError, match="no-such-target"):
        tell("a page", [block], tmp_path)


def test_a_program_keeps_the_lines_of_its_page() -> None:
    text = "# Title\n\n```python\nx = 1\n```\ntext\n```python\ny = x\n```\n"
    assert program(parse(text)).splitlines()[3::4] == ["x = 1", "y = x"]


def test_blocks_go_on_from_those_before_and_a_failure_names_its_line(tmp_path: Path) -> None:
    good = parse("```python\nx = 1\n```\n```python\nassert x == 1\n```\n")
    tell("a page", good, tmp_path)
    with pytest.raises(AssertionError, match="line 5"):
        tell("a page", parse("```python\nx = 2\n```\n```python\nassert x == 1\n```\n"), tmp_path)


def test_a_titled_block_is_a_file_for_the_commands(tmp_path: Path) -> None:
    check = """python -c 'assert open("some.yaml").read() == "a: 1\\n"'"""
    text = f'```yaml title="some.yaml"\na: 1\n```\n```sh\n{check}\n```\n'
    tell("a page", parse(text), tmp_path)
    with pytest.raises(AssertionError, match="line 1: give it title"):
        tell("a page", parse("```yaml\na: 1\n```\n"), tmp_path)


def test_a_wrong_exit_status_is_found(tmp_path: Path) -> None:
    command = "```sh\npython -c 'raise SystemExit(1)'\n```\n"
    tell("a page", parse("<!-- test: exit 1 -->\n" + command), tmp_path)
    with pytest.raises(AssertionError, match="ended with 1, expected 0"):
        tell("a page", parse(command), tmp_path)
