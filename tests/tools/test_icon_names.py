"""tools.tiny_base.icon_names: which icons are kept, and how names of different sets are matched."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.icon_packs import pack
from tools.tiny_base import icon_names, icons


def concepts(cache: Path, style: str) -> list[str]:
    return list(icons.load_set(cache, style))


def test_a_concept_is_the_name_with_spaces(tmp_path: Path) -> None:
    pack(tmp_path, "noto", ["hot-beverage", "1st-place-medal", "police-car-light"])
    assert concepts(tmp_path, "noto") == ["1st place medal", "hot beverage", "police car light"]


@given(st.lists(st.from_regex(r"[a-z0-9]+", fullmatch=True), min_size=1, max_size=4))
def test_letters_ignore_separators(words: list[str]) -> None:
    assert icon_names.letters("-".join(words)) == icon_names.letters("".join(words)) == "".join(words)


@pytest.mark.parametrize(
    "junk",
    [
        "waving-hand-medium-dark-skin-tone",
        "mermaid-tone3",
        "light-skin-tone",
        "flag-namibia",
        "canary-islands-flag",
        "ten-oclock",
        "four-thirty",
        "keycap-6",
        "letter-q",
        "a-button-blood-type",
        "japanese-secret-button",
        "family-man-woman-boy",
        "woman-red-hair",
        "woman-astronaut",
        "man-running",
        "person-running-facing-right",
    ],
)
def test_variants_flags_letters_and_clocks_are_dropped(tmp_path: Path, junk: str) -> None:
    pack(tmp_path, "noto", ["astronaut", "person-running", "waving-hand", "flag-in-hole"])
    pack(tmp_path, "twemoji", ["astronaut", "person-running", "flag-in-hole", "three-oclock", "woman-dancing", junk])
    kept = ["astronaut", "flag in hole", "person running", "three oclock", "woman dancing"]
    assert concepts(tmp_path, "twemoji") == kept


def test_short_skin_tones_of_fluent_are_dropped_but_not_a_traffic_light(tmp_path: Path) -> None:
    pack(tmp_path, "noto", ["police-car", "police-car-light", "vertical-traffic-light", "nose"])
    pack(tmp_path, "fluent", ["police-car", "police-car-light", "vertical-traffic-light", "nose", "nose-light"])
    assert concepts(tmp_path, "fluent") == ["nose", "police car", "police car light", "vertical traffic light"]


def test_names_are_matched_by_aliases_of_both_sets_and_by_the_table(tmp_path: Path) -> None:
    pack(tmp_path, "noto", ["bear", "gear", "mage"], {"bear-face": {"parent": "bear"}})
    pack(tmp_path, "emojione", ["bear-face", "cog", "person-mage"], {"gear": {"parent": "cog"}})
    assert concepts(tmp_path, "emojione") == ["bear", "gear", "mage"]


def test_an_alias_does_not_replace_the_icon_with_that_name(tmp_path: Path) -> None:
    pack(tmp_path, "noto", ["dog"])
    other = {"body": '<path d="M0 0h1v1H0z"/>'}
    pack(tmp_path, "twemoji", ["a-dog", "dog"], {"dog-alias": {"parent": "a-dog"}}, **{"dog": other})
    assert other["body"] in icons.load_set(tmp_path, "twemoji")["dog"]


def test_fxemoji_is_matched_without_hyphens_and_its_unknown_names_are_dropped(tmp_path: Path) -> None:
    pack(tmp_path, "noto", ["hot-beverage", "dog", "dog-face", "angry-face"])
    pack(tmp_path, "fxemoji", ["hotbeverage", "dog", "dogside", "pouting", "foxgrin", "emptynotepad"])
    assert concepts(tmp_path, "fxemoji") == ["angry face", "dog", "dog face", "hot beverage"]


def test_every_handmade_name_is_unique() -> None:
    for text in (icon_names._FXEMOJI, icon_names._STREAMLINE):
        targets = [pair.split("=")[1] for pair in text.split()]
        sources = [pair.split("=")[0] for pair in text.split()]
        assert len(set(sources)) == len(sources)
        assert len(set(filter(None, targets))) == len(list(filter(None, targets)))


def test_numbered_drawings_of_streamline_are_merged_and_countries_are_dropped(tmp_path: Path) -> None:
    pack(tmp_path, "noto", ["pizza", "guard"])
    first = {"body": '<path d="M0 0h1v1H0z"/>'}
    pack(tmp_path, "streamline-emojis", ["pizza-1", "pizza-2", "guard", "japan"], **{"pizza-1": first})
    found = icons.load_set(tmp_path, "streamline-emojis")
    assert list(found) == ["guard", "pizza"]
    assert first["body"] in found["pizza"]


def test_hidden_icons_and_dangling_aliases_are_skipped(tmp_path: Path) -> None:
    pack(tmp_path, "noto", ["owl", "old-owl"], {"lost": {"parent": "nowhere"}}, **{"old-owl": {"hidden": True}})
    assert concepts(tmp_path, "noto") == ["owl"]


def test_a_mirrored_alias_is_a_concept_and_a_plain_one_is_not(tmp_path: Path) -> None:
    aliases = {"hand-right": {"parent": "hand-left", "hFlip": True}, "hand": {"parent": "hand-left"}}
    pack(tmp_path, "noto", ["hand-left"], aliases)
    assert concepts(tmp_path, "noto") == ["hand left", "hand right"]
