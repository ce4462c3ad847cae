"""Routes of the pack on ComfyUI's web server, for its own pages alone."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from aiohttp import web

Answer = dict[str, Any] | bytes  # of a route: JSON, or an image in WebP
Work = Callable[[Mapping[str, Any]], Answer]  # takes the values of the query or of the JSON that was sent
_AT_ONCE = 2  # requests that are worked on; each may decode an image
_IMAGE_AGE = "private, max-age=86400"  # the address of an image changes with it


def add_route(method: Literal["GET", "POST"], path: str, work: Work) -> None:
    """Add a route that does its work in a thread, so that the server goes on meanwhile.

    A ValueError becomes the sentence in the answer's "error", with the status in the error's attribute `status`, or
    400. Requests that another site's page sends are refused, as are those that are not JSON.

    Args:
        method: what the browser asks with.
        path: below the server's address, such as "/aclora/dataset".
        work: called with the values that were sent.
    """
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    instance = getattr(server, "instance", None)
    if instance is not None:  # scripts start no web server
        routes = instance.routes
        (routes.get if method == "GET" else routes.post)(path)(_handler(method, work))


def is_own_page(headers: Mapping[str, str]) -> bool:
    """Return whether a request comes from a page of this server, or from no page at all, by its headers."""
    site = headers.get("Sec-Fetch-Site")  # which browsers send on https and on this machine
    if site is not None:
        return site in ("same-origin", "none")
    origin = headers.get("Origin")
    return origin is None or urlsplit(origin).netloc.lower() == headers.get("Host", "").lower()


def _handler(method: str, work: Work) -> Callable[[web.Request], Awaitable[web.Response]]:
    at_once: list[asyncio.Semaphore] = []  # made in the server's event loop

    async def handle(request: web.Request) -> web.Response:
        if not is_own_page(request.headers):
            return _refusal("This page is not ComfyUI's own, so AC-LoRA does not answer it.", 403)
        if not at_once:
            at_once.append(asyncio.Semaphore(_AT_ONCE))
        try:
            values = await _sent(request) if method == "POST" else dict(request.query)
            async with at_once[0]:
                answer = await asyncio.to_thread(work, values)
        except ValueError as error:
            return _refusal(str(error), getattr(error, "status", 400))
        if isinstance(answer, bytes):
            return web.Response(body=answer, content_type="image/webp", headers={"Cache-Control": _IMAGE_AGE})
        return web.json_response(answer)

    return handle


async def _sent(request: web.Request) -> Mapping[str, Any]:
    # A page of another site can send JSON only as plain text, without asking first.
    if request.content_type != "application/json":
        raise ValueError("AC-LoRA expects JSON here.")
    sent = await request.json()
    if not isinstance(sent, dict):
        raise ValueError("AC-LoRA expects a JSON object here.")
    return sent


def _refusal(sentence: str, status: int) -> web.Response:
    return web.json_response({"error": sentence}, status=status)
