"""Addresses of the pack's own on ComfyUI's web server, for its own pages only."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

_LONGEST = 1024  # bytes of a request
_FOREIGN = "Only ComfyUI's own page may ask for this."

Answer = Callable[[str, Mapping[str, Any]], Awaitable[tuple[int, str]]]


def add_waiting_route(path: str, answer: Answer) -> None:
    """Answer POST requests at a path and at /api + path by what may wait; do nothing where no server runs.

    Pages of other origins are refused. ComfyUI itself refuses some of them, but none where it was started with
    --enable-cors-header, and on a network only those of browsers that name the site of a page.

    Args:
        path: with one part in braces, as aiohttp has it.
        answer: takes what that part stands for, and the JSON object of the request, {} without one. It returns the
            status of HTTP and a sentence for the user. It runs in the server's thread and must not block it.
    """
    from server import PromptServer  # the web server, which scripts do not start

    server = getattr(PromptServer, "instance", None)
    if server is None or any(getattr(route, "path", "") == path for route in server.routes):
        return  # a second copy of the pack; aiohttp takes a path only once

    async def handle(request: web.Request) -> web.Response:
        if not is_own_page(request.headers):
            return web.json_response({"message": _FOREIGN}, status=403)
        (kind,) = request.match_info.values()
        status, message = await answer(kind, await _content(request))
        return web.json_response({"message": message}, status=status)

    server.routes.post(path)(handle)


def is_own_page(headers: Mapping[str, str]) -> bool:
    """Return whether a request comes from a page of this server, or from a program that is no browser."""
    if site := headers.get("Sec-Fetch-Site"):  # pages cannot set it; browsers send it over HTTPS and to localhost
        return site in ("same-origin", "none")
    origin = headers.get("Origin")
    return origin is None or urlsplit(origin).netloc.lower() == headers.get("Host", "").lower()


async def _content(request: web.Request) -> dict[str, Any]:
    text = await request.content.read(_LONGEST)
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
