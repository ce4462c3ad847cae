"""Every prediction type that ComfyUI knows against its closed form: target, loss, weights, sampled noise levels."""

import importlib
import math

import pytest
import torch

LEVELS = torch.tensor([0.02, 0.2, 0.5, 0.8, 0.99], dtype=torch.float64)


def spread(sigma):
    return sigma.view(-1, 1, 1, 1)


def v_wanted(s, noise, latent):
    return noise / (1 + s**2).sqrt() - latent * s / (1 + s**2).sqrt()


def edm_wanted(s, noise, latent, data=0.5):
    """Return the preconditioning of Karras et al. 2022, with σ_data = 0.5."""
    skip, out = data**2 / (s**2 + data**2), s * data / (s**2 + data**2).sqrt()
    return (latent - skip * (latent + s * noise)) / out


def v_edm_wanted(s, noise, latent):
    """ComfyUI's v-prediction with continuous levels is -F of EDM."""
    return -edm_wanted(s, noise, latent, 1.0)


def v_ddpm_wanted(s, noise, latent):
    """The host's x0 of this kind is (x − σ v) / √(1 + σ²), for the x = latent + σ noise that its sampler makes."""
    return noise - latent * ((1 + s**2).sqrt() - 1) / s


# ComfyUI's ModelType and settings -> the correct raw output, the name in the log, the sampling of noise levels.
KINDS = {
    "EPS": ({}, lambda s, noise, latent: noise, "ε", "uniform"),
    "V_PREDICTION": ({}, v_wanted, "v", "uniform"),
    "V_PREDICTION with zero SNR": ({"zsnr": True}, v_wanted, "v", "uniform"),
    "V_PREDICTION_DDPM": ({}, v_ddpm_wanted, "v", "uniform"),
    "V_PREDICTION_EDM": ({"sigma_max": 700.0}, v_edm_wanted, "v", "logit-normal"),
    "V_PREDICTION_CONTINUOUS": ({"sigma_max": 500.0, "sigma_min": 0.03}, v_edm_wanted, "v", "uniform"),
    "EDM": ({"sigma_data": 0.5, "sigma_max": 80.0}, edm_wanted, "F of EDM", "logit-normal"),
    "STABLE_CASCADE": ({"shift": 2.0}, lambda s, noise, latent: noise, "ε", "uniform"),
    "FLOW": ({"shift": 3.0}, lambda s, noise, latent: noise - latent, "the velocity of a flow", "uniform"),
    "FLOW with noise of another size": (
        {"noise_scale": 2.0},
        lambda s, noise, latent: 2 * noise - latent,
        "the velocity of a flow",
        "uniform",
    ),
    "FLUX": ({"shift": 1.15}, lambda s, noise, latent: noise - latent, "the velocity of a flow", "shifted"),
    "FLOW_COSMOS": (
        {"sigma_max": 80.0},
        lambda s, noise, latent: noise - latent,
        "the velocity of a flow",
        "logit-normal",
    ),
}


class Config:
    """The part of a model's config that ComfyUI's model_sampling reads."""

    def __init__(self, settings):
        self.sampling_settings = settings


def sampling_of(name):
    import comfy.model_base as base

    return base.model_sampling(Config(KINDS[name][0]), base.ModelType[name.split(" ")[0]])


@pytest.fixture
def core(pack):
    return importlib.import_module(f"{pack.__name__}.aclora_core.diffusion")


def make_objective(pack, sampling, **more):
    return importlib.import_module(f"{pack.__name__}.nodes.host.objective").make_objective(sampling, **more)


@pytest.mark.parametrize("name", KINDS)
def test_target_and_loss_equal_the_closed_form(pack, core, name):
    _, wanted, prediction, sampling = KINDS[name]
    objective = make_objective(pack, sampling_of(name))
    assert (objective.prediction, objective.sampling) == (prediction, sampling)
    generator = torch.Generator().manual_seed(0)
    latent, noise, output = torch.randn(3, 5, 4, 6, 6, generator=generator, dtype=torch.float64)
    noisy = objective.add_noise(LEVELS, noise, latent)
    expected = wanted(spread(LEVELS), noise, latent)
    torch.testing.assert_close(
        core.objective.prediction_target(objective, LEVELS, noisy, latent), expected, rtol=1e-9, atol=1e-9
    )
    x0 = objective.denoised(LEVELS, output, noisy)
    loss = core.loss.prediction_loss(objective, LEVELS, noisy, latent, x0)
    # The model's output is compared in float32.
    torch.testing.assert_close(loss, (output - expected).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_sampled_noise_levels_are_finite_and_in_the_models_range(pack, core, name):
    sampling = sampling_of(name)
    objective = make_objective(pack, sampling)
    sigmas = core.objective.draw_sigmas(objective, 2000, torch.Generator().manual_seed(0))
    assert torch.isfinite(sigmas).all() and sigmas.min() > 0 and sigmas.max() <= float(sampling.sigma_max) * 1.001
    for kind in ("min-SNR", "debiased"):
        weights = core.objective.loss_weights(objective, sigmas, kind, 5.0)
        assert torch.isfinite(weights).all() and weights.min() > 0
    shares = torch.linspace(0.01, 0.99, 40).tolist()
    levels = [objective.sigma_at(share) for share in shares]
    assert levels == sorted(levels)


def test_the_noise_levels_of_cosmos_are_those_of_its_flow(pack, core):
    """The host counts its levels by σ; the model was trained on a logit-normal time t = σ / (1 + σ)."""
    objective = make_objective(pack, sampling_of("FLOW_COSMOS"))
    sigmas = core.objective.draw_sigmas(objective, 4000, torch.Generator().manual_seed(0))
    logs = sigmas.log()
    assert float(logs.mean()) == pytest.approx(0, abs=0.06) and float(logs.std()) == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize(
    ("shift", "more", "odds"), [(1.0, 1.0, 2.0), (3.0, 1.0, 3.0), (1.0, 3.0, 6.0), (3.0, 0.5, 1.5)]
)
def test_flow_models_learn_from_noise_of_twice_the_odds_unless_shifted_further(pack, core, shift, more, odds):
    sampling = sampling_of("FLOW")
    sampling.set_parameters(shift=shift)
    objective = core.objective.with_timesteps(make_objective(pack, sampling), "automatic", more)
    sigmas = core.objective.draw_sigmas(objective, 9, torch.Generator().manual_seed(0))
    uniform = torch.rand(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sigmas / (1 - sigmas), odds * uniform / (1 - uniform), rtol=1e-3, atol=0)


def test_timesteps_that_are_chosen_are_drawn_as_they_are(pack, core):
    objective = core.objective.with_timesteps(make_objective(pack, sampling_of("FLOW")), "logit-normal")
    assert (objective.sampling, objective.odds) == ("logit-normal", 1.0)


@pytest.mark.parametrize(
    ("name", "side", "odds"),
    [
        ("FLOW", 128, 3.0),
        ("FLOW", 64, 1.5),  # Esser et al. 2024: shift 3 at 1024², and √(m/n) of it
        ("FLUX", 128, math.exp(1.15)),
        ("FLUX", 32, math.exp(0.5)),  # μ from 0.5 at 256² to 1.15 at 1024²
    ],
)
def test_shifted_noise_levels_depend_on_the_image_size(pack, core, name, side, odds):
    objective = core.objective.with_timesteps(make_objective(pack, sampling_of(name), pixels=8), "shifted")
    sigmas = core.objective.draw_sigmas(objective, 9, torch.Generator().manual_seed(0), torch.zeros(1, 16, side, side))
    logits = torch.randn(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sigmas / (1 - sigmas), odds * logits.exp(), rtol=1e-3, atol=0)


def test_a_model_shifted_by_a_node_is_not_shifted_twice(pack, core):
    """ComfyUI's node ModelSamplingFlux sets μ for a given image size."""
    sampling, logits = sampling_of("FLUX"), torch.randn(9, generator=torch.Generator().manual_seed(0))
    sampling.set_parameters(shift=0.5)  # as for 256²
    for side, odds in ((32, math.exp(0.5)), (128, math.exp(1.15))):
        latent = torch.zeros(1, 16, side, side)
        sigmas = core.objective.draw_sigmas(make_objective(pack, sampling), 9, torch.Generator().manual_seed(0), latent)
        torch.testing.assert_close(sigmas / (1 - sigmas), odds * logits.exp(), rtol=1e-3, atol=0)


def test_x0_patched_by_comfyuis_node_has_x0_as_its_target(pack, core):
    import comfy.model_sampling as host

    class Patched(host.ModelSamplingDiscrete, host.X0):
        pass

    objective = make_objective(pack, Patched(Config({})))
    latent, noise = torch.randn(2, 5, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy = objective.add_noise(LEVELS, noise, latent)
    assert objective.prediction == "x0" and torch.equal(
        core.objective.prediction_target(objective, LEVELS, noisy, latent), latent
    )


@pytest.mark.parametrize("name", ["IMG_TO_IMG", "IMG_TO_IMG_FLOW"])
def test_image_to_image_models_are_refused(pack, name):
    import comfy.model_base as base

    with pytest.raises(ValueError, match="turns one image into another"):
        make_objective(pack, base.model_sampling(Config({}), base.ModelType[name]))


def test_a_foreign_model_sampling_is_trained_by_its_behaviour(pack, core):
    class Own:
        """A flow that is not derived from ComfyUI's classes."""

        sigma_max = torch.tensor(1.0)

        def noise_scaling(self, sigma, noise, latent):
            return latent + spread(sigma) * (noise - latent)

        def calculate_denoised(self, sigma, output, noisy):
            return noisy - spread(sigma) * output

        def percent_to_sigma(self, percent):
            return 1 - percent

    objective = make_objective(pack, Own())
    assert (objective.sampling, objective.odds) == ("uniform", 2.0) and objective.sigma_at(0.25) == 0.25
    assert float(core.objective.snr(objective, torch.tensor([0.25]))) == pytest.approx(9)
