"""The shipped workflows in ComfyUI's own front end, in a headless browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tools.runtime.environment import ROOT, RUNTIME

from .conftest import HostServer

if TYPE_CHECKING:
    from playwright.sync_api import Page

WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
PROMPTS = ROOT / "tests" / "host" / "prompts"


@pytest.fixture(scope="module")
def page(server: HostServer) -> Iterator[Page]:
    """The front end, open in a browser."""
    pytest.importorskip("playwright", reason="playwright is not installed: pip install -r tests/requirements.txt")
    from .browser import find_browser, open_front_end

    if find_browser() is None:
        pytest.skip("no Chromium is installed: the front end is not tested (set ACLORA_CHROMIUM, or install chromium)")
    with open_front_end(server.server.address) as opened:
        yield opened


@pytest.fixture
def workflow(request: pytest.FixtureRequest, page: Page, server: HostServer) -> dict[str, Any]:
    """A workflow as the template browser gets it, opened in the front end."""
    from .browser import load_workflow

    loaded = server.get_json(f"/api/workflow_templates/{server.pack_folder}/{request.param}.json")
    load_workflow(page, loaded)
    return dict(loaded)


def test_there_is_a_quickstart() -> None:
    assert "quickstart" in WORKFLOWS


@pytest.mark.parametrize("workflow", WORKFLOWS, indirect=True)
def test_no_node_is_missing(workflow: dict[str, Any], page: Page, request: pytest.FixtureRequest) -> None:
    from .browser import screenshot, unknown_nodes

    screenshot(page, RUNTIME / "screenshots" / f"{request.node.callspec.params['workflow']}.png")
    assert unknown_nodes(page) == []


@pytest.mark.parametrize("workflow", ["quickstart"], indirect=True)
def test_front_end_sends_the_prompt_that_the_tests_run(workflow: dict[str, Any], page: Page) -> None:
    from .browser import api_form

    assert api_form(page) == json.loads((PROMPTS / "quickstart.json").read_text(encoding="utf-8"))
