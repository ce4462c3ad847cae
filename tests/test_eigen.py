import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aclora_core.eigen import gram, jacobi_eigen, symmetric_eigen


def gram_matrices(seed: int, size: int, decay: float, width: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, size, width, generator=generator, dtype=torch.float64)
    rows = rows * torch.exp(-decay * torch.arange(size, dtype=torch.float64))[:, None]
    rows[1] = 0.0
    rows[2] = rows[2, :1]
    matrices = gram(rows) if size <= width else rows @ rows.mT
    return matrices / matrices.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(1e-300)[:, None, None]


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000), st.integers(1, 9), st.sampled_from([0.0, 0.3, 3.0]))
def test_sweeps_agree_with_the_library_on_full_low_and_zero_rank(seed: int, size: int, decay: float) -> None:
    matrices = gram_matrices(seed, size, decay)
    values, vectors = jacobi_eigen(matrices)
    torch.testing.assert_close(values, symmetric_eigen(matrices)[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(vectors * values[:, None] @ vectors.mT, matrices, rtol=0, atol=1e-13)


def test_sweeps_agree_with_the_library_at_a_size_that_a_gpu_sweeps() -> None:
    matrices = gram_matrices(0, 33, 0.2)[:1]
    values, vectors = jacobi_eigen(matrices)
    torch.testing.assert_close(values, symmetric_eigen(matrices)[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(33, dtype=torch.float64)[None], rtol=0, atol=1e-6)


def test_values_fall_and_rebuild_matrices_of_any_magnitude() -> None:
    for factor in (1e-150, 1.0, 1e150):
        matrices = gram_matrices(5, 6, 0.5) * factor
        values, vectors = symmetric_eigen(matrices)
        assert (values.diff(dim=-1) <= 0).all() and (values >= 0).all()
        torch.testing.assert_close(
            vectors * values[:, None] @ vectors.mT / factor, matrices / factor, rtol=0, atol=1e-13
        )


def test_gram_takes_the_shorter_side() -> None:
    assert gram(torch.ones(2, 3, 50)).shape == gram(torch.ones(2, 50, 3)).shape == (2, 3, 3)


def test_an_empty_batch_gives_an_empty_result() -> None:
    values, vectors = symmetric_eigen(torch.zeros(0, 4, 4, dtype=torch.float64))
    assert values.shape == (0, 4) and vectors.shape == (0, 4, 4)
