"""`tightfit check --site`: the folder with the page "Will it run?"."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tightfit.cli.output import emit, progress_shown
from tightfit.core import InvalidInput, write_text


def refuse_beside_site(given: Mapping[str, Any]) -> None:
    """Raise `InvalidInput` for the first option that is given and says nothing about a site."""
    for option, value in given.items():
        if value:
            raise InvalidInput(f"{option} is about one answer: leave it out with --site")


def write_site(
    out: Path,
    *,
    as_json: bool,
    model: str | None,
    method: str | None,
    seq: int | None,
    gpu: str | None,
    batch: str,
    **options: Any,
) -> None:
    """Answer what is asked, and write data and page to `out`; print where the page is, or the data."""
    from tightfit import forecast
    from tightfit.core import parse_batch
    from tightfit.report import site_page, site_summary

    warnings.simplefilter("ignore")  # what libraries say about themselves is not about what was asked
    setup = forecast.Setup(model="", batch=int(parse_batch(batch)), **options)
    asked = forecast.asked_of(model, method, seq, gpu, setup)
    page = out / "index.html"
    with progress_shown() as say:
        document = forecast.gather(
            out, asked, progress=say, written=lambda document: write_text(page, site_page(document))
        )
    if as_json:
        emit(json.dumps({"path": str(page), "summary": site_summary(document), **document}))
        return
    told = site_summary(document)
    emit(f"{page}")
    emit(
        f"{told['answers']:,} answers ({told['models']} models, {told['cards']} cards): {told['fitting']:,} fit"
        + (f"; {told['refused']} steps cannot be forecast" if told["refused"] else "")
    )
