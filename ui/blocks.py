"""The page as a whole, and the endpoints beside it."""

from __future__ import annotations

import gradio as gr

from backend.requests import REQUESTS
from ui import handlers, models, render
from ui.jobs import Jobs
from ui.tabs import DEVICE, TABS

QUEUE = 64  # requests waiting at once, the page's and the API's together; more are told that it is full
CACHE = (3600, 86400)  # look every hour for copies of files that are older than a day


def build(jobs: Jobs) -> gr.Blocks:
    """The app, not launched: one tab a family and one for models, `/plan`, and one endpoint a family."""
    with gr.Blocks(title="Triptych", analytics_enabled=False, delete_cache=CACHE, fill_width=True) as demo:
        gr.HTML(render.LOGO)
        with gr.Tabs(elem_classes="families"):
            for tab in TABS:
                tab(jobs)
            models.tab(jobs.studio)
        for family in REQUESTS.values():
            gr.api(handlers.endpoint(jobs, family), api_name=family.family, **DEVICE)
        gr.api(handlers.planner(jobs.studio), api_name="plan", concurrency_limit=4)
    return demo.queue(api_open=False, max_size=QUEUE, default_concurrency_limit=4)
