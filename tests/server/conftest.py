"""The front end of the tests' server, open in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.support.host_server import HostServer

if TYPE_CHECKING:
    from playwright.sync_api import Page


@pytest.fixture(scope="module")
def page(server: HostServer) -> Iterator[Page]:
    """The front end, open in a browser."""
    pytest.importorskip("playwright", reason="playwright is not installed: pip install -r tests/requirements.txt")
    from tests.support.browser import MISSING, find_browser, open_front_end

    if find_browser() is None:
        pytest.skip(f"the front end is not tested, as {MISSING}")
    with open_front_end(server.server.address) as opened:
        yield opened
