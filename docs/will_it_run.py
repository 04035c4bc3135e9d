"""A hook of the site's generator: the page "Will it run?" is drawn from `will_it_run/answers.json` in each build.

Invariant: the page is not in the repository, only its data is, which `tightfit check --site docs/will_it_run` adds to.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ANSWERS = Path(__file__).with_name("will_it_run") / "answers.json"
PAGE = "will_it_run/index.html"


def on_files(files: Any, *, config: Any) -> Any:
    from mkdocs.structure.files import File

    from tightfit.report import site_page

    document = json.loads(ANSWERS.read_text(encoding="utf-8"))
    there = files.get_file_from_path(PAGE)
    if there is not None:  # what `check --site` left beside the data
        files.remove(there)
    files.append(File.generated(config, PAGE, content=site_page(document)))
    return files
