"""Which requests come from a page of the server itself."""

from __future__ import annotations

import pytest

REQUESTS = [
    ({}, True),  # no browser
    (
        {"Sec-Fetch-Site": "same-origin", "Origin": "https://pod-8188.example.net", "Host": "10.0.0.3:8188"},
        True,
    ),  # proxy
    ({"Sec-Fetch-Site": "none"}, True),  # typed by the user
    ({"Sec-Fetch-Site": "cross-site"}, False),
    ({"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:3000", "Host": "localhost:8188"}, False),
    ({"Origin": "http://10.0.0.3:8188", "Host": "10.0.0.3:8188"}, True),  # plain HTTP, where browsers name no site
    ({"Origin": "http://10.0.0.3:3000", "Host": "10.0.0.3:8188"}, False),
    ({"Origin": "http://example.org", "Host": "10.0.0.3:8188"}, False),
    ({"Origin": "null", "Host": "10.0.0.3:8188"}, False),  # a sandboxed frame, or a file
    ({"Origin": "HTTP://Studio:8188", "Host": "studio:8188"}, True),
]


@pytest.mark.parametrize(("headers", "own"), REQUESTS)
def test_only_pages_of_this_server_are_its_own(pack, headers, own):
    assert pack.nodes.host.routes.is_own_page(headers) is own
