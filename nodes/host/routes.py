"""Routes of the pack on ComfyUI's web server, for its own pages alone."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from aiohttp import web

Answer = dict[str, Any] | bytes  # of a route: JSON, or an image in WebP
Work = Callable[[Mapping[str, Any]], Answer]  # takes the values of the query or of the JSON that was sent
Command = Callable[[str, Mapping[str, Any]], Awaitable[tuple[int, str]]]

_Handler = Callable[[web.Request], Awaitable[web.Response]]
_FOREIGN = "Only ComfyUI's own page may ask for this."
_LONGEST = 1024  # bytes of a command's JSON
_AT_ONCE = 2  # requests that are worked on; each may decode an image
_IMAGE_AGE = "private, max-age=86400"  # the address of an image changes with it


def add_route(method: Literal["GET", "POST"], path: str, work: Work) -> None:
    """Add a route that does its work in a thread, so that the server goes on meanwhile.

    A ValueError becomes the sentence in the answer's "error", with the status in the error's attribute `status`, or
    400. Requests that are not JSON are refused.

    Args:
        method: what the browser asks with.
        path: below the server's address, such as "/aclora/dataset".
        work: called with the values that were sent.
    """
    at_once: list[asyncio.Semaphore] = []  # made in the server's event loop

    async def handle(request: web.Request) -> web.Response:
        if not at_once:
            at_once.append(asyncio.Semaphore(_AT_ONCE))
        try:
            values = await _sent(request) if method == "POST" else dict(request.query)
            async with at_once[0]:
                answer = await asyncio.to_thread(work, values)
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=getattr(error, "status", 400))
        if isinstance(answer, bytes):
            return web.Response(body=answer, content_type="image/webp", headers={"Cache-Control": _IMAGE_AGE})
        return web.json_response(answer)

    _add(method, path, handle)


def add_command(path: str, command: Command) -> None:
    """Answer POST requests at a path with a status of HTTP and a sentence for the user.

    Args:
        path: with one part in braces, as aiohttp has it.
        command: takes what that part stands for, and the JSON object of the request, {} without one. It runs in the
            server's thread and must not block it.
    """

    async def handle(request: web.Request) -> web.Response:
        (kind,) = request.match_info.values()
        status, message = await command(kind, await _short_content(request))
        return web.json_response({"message": message}, status=status)

    _add("POST", path, handle)


def is_own_page(headers: Mapping[str, str]) -> bool:
    """Return whether a request comes from a page of this server, or from no page at all, by its headers.

    ComfyUI itself refuses some pages of other origins, but none where it was started with --enable-cors-header, and on
    a network only those of browsers that name the site of a page.
    """
    if site := headers.get("Sec-Fetch-Site"):  # pages cannot set it; browsers send it over HTTPS and to localhost
        return site in ("same-origin", "none")
    origin = headers.get("Origin")
    return origin is None or urlsplit(origin).netloc.lower() == headers.get("Host", "").lower()


def _add(method: str, path: str, handle: _Handler) -> None:
    """Add a route, at /api + path too; do nothing where no server runs, as in a script."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None or any((route.method, route.path) == (method, path) for route in _routes(server)):
        return  # a second copy of the pack; aiohttp takes a path only once

    async def handle_own(request: web.Request) -> web.Response:
        if not is_own_page(request.headers):
            return web.json_response({"message": _FOREIGN, "error": _FOREIGN}, status=403)
        return await handle(request)

    (server.routes.get if method == "GET" else server.routes.post)(path)(handle_own)


def _routes(server: Any) -> list[web.RouteDef]:
    return [route for route in server.routes if isinstance(route, web.RouteDef)]


async def _sent(request: web.Request) -> Mapping[str, Any]:
    # A page of another site can send JSON only as plain text, without asking first.
    if request.content_type != "application/json":
        raise ValueError("AC-LoRA expects JSON here.")
    sent = await request.json()
    if not isinstance(sent, dict):
        raise ValueError("AC-LoRA expects a JSON object here.")
    return sent


async def _short_content(request: web.Request) -> dict[str, Any]:
    text = await request.content.read(_LONGEST)
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
