from aclora_core.text import counted, reason, some


def test_one_is_no_plural() -> None:
    assert [counted(number, "step") for number in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]


def test_of_many_names_the_first_are_told() -> None:
    assert some(["a", "b", "c"]) == "a, b, c" and some(["a", "b", "c", "d"]) == "a, b, c and 1 more"
    assert some([7, 8, 9], 2) == "7, 8 and 1 more"


def test_the_reason_of_an_error_is_its_first_line_or_its_kind() -> None:
    assert reason(ValueError("no room\nat line 3")) == "no room" and reason(KeyError()) == "KeyError"
