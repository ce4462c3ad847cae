"""Layer name patterns: parts of names, regular expressions, ranks, and malformed lines."""

import pytest

from aclora_core.config.layer_patterns import parse_ranks, pattern_matcher, rank_overrides, select_layers

PREFIX = "diffusion_model."
NAMES = [
    f"{PREFIX}{name}"
    for name in ("double_blocks.1.img_attn.qkv", "double_blocks.10.img_attn.qkv", "double_blocks.1.img_mlp.0", "img_in")
]


def short(names: list[str]) -> list[str]:
    return [name.removeprefix(PREFIX) for name in names]


def test_a_plain_line_matches_a_part_of_the_name_literally() -> None:
    assert short(select_layers(NAMES, "blocks.1.", "", PREFIX)) == [short(NAMES)[0], short(NAMES)[2]]
    assert not pattern_matcher("blocks.1.")("double_blocks.10.attn")


def test_a_line_with_a_special_character_is_a_regular_expression() -> None:
    assert short(select_layers(NAMES, r"blocks\.\d+\.img_attn", "", PREFIX)) == short(NAMES[:2])
    assert short(select_layers(NAMES, "^img_in$", "", PREFIX)) == ["img_in"]
    assert select_layers(NAMES, "^diffusion_model", "", PREFIX) == NAMES


def test_all_names_are_selected_in_order_without_patterns() -> None:
    assert select_layers(NAMES, "", "  \n", PREFIX) == NAMES


def test_include_lines_add_up_and_exclude_wins() -> None:
    assert short(select_layers(NAMES, "img_in\nqkv\n", "blocks.10.", PREFIX)) == [
        "double_blocks.1.img_attn.qkv",
        "img_in",
    ]


@pytest.mark.parametrize(("include", "exclude"), [("txt_in", ""), ("", "txt_in"), ("qkv\ntxt_in", "")])
def test_a_pattern_that_matches_nothing_is_rejected_with_example_names(include: str, exclude: str) -> None:
    with pytest.raises(ValueError, match=r"'txt_in' \((in|ex)clude_layers\).*'diffusion_model\.double_blocks\.1\.img"):
        select_layers(NAMES, include, exclude, PREFIX)


def test_patterns_that_leave_no_layer_are_rejected() -> None:
    with pytest.raises(ValueError, match="leave no layer to train"):
        select_layers(NAMES, "img_in", "img", PREFIX)


def test_an_invalid_regular_expression_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"'blocks\.\(1' is not a valid regular expression: missing"):
        pattern_matcher("blocks.(1")


def test_the_last_matching_rank_wins() -> None:
    found = rank_overrides(NAMES, "double=4\nqkv = 8\nblocks.10.=2", PREFIX)
    assert [found.get(name) for name in NAMES] == [8, 2, 4, None]


def test_the_last_equals_sign_separates_the_rank() -> None:
    assert parse_ranks("a(?=b)=3") == [("a(?=b)", 3)]


@pytest.mark.parametrize("line", ["qkv", "qkv=", "=4", "qkv=0", "qkv=-1", "qkv=four", "qkv=1.5"])
def test_a_malformed_rank_line_is_rejected(line: str) -> None:
    with pytest.raises(ValueError, match=f"pattern=rank.*'{line}'"):
        parse_ranks(line)


def test_a_rank_pattern_that_matches_nothing_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"'txt' \(layer_ranks\)"):
        rank_overrides(NAMES, "txt=4", PREFIX)


def test_patterns_are_not_rejected_if_there_are_no_names() -> None:
    assert select_layers([], "qkv", "txt") == []
