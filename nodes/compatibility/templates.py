"""What ComfyUI says of the pack's templates: in the order of their names, and nothing where the nodes are not there.

It lists every workflow in the folders of packs, also of packs that could not be loaded, in whatever order the drive
gives them, and the front end keeps that order.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACK_FOLDER = Path(__file__).resolve().parents[2]
LIST = "/workflow_templates"
Offered = dict[str, list[str]]  # names of templates, by the folder of their pack


def withhold_templates() -> None:
    """Take the pack's folders out of the server's list of templates. Does nothing where no server has been made."""
    _change_list(without_own)


def sort_templates() -> None:
    """Sort the pack's templates in the server's list by name. Does nothing where no server has been made."""
    _change_list(with_own_sorted)


def without_own(offered: Offered) -> Offered:
    """Return the list of templates without those of this pack."""
    return {folder: names for folder, names in offered.items() if not _is_own(folder)}


def with_own_sorted(offered: Offered) -> Offered:
    """Return the list of templates with those of this pack in the order of their names."""
    return {folder: sorted(names) if _is_own(folder) else names for folder, names in offered.items()}


def _is_own(folder: str) -> bool:
    import folder_paths

    parents = [Path(parent) for parent in folder_paths.get_folder_paths("custom_nodes")]
    return any((parent / folder).resolve() == PACK_FOLDER for parent in parents)


def _change_list(change: Callable[[Offered], Offered]) -> None:
    # ComfyUI makes its web server before it loads packs; scripts that use ComfyUI's modules make none.
    prompt_server = getattr(sys.modules.get("server"), "PromptServer", None)
    server = getattr(prompt_server, "instance", None)
    if server is not None:
        server.app.middlewares.append(_middleware(change))


def _middleware(change: Callable[[Offered], Offered]) -> Any:
    from aiohttp import web  # comes with ComfyUI's server

    @web.middleware
    async def changed(request: web.Request, handler: Any) -> web.StreamResponse:
        response: web.StreamResponse = await handler(request)
        if request.path.removeprefix("/api") != LIST or not isinstance(response, web.Response):
            return response
        return web.json_response(change(json.loads(response.text or "{}")))

    return changed
