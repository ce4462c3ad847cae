"""Keep ComfyUI from offering templates whose nodes are not there.

It lists every workflow in the folders of packs, also of packs that could not be loaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PACK_FOLDER = Path(__file__).resolve().parents[2]
LIST = "/workflow_templates"


def withhold_templates() -> None:
    """Take the pack's folders out of the server's list of templates. Does nothing where no server has been made."""
    # ComfyUI makes its web server before it loads packs; scripts that use ComfyUI's modules make none.
    prompt_server = getattr(sys.modules.get("server"), "PromptServer", None)
    server = getattr(prompt_server, "instance", None)
    if server is not None:
        server.app.middlewares.append(_middleware())


def _middleware() -> Any:
    from aiohttp import web  # comes with ComfyUI's server

    @web.middleware
    async def without_pack(request: web.Request, handler: Any) -> web.StreamResponse:
        response: web.StreamResponse = await handler(request)
        if request.path.removeprefix("/api") != LIST or not isinstance(response, web.Response):
            return response
        return web.json_response(without_own(json.loads(response.text or "{}")))

    return without_pack


def without_own(offered: dict[str, Any]) -> dict[str, Any]:
    """Return the list of templates, by the folder of the pack, without those of this pack."""
    import folder_paths

    parents = [Path(folder) for folder in folder_paths.get_folder_paths("custom_nodes")]
    return {
        name: names
        for name, names in offered.items()
        if not any((parent / name).resolve() == PACK_FOLDER for parent in parents)
    }
