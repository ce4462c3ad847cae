"""docs/models.md, compared with ComfyUI's list of models and with the families under test."""

import importlib
import inspect
import re

import pytest

from launcher.environment import ROOT
from tests.host.host.test_other_families import REFUSED
from tests.support import quantised
from tests.support.families import FAMILIES

FORMATS = "Formats of the model file"
PAGE = ROOT / "docs" / "models.md"
IMAGE_TO_IMAGE = {"LotusD", "WAN21_FlowRVS"}  # refused by their sampling: tests/host/host/test_objective.py


def rows() -> dict[str, list[tuple[set[str], str]]]:
    """Return the rows of the tables, by the title above: the classes in a row, and its line."""
    found: dict[str, list[tuple[set[str], str]]] = {}
    title = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            title = line.removeprefix("## ")
        elif line.startswith("|") and (classes := set(re.findall(r"`(\w+)`", line))):
            found.setdefault(title, []).append((classes, line))
    return found


def classes_under(*titles: str) -> set[str]:
    return {name for title in titles for classes, _ in rows()[title] for name in classes}


def test_every_model_of_comfyui_is_in_a_table(pack):
    import comfy.supported_models

    tables = [title for title in rows() if title != FORMATS]
    assert classes_under(*tables) == {config.__name__ for config in comfy.supported_models.models}


def test_every_format_of_comfyui_is_in_the_table_of_formats_and_in_a_test(pack):
    import comfy.quant_ops

    in_tests = {form.name for form in quantised.FORMATS.values()}
    assert classes_under(FORMATS) == in_tests == set(comfy.quant_ops.QUANT_ALGOS)


def test_yes_stands_where_a_test_trains_the_family():
    trained = [row for title in list(rows())[:2] for row in rows()[title]]
    tested = {name for classes, line in trained if "| yes |" in line for name in classes}
    # Inpainting models of SD1.5 and SD2 have the class of those that draw from text alone.
    assert tested == {family.config for family in FAMILIES.values()}


def test_models_that_cannot_be_trained_are_refused(pack):
    import comfy.model_base
    import comfy.supported_models

    families = importlib.import_module(f"{pack.__name__}.nodes.host.families")
    by_network = {family.config for family, _ in REFUSED.values()}
    for name in classes_under("What cannot be trained") - by_network - IMAGE_TO_IMAGE:
        source = inspect.getsource(getattr(comfy.supported_models, name).get_model)
        kind = getattr(comfy.model_base, re.findall(r"model_base\.(\w+)\(", source)[0])
        with pytest.raises(ValueError, match="This model"):
            families.check_family(kind.__new__(kind))  # without its network
