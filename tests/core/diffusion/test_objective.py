"""The loss means the same for every kind of prediction: the error of the raw output, relative to the mean target's."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from aclora_core.config import Timesteps
from aclora_core.diffusion.loss import prediction_loss
from aclora_core.diffusion.objective import (
    Objective,
    c_out,
    draw_sigmas,
    loss_weights,
    prediction_target,
    sigmas_at_quantiles,
    snr,
    stratified_quantiles,
    target_variance,
    with_timesteps,
)

DATA = 0.5  # σ_data of the EDM kind


@dataclass(frozen=True)
class Kind:
    """One kind of prediction as its paper writes it."""

    objective: Objective
    wanted: Callable[[Tensor, Tensor, Tensor], Tensor]  # sigma, noise, latent -> the right raw output


def spread(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1)


def exploding(sigma: Tensor, noise: Tensor, latent: Tensor) -> Tensor:
    return latent + spread(sigma) * noise


def kind(denoised: Callable, wanted: Callable, add_noise: Callable = exploding, most: float = 14.6) -> Kind:
    return Kind(
        Objective(
            add_noise=add_noise,
            denoised=lambda sigma, output, noisy: denoised(spread(sigma), output, noisy),
            sigma_at=lambda share: most**share - 1 + 1e-3 if most > 1 else share,
            sampling="uniform",
        ),
        lambda sigma, noise, latent: wanted(spread(sigma), noise, latent),
    )


def v_wanted(s: Tensor, noise: Tensor, latent: Tensor) -> Tensor:
    """Salimans and Ho 2022: v = α ε − σ x, with α² + σ² = 1 and σ/α the noise level."""
    alpha = 1 / (1 + s**2).sqrt()
    return alpha * noise - (s * alpha) * latent


def edm_wanted(s: Tensor, noise: Tensor, latent: Tensor) -> Tensor:
    """Karras et al. 2022: D = c_skip x + c_out F, so F = (x0 − c_skip x) / c_out."""
    c_skip, c_out = DATA**2 / (s**2 + DATA**2), s * DATA / (s**2 + DATA**2).sqrt()
    return (latent - c_skip * (latent + s * noise)) / c_out


KINDS = {
    "eps": kind(lambda s, out, x: x - s * out, lambda s, noise, latent: noise),
    "v": kind(lambda s, out, x: x / (s**2 + 1) - out * s / (s**2 + 1).sqrt(), v_wanted),
    "flow": kind(
        lambda s, out, x: x - s * out,
        lambda s, noise, latent: noise - latent,
        lambda s, noise, latent: (1 - spread(s)) * latent + spread(s) * noise,
        most=1.0,
    ),
    "x0": kind(lambda s, out, x: out, lambda s, noise, latent: latent),
    "edm": kind(
        lambda s, out, x: x * DATA**2 / (s**2 + DATA**2) + out * s * DATA / (s**2 + DATA**2).sqrt(), edm_wanted
    ),
}


@dataclass(frozen=True)
class Draw:
    sigma: Tensor
    noise: Tensor
    latent: Tensor
    noisy: Tensor
    output: Tensor


def draw(chosen: Kind, seed: int = 0) -> Draw:
    generator = torch.Generator().manual_seed(seed)
    latent, noise, output = torch.randn(3, 5, 4, 6, 6, generator=generator)
    sigma = torch.tensor([0.05, 0.3, 0.5, 0.9, 0.99])
    return Draw(sigma, noise, latent, chosen.objective.add_noise(sigma, noise, latent), output)


@pytest.mark.parametrize("name", KINDS)
def test_the_loss_is_the_mean_squared_error_of_the_raw_output(name: str) -> None:
    chosen, d = KINDS[name], draw(KINDS[name])
    x0 = chosen.objective.denoised(d.sigma, d.output, d.noisy)
    found = prediction_loss(chosen.objective, d.sigma, d.noisy, d.latent, x0)
    expected = (d.output - chosen.wanted(d.sigma, d.noise, d.latent)).square().mean((1, 2, 3))
    assert found.shape == (5,)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_the_target_is_the_right_output_and_has_no_loss(name: str) -> None:
    chosen, d = KINDS[name], draw(KINDS[name], 1)
    wanted = prediction_target(chosen.objective, d.sigma, d.noisy, d.latent)
    torch.testing.assert_close(wanted, chosen.wanted(d.sigma, d.noise, d.latent), rtol=1e-3, atol=1e-3)
    x0 = chosen.objective.denoised(d.sigma, wanted, d.noisy)
    assert prediction_loss(chosen.objective, d.sigma, d.noisy, d.latent, x0).max() < 1e-6


@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_is_that_of_the_raw_output(name: str) -> None:
    """So a small noise level, where x0 hardly depends on the output, pulls as hard as a large one."""
    chosen, d = KINDS[name], draw(KINDS[name], 2)
    output = d.output.clone().requires_grad_()
    x0 = chosen.objective.denoised(d.sigma, output, d.noisy)
    prediction_loss(chosen.objective, d.sigma, d.noisy, d.latent, x0).sum().backward()
    error = d.output - chosen.wanted(d.sigma, d.noise, d.latent)
    torch.testing.assert_close(output.grad, 2 * error / error[0].numel(), rtol=1e-2, atol=1e-4)


def test_the_gain_is_the_change_of_x0_by_the_output() -> None:
    d = draw(KINDS["eps"])
    torch.testing.assert_close(
        c_out(KINDS["eps"].objective, d.sigma, d.noisy), -spread(d.sigma).expand_as(d.noisy), rtol=1e-4, atol=1e-6
    )
    assert torch.equal(c_out(KINDS["x0"].objective, d.sigma, d.noisy), torch.ones_like(d.noisy))


def test_a_half_precision_answer_is_compared_in_float32() -> None:
    objective, d = KINDS["flow"].objective, draw(KINDS["flow"])
    x0 = objective.denoised(d.sigma, d.output, d.noisy).bfloat16()
    assert prediction_loss(objective, d.sigma, d.noisy, d.latent, x0).dtype == torch.float32


def pictures(count: int = 12, offset: float = 0.0) -> list[Tensor]:
    """Latents that are no noise: each channel has its own level, and each picture its own contrast."""
    generator = torch.Generator().manual_seed(5)
    level = torch.arange(4.0).view(1, 4, 1, 1) + offset
    return [level + (0.5 + place / count) * torch.randn(1, 4, 8, 8, generator=generator) for place in range(count)]


def test_the_target_variance_is_1_for_eps() -> None:
    assert target_variance(KINDS["eps"].objective, pictures(), 0) == pytest.approx(1.0, abs=0.02)
    assert target_variance(KINDS["eps"].objective, pictures(offset=50.0), 0) == pytest.approx(1.0, abs=0.02)


def test_the_target_variance_of_flow_and_x0_is_that_of_their_targets() -> None:
    """Per channel, so a channel's level is no variance: flow has 1 + Var(latent), x0 has Var(latent)."""
    latents = pictures()
    variance = float(torch.cat(latents).transpose(0, 1).flatten(1).var(1, correction=0).mean())
    assert target_variance(KINDS["x0"].objective, latents, 0) == pytest.approx(variance, rel=1e-4)
    assert target_variance(KINDS["flow"].objective, latents, 0) == pytest.approx(1 + variance, rel=0.02)


def test_the_target_variance_is_the_loss_of_the_best_constant_answer() -> None:
    chosen = KINDS["v"]
    latents = pictures()
    generator = torch.Generator().manual_seed(3)
    many = torch.cat(latents).repeat(60, 1, 1, 1)
    sigma = draw_sigmas(chosen.objective, len(many), generator)
    noise = torch.randn(many.shape, generator=generator)
    wanted = chosen.wanted(sigma, noise, many)
    expected = float((wanted - wanted.mean((0, 2, 3), keepdim=True)).square().mean())
    assert target_variance(chosen.objective, latents, 0, draws=60) == pytest.approx(expected, rel=0.05)


def test_pictures_of_several_sizes_have_one_variance() -> None:
    latents = [*pictures(4), torch.randn(1, 4, 3, 9, generator=torch.Generator().manual_seed(1))]
    assert target_variance(KINDS["eps"].objective, latents, 0) == pytest.approx(1.0, abs=0.05)


def test_the_target_variance_follows_the_seed_alone() -> None:
    found = [target_variance(KINDS["v"].objective, pictures(), seed) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("name", KINDS)
def test_the_target_variance_is_to_the_bit_that_of_all_draws_of_a_latent_at_once(name: str) -> None:
    """Checkpoints and reports have losses in this unit."""
    objective, latents, generator = KINDS[name].objective, pictures(), torch.Generator().manual_seed(7)
    targets = []
    for latent in latents:
        repeated = latent.expand(8, 4, 8, 8)
        noise = torch.randn(repeated.shape, generator=generator)
        sigma = draw_sigmas(objective, 8, generator)
        noisy = objective.add_noise(sigma, noise, repeated)
        targets.append(prediction_target(objective, sigma, noisy, repeated).transpose(0, 1).flatten(1))
    count = sum(target.shape[1] for target in targets)
    mean, square = (sum(part.sum(1) for part in parts) / count for parts in (targets, [it**2 for it in targets]))
    assert target_variance(objective, latents, 7) == float((square - mean**2).mean())


SHARES = Objective(exploding, lambda s, out, x: out, lambda share: share, "uniform")  # noise levels are the shares


def test_uniform_draws_every_share_alike_but_never_an_end() -> None:
    shares = draw_sigmas(SHARES, 20_000, torch.Generator().manual_seed(0))
    assert shares.dtype == torch.float32 and shares.shape == (20_000,)
    assert 0.00099 < shares.min() and shares.max() < 0.99901
    # Of 20,000 each tenth has 2,000, with a standard deviation of 42.
    assert (torch.histc(shares, 10, 0, 1) - 2000).abs().max() < 5 * 42


def test_logit_normal_draws_the_middle_most_often() -> None:
    shares = draw_sigmas(replace(SHARES, sampling="logit-normal"), 20_000, torch.Generator().manual_seed(0))
    logits = (shares / (1 - shares)).log()
    assert float(logits.mean()) == pytest.approx(0, abs=0.04) and float(logits.std()) == pytest.approx(1, abs=0.04)
    # Quartiles of the standard normal: half of all logits lie within 0.674.
    assert float((logits.abs() < 0.6745).float().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
def test_draws_come_from_the_generator_alone(sampling) -> None:
    objective = replace(SHARES, sampling=sampling)
    first, again, other = (draw_sigmas(objective, 9, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_an_endless_end_is_never_asked_for() -> None:
    """Hosts answer share 1 with a huge or infinite noise level."""
    objective = replace(SHARES, sigma_at=lambda share: math.inf if share in (0.0, 1.0) else share)
    assert torch.isfinite(draw_sigmas(objective, 50_000, torch.Generator().manual_seed(0))).all()


def test_unknown_sampling_is_refused() -> None:
    with pytest.raises(ValueError, match="uniform or logit-normal, not 'cosine'"):
        draw_sigmas(replace(SHARES, sampling="cosine"), 3, torch.Generator())  # type: ignore[arg-type]


FLOW = replace(KINDS["flow"].objective, sampling="shifted", shift_of=lambda latent: latent.shape[-1] / 8)


def test_shifted_multiplies_the_odds_of_logit_normal_by_what_suits_the_size() -> None:
    """Esser et al. 2024: t' = r t / (1 + (r - 1) t), whose odds are r times those of t."""
    small, wide = (
        draw_sigmas(FLOW, 500, torch.Generator().manual_seed(1), torch.zeros(1, 4, 8, side)) for side in (8, 24)
    )
    plain = draw_sigmas(replace(FLOW, sampling="logit-normal"), 500, torch.Generator().manual_seed(1))
    torch.testing.assert_close(small, plain)
    torch.testing.assert_close(wide, (3 * plain / (1 + 2 * plain)).clamp(1e-3, 1 - 1e-3))


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal", "shifted"])
def test_noise_levels_at_even_quantiles_are_distributed_as_those_that_are_drawn(sampling) -> None:
    objective, latent = replace(FLOW, sampling=sampling), torch.zeros(1, 4, 8, 24)
    count = 20_000
    even = sigmas_at_quantiles(objective, (torch.arange(count) + 0.5) / count, latent)
    assert even.dtype == torch.float32 and even.shape == (count,) and bool((even.diff() >= 0).all())
    drawn = draw_sigmas(objective, count, torch.Generator().manual_seed(0), latent).sort().values
    assert (even - drawn).abs().mean() < 0.005 and (even - drawn).abs().max() < 0.04


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_every_part_holds_one_quantile_in_random_order(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([stratified_quantiles(count, generator) for _ in range(400)])
    assert torch.equal((rows * count).floor().sort(1).values, torch.arange(count).float().expand(400, count))
    assert float(rows[:, 0].mean()) == pytest.approx(0.5, abs=0.06)  # the first is uniform over all parts
    assert float(rows[:, 0].var()) == pytest.approx(1 / 12, abs=0.02)


def test_quantiles_at_the_ends_give_finite_levels() -> None:
    for sampling in ("uniform", "logit-normal"):
        ends = sigmas_at_quantiles(replace(SHARES, sampling=sampling), torch.tensor([0.0, 1.0]))
        assert ends.tolist() == pytest.approx([1e-3, 1 - 1e-3])


def test_unknown_sampling_has_no_quantiles() -> None:
    with pytest.raises(ValueError, match="not 'cosine'"):
        sigmas_at_quantiles(replace(SHARES, sampling="cosine"), torch.tensor([0.5]))  # type: ignore[arg-type]


def test_automatic_is_what_the_model_says_and_the_rest_is_as_wished() -> None:
    assert with_timesteps(FLOW, "automatic") is FLOW
    assert with_timesteps(SHARES, "logit-normal").sampling == "logit-normal" and SHARES.sampling == "uniform"
    assert with_timesteps(replace(FLOW, sampling="uniform"), "shifted") == FLOW


@pytest.mark.parametrize("wanted", ["uniform", "logit-normal", "shifted"])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("stratified", [False, True], ids=["independent", "stratified"])
def test_a_shift_multiplies_the_odds_of_every_noise_fraction(wanted: Timesteps, shift: float, stratified: bool) -> None:
    """Against t and its odds drawn by numpy; the size of the image gives "shifted" a factor of its own."""
    count, rng = 40_000, np.random.default_rng(5)
    base = rng.uniform(size=count) if wanted == "uniform" else 1 / (1 + np.exp(-rng.normal(size=count)))
    odds = shift * (4.0 if wanted == "shifted" else 1.0) * base / (1 - base)
    objective = with_timesteps(replace(SHARES, shift_of=lambda latent: 4.0), wanted, shift)
    generator, latent = torch.Generator().manual_seed(0), torch.zeros(1, 4, 2, 2)
    if stratified:
        found = sigmas_at_quantiles(objective, stratified_quantiles(count, generator), latent)
    else:
        found = draw_sigmas(objective, count, generator, latent)
    shares = np.linspace(0.02, 0.98, 25)
    expected = np.quantile(odds / (1 + odds), shares)
    assert np.quantile(found.numpy(), shares) == pytest.approx(expected, abs=0.012)


def test_the_shift_of_automatic_timesteps_comes_on_top_of_the_models_own_and_that_of_others_replaces_it() -> None:
    own = replace(FLOW, odds=2.0)
    assert with_timesteps(own, "automatic") is own
    assert with_timesteps(own, "automatic", 3.0) == replace(own, odds=6.0)
    for wanted in ("uniform", "logit-normal", "shifted"):
        assert with_timesteps(own, wanted).odds == 1.0 and with_timesteps(own, wanted, 3.0).odds == 3.0


def test_shifted_is_refused_for_models_without_a_size_of_their_own() -> None:
    with pytest.raises(ValueError, match="need a flow model, but this model predicts ε"):
        with_timesteps(replace(SHARES, prediction="ε"), "shifted")


LEVELS = torch.tensor([0.03, 0.2, 0.5, 0.8, 0.97], dtype=torch.float64)
# The signal-to-noise ratio, and what weighs the output's error as a weight of 1 weighs that of x0: (∂x0 / ∂output)².
CLOSED = {
    "eps": (lambda s: 1 / s**2, lambda s: s**2),
    "v": (lambda s: 1 / s**2, lambda s: s**2 / (1 + s**2)),
    "flow": (lambda s: ((1 - s) / s) ** 2, lambda s: s**2),
    "x0": (lambda s: 1 / s**2, lambda s: torch.ones_like(s)),
    "edm": (lambda s: 1 / s**2, lambda s: s**2 * DATA**2 / (s**2 + DATA**2)),
}


@pytest.mark.parametrize("name", CLOSED)
def test_weights_are_those_of_the_papers_in_the_outputs_terms(name: str) -> None:
    ratio, gain = (form(LEVELS) for form in CLOSED[name])
    objective = KINDS[name].objective
    torch.testing.assert_close(snr(objective, LEVELS), ratio, rtol=1e-9, atol=0)
    found = {kind: loss_weights(objective, LEVELS.float(), kind, 5.0) for kind in ("min-SNR", "debiased")}
    torch.testing.assert_close(found["min-SNR"].double(), ratio.clamp_max(5) * gain, rtol=1e-5, atol=0)
    torch.testing.assert_close(found["debiased"].double(), ratio.sqrt() * gain, rtol=1e-5, atol=0)
    assert loss_weights(objective, LEVELS, "none", 5.0) is None


def test_weights_for_eps_and_v_are_as_published() -> None:
    """Hang et al. 2023: min(r, γ) / r and min(r, γ) / (r + 1); Yu et al. 2023: 1 / √r."""
    r = 1 / LEVELS**2
    eps, v = KINDS["eps"].objective, KINDS["v"].objective
    torch.testing.assert_close(loss_weights(eps, LEVELS, "min-SNR", 5.0), (r.clamp_max(5) / r).float())
    torch.testing.assert_close(loss_weights(v, LEVELS, "min-SNR", 5.0), (r.clamp_max(5) / (r + 1)).float())
    torch.testing.assert_close(loss_weights(eps, LEVELS, "debiased", 5.0), (1 / r.sqrt()).float())


def test_the_target_variance_is_that_of_the_noise_levels_drawn() -> None:
    """A target that is the noise level has the variance of shifted levels."""
    telling = Objective(
        add_noise=lambda sigma, noise, latent: spread(sigma).expand_as(latent) + 0 * noise,
        denoised=lambda sigma, output, noisy: output - noisy,
        sigma_at=lambda share: share,
        sampling="shifted",
        shift_of=lambda latent: 9.0,
    )
    nothing = [torch.zeros(1, 4, 8, 8)] * 400
    shares = draw_sigmas(telling, 20_000, torch.Generator().manual_seed(3), nothing[0])
    assert target_variance(telling, nothing, 0) == pytest.approx(float(shares.var()), rel=0.1)
