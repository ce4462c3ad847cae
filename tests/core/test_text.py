"""Plurals, lists of names, reasons and columns."""

from aclora_core.text import column_widths, count_noun, error_reason, mean_and_range, name_list, text_table


def test_one_is_singular() -> None:
    assert [count_noun(number, "step") for number in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]


def test_a_long_list_names_the_first_and_counts_the_others() -> None:
    assert name_list(["a", "b", "c"]) == "a, b, c" and name_list(["a", "b", "c", "d"]) == "a, b, c and 1 more"
    assert name_list([7, 8, 9], 2) == "7, 8 and 1 more"
    assert name_list([]) == ""


def test_the_reason_of_an_error_is_its_first_line_or_its_type() -> None:
    assert error_reason(ValueError("no room\nat line 3")) == "no room" and error_reason(KeyError()) == "KeyError"


def test_counts_are_summed_up_by_mean_and_range() -> None:
    assert mean_and_range([2, 8, 4]) == "4.7 (2 to 8)" and mean_and_range([]) == "none"


def test_numbers_are_aligned_on_the_right_under_their_header() -> None:
    table = text_table(["layer", "rank"], [["attention", "4"], ["mlp", "16"]])
    assert table.split("\n") == ["layer      rank", "attention     4", "mlp          16"]
    assert text_table(["layer", "rank"], []) == "layer  rank"


def test_text_is_aligned_on_the_left_without_trailing_spaces() -> None:
    assert text_table(None, [["name", "ink"], ["a longer name", "a"]], "left").split("\n") == [
        "name           ink",
        "a longer name  a",
    ]
    assert text_table(None, [], "left") == ""


def test_tables_of_the_same_widths_line_up() -> None:
    first, second = [["a", "1"]], [["long", "22"], ["b", ""]]
    widths = column_widths([*first, *second])
    assert widths == [4, 2]
    assert [text_table(None, rows, "left", widths) for rows in (first, second)] == ["a     1", "long  22\nb"]
