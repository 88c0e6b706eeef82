"""The endpoints as tools of the Model Context Protocol (MCP).

Gradio's own server does most of it. Here its tools tell how far they are, hand out the pictures themselves,
which programs without our cookie could not fetch, and log in where a login is asked for.
"""

from __future__ import annotations

import base64
import json
import threading
from pathlib import Path
from typing import Any

from gradio import mcp
from gradio_client import Client
from gradio_client.utils import OutputUpdate

PASSED_ON = ("accept-language", "x-ip-token")  # of the caller's headers; the second is what a Space counts by


class Tools(mcp.GradioMCPServer):
    """Calls go through the page's own front door, as one client, on behalf of who asked."""

    def _get_or_create_client(self) -> Client:
        if self._client_instance is None:
            logins: Any = self.blocks.auth or [None]  # a list of the one
            self._client_instance = Client(
                self.local_url or "",
                auth=logins[0],
                download_files=False,
                verbose=False,
                analytics_enabled=False,
                headers={"x-gradio-user": "mcp"},
                _skip_components=False,
            )
        return self._client_instance

    def _prepare_tool_call_args(
        self, name: str, arguments: dict[str, Any]
    ) -> tuple[str, list[Any], Any, Any]:
        endpoint, values, headers, function = super()._prepare_tool_call_args(name, arguments)
        asker: Any = self.mcp_server.request_context.request
        kept = {name: headers[name] for name in PASSED_ON if name in headers}
        if asker.client is not None:
            kept["x-forwarded-for"] = asker.client.host
        return endpoint, values, kept, function

    async def _execute_tool_without_progress(self, job: Any) -> list[Any]:
        return await self._follow(job, None)

    async def _execute_tool_with_progress(self, job: Any, progress_token: str | int) -> Any:
        return await self._follow(job, progress_token)

    async def _follow(self, job: Any, token: str | int | None) -> list[Any]:
        """What the job comes to; on the way the caller is told each step."""
        context, count, over = self.mcp_server.request_context, 0, False
        try:
            async for update in job:
                if not isinstance(update, OutputUpdate):
                    continue
                if update.final:
                    over = True
                    return _data(update)
                told = _told(update.outputs[-1])
                if told and token is not None:
                    count += 1  # it has to grow; the steps of each phase begin anew
                    request = str(context.request_id)
                    await context.session.send_progress_notification(
                        token, count, message=told, related_request_id=request
                    )
        finally:
            if not over:  # the caller is gone; it is this very loop that has to answer the client's request
                threading.Thread(target=job.cancel, daemon=True).start()
        raise job.exception() or RuntimeError("The server stopped.")

    def postprocess_output_data(self, data: Any, root_url: str) -> list[Any]:
        contents: list[Any] = []
        for output in data:
            if isinstance(output, list):  # the files
                contents += map(self._picture, output)
            else:
                contents.append(self.types.TextContent(type="text", text=json.dumps(output)))
        return contents

    def _picture(self, file: dict[str, Any]) -> Any:
        """The file as it is: with its settings in it."""
        content = base64.b64encode(Path(file["path"]).read_bytes()).decode()
        return self.types.ImageContent(type="image", data=content, mimeType="image/png")


def _data(update: OutputUpdate) -> list[Any]:
    outputs: Any = update.outputs
    if not update.success:
        raise RuntimeError(outputs.get("error") or "The request failed.")
    return outputs["data"]


def _told(progress: Any) -> str | None:
    """The progress in words; None for what is none, as the result itself or an error."""
    if not isinstance(progress, dict) or "phase" not in progress:
        return None
    phase, step, steps, left = (progress[name] for name in ("phase", "step", "steps", "eta_s"))
    if phase == "waiting":
        return f"waiting, {steps} before it" if steps else phase
    told = f"{phase}: {step} of {steps}" if steps else phase
    return f"{told}, {left:.0f} s left" if left else told


def install() -> None:
    """Have Gradio make this server when it launches with one."""
    mcp.GradioMCPServer = Tools
