"""What the tests of both pages share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def opened_html(chromium: Any, tmp_path: Path) -> Any:
    """Open a page's text in a tab of its own."""

    def open_it(text: str, **how: Any) -> Any:
        file = tmp_path / "page.html"
        file.write_text(text, encoding="utf-8")
        tab = chromium.page()
        tab.open(file, **how)
        return tab

    return open_it
