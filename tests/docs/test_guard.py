"""The job for GitHub Actions in docs/how_to/will_it_fit.md: its YAML is read, and its `tightfit` command is run on a
folder with a small config, below the limit and above it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.docs.test_pages import blocks_of, unknown_word

#: The page's model has a folder of its own; this one is as small as a test needs.
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256, "max_position_embeddings": 4096,
}  # fmt: skip


def job() -> dict[str, Any]:
    (block,) = [block for block in blocks_of("docs/how_to/will_it_fit.md") if block.title == "memory.yml"]
    read: dict[str, Any] = yaml.safe_load(block.source)
    return read


def guard() -> str:
    (command,) = [s["run"] for s in job()["jobs"]["fits"]["steps"] if str(s.get("run", "")).startswith("tightfit ")]
    return str(command)


def test_the_job_is_one_that_github_would_run() -> None:
    read = job()
    assert read["name"] == "memory" and "pull_request" in (read.get("on") or read[True])  # YAML 1.1 reads `on` as true
    (fits,) = read["jobs"].values()
    assert fits["runs-on"] == "ubuntu-latest"
    steps = fits["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    assert [step["uses"].partition("@")[0] for step in steps if "uses" in step] == [
        "actions/checkout", "actions/setup-python",
    ]  # fmt: skip
    assert unknown_word(guard()) is None
    asked = shlex.split(guard())
    assert asked[:3] == ["tightfit", "check", "./model"] and asked[asked.index("--max") + 1] == "22GiB"


@pytest.mark.slow
def test_its_command_passes_and_fails_by_its_exit_status(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    command = [sys.executable, "-m", *shlex.split(guard())]
    for limit, status in (("22GiB", 0), ("1MiB", 1)):
        command[command.index("--max") + 1] = limit
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == status, (limit, done.stdout[-2000:], done.stderr[-2000:])
