import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aclora_core.method import batched_eigh as eigen
from aclora_core.method.batched_eigh import batched_eigh, block_jacobi_eigh


def gram_matrices(seed: int, size: int, decay: float, width: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, size, width, generator=generator, dtype=torch.float64)
    rows = rows * torch.exp(-decay * torch.arange(size, dtype=torch.float64))[:, None]
    rows[1] = 0.0
    rows[2] = rows[2, :1]
    matrices = rows @ rows.mT
    return matrices / matrices.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(1e-300)[:, None, None]


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000), st.integers(1, 9), st.sampled_from([0.0, 0.3, 3.0]))
def test_block_jacobi_agrees_with_the_library_on_full_low_and_zero_rank(seed: int, size: int, decay: float) -> None:
    matrices = gram_matrices(seed, size, decay)
    values, vectors = block_jacobi_eigh(matrices)
    torch.testing.assert_close(values, batched_eigh(matrices)[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(vectors * values[:, None] @ vectors.mT, matrices, rtol=0, atol=1e-13)


def test_block_jacobi_agrees_with_the_library_at_a_size_for_which_a_gpu_uses_it() -> None:
    matrices = gram_matrices(0, 33, 0.2)[:1]
    values, vectors = block_jacobi_eigh(matrices)
    torch.testing.assert_close(values, batched_eigh(matrices)[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(33, dtype=torch.float64)[None], rtol=0, atol=1e-6)


def with_values(values: torch.Tensor, seed: int) -> torch.Tensor:
    """Two matrices with these eigenvalues."""
    size = len(values)
    normal = torch.randn(2, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = torch.linalg.qr(normal).Q
    matrices = basis * values.double() @ basis.mT
    return matrices / matrices.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(1e-300)[:, None, None]


@pytest.mark.parametrize("size", [33, 64, 90])
@pytest.mark.parametrize("kind", ["flat", "tied", "falling", "steep", "few", "one", "nearly equal", "zero"])
def test_block_jacobi_diagonalises_any_spectrum_with_orthonormal_vectors(size: int, kind: str) -> None:
    places = torch.arange(size, dtype=torch.float64)
    spectra = {
        "flat": 1.0 + torch.rand(size, generator=torch.Generator().manual_seed(0)).double(),
        "tied": places % 3,
        "falling": 0.9**places,
        "steep": 0.1**places,
        "few": (places < 3).double(),
        "one": (places < 1).double(),
        "nearly equal": 1.0 + 1e-12 * places,
        "zero": 0.0 * places,
    }
    matrices = with_values(spectra[kind], size)
    values, vectors = block_jacobi_eigh(matrices)
    assert (values.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(values, batched_eigh(matrices)[0], rtol=0, atol=5e-13)
    torch.testing.assert_close(vectors * values[:, None] @ vectors.mT, matrices, rtol=0, atol=1e-13)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(size).double().expand(2, -1, -1), rtol=0, atol=1e-12)


def test_block_jacobi_takes_few_rounds_for_a_rank_64_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round calls the library. If the order of the eigenvalues were lost, the sweeps would not converge."""
    rounds = []
    take_round = eigen._jacobi_round
    monkeypatch.setattr(eigen, "_jacobi_round", lambda *given: rounds.append(1) or take_round(*given))
    block_jacobi_eigh(gram_matrices(1, 64, 0.05, width=200)[:1])
    assert len(rounds) <= 15


@pytest.mark.parametrize("players", [2, 4, 6, 12])
def test_in_a_round_robin_every_pair_meets_once_and_its_order_is_known(players: int) -> None:
    moves, rising = eigen._round_robin(players)
    sitting, met = list(range(players)), []
    for flags in rising:
        pairs = list(zip(sitting[::2], sitting[1::2], strict=True))
        assert flags == [one > other for one, other in pairs]
        met += [frozenset(pair) for pair in pairs]
        sitting = [sitting[seat] for seat in moves]
    assert sitting == list(range(players))
    assert sorted(map(sorted, met)) == [list(pair) for pair in itertools.combinations(range(players), 2)]


def test_eigenvalues_descend_and_rebuild_matrices_of_any_magnitude() -> None:
    for factor in (1e-150, 1.0, 1e150):
        matrices = gram_matrices(5, 6, 0.5) * factor
        values, vectors = batched_eigh(matrices)
        assert (values.diff(dim=-1) <= 0).all() and (values >= 0).all()
        torch.testing.assert_close(
            vectors * values[:, None] @ vectors.mT / factor, matrices / factor, rtol=0, atol=1e-13
        )


def test_an_empty_batch_gives_an_empty_result() -> None:
    values, vectors = batched_eigh(torch.zeros(0, 4, 4, dtype=torch.float64))
    assert values.shape == (0, 4) and vectors.shape == (0, 4, 4)
