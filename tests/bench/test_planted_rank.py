"""A small run of bench/planted_rank.py: the reported signal rank is the planted one."""

from bench import planted_rank
from bench.planted_rank import Setting


def test_product_with_the_noise_floor_finds_the_planted_rank() -> None:
    found = planted_rank.fit(Setting("product", "noise floor", "energy"), seeds=2, strength=2.0)
    assert [layer.reported for layer in found] == [planted_rank.TRUE_RANK] * 6
    assert [layer.at_last_restart for layer in found] == [planted_rank.TRUE_RANK] * 6
    assert all(layer.error_cut < 0.2 < layer.error for layer in found)


def test_a_share_of_the_energy_counts_noise_as_signal() -> None:
    found = planted_rank.fit(Setting("product", "fixed", "energy"), seeds=1, strength=2.0)
    assert all(layer.reported > 2 * planted_rank.TRUE_RANK for layer in found)


def test_all_settings_are_compared_and_the_noise_floor_has_no_measure() -> None:
    settings = planted_rank.settings()
    assert len(settings) == len(set(settings)) == 4 * 5
    assert {setting.mode for setting in settings} == {"paper", "product", "product_redraw", "off"}
