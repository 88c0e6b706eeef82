"""The page as a whole, and the endpoints beside it."""

from __future__ import annotations

from typing import Any

import gradio as gr

from backend.downloads import Downloads
from backend.requests import REQUESTS
from ui import endpoints, history, i18n, models, render
from ui.jobs import Jobs
from ui.tabs import TABS

WAITING_CALLS = 1024  # that Gradio holds: the queue of pictures is ours, and refuses sooner
CACHE = (3600, 86400)  # look every hour for copies of files that are older than a day


def build(jobs: Jobs, downloads: Downloads) -> gr.Blocks:
    """The app, not launched: a tab a family, one of what was made, one of models; `/plan`, and an endpoint a
    family."""
    with gr.Blocks(title="Triptych", analytics_enabled=False, delete_cache=CACHE, fill_width=True) as demo:
        gr.HTML(render.LOGO)
        with gr.Tabs(elem_classes="families") as tabs:
            sheets = {sheet.family.family: sheet for sheet in (tab(jobs) for tab in TABS)}

            def restore(page: gr.Request, family: str, settings: dict[str, Any]) -> list[Any]:
                """Open the family's tab, filled with the settings."""
                updates: list[Any] = [gr.Tabs(selected=family)]
                for name, sheet in sheets.items():
                    blank = [gr.skip()] * len(sheet.settings_outputs)
                    updates += sheet.filled(settings, i18n.of(page)) if name == family else blank
                return updates

            filled = [tabs, *(each for sheet in sheets.values() for each in sheet.settings_outputs)]
            history.tab(jobs.studio, restore, filled)
            models.tab(jobs.studio, downloads)
        first, *others = sheets.values()
        first.load(demo.load)  # nobody selects the tab that is open from the start
        for sheet in (first, *others):
            sheet.load(sheet.opened.select)
        for family in REQUESTS.values():
            gr.api(endpoints.endpoint(jobs, family), api_name=family.family, concurrency_limit=None)
        gr.api(endpoints.planner(jobs.studio), api_name="plan", concurrency_limit=4)
    return demo.queue(api_open=False, max_size=WAITING_CALLS, default_concurrency_limit=4)
