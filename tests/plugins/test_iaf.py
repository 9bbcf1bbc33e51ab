"""Laws of the flow: its density is that of its draws, it reaches correlated posteriors, and it remembers nothing."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import harness
from harness.evaluator import EvaluationRun
from harness.model import log_normal
from harness.posterior import HasDensity, HasPointDensity
from harness.testing import SmallProblem, check_method
from harness.testing.small import view_of
from harness_plugins.exact import Exact
from harness_plugins.iaf import IAF, FlowEncoder, FlowPosterior
from harness_plugins.linear_gaussian import LinearGaussian, LinearGaussianModel

CPU, DOUBLE = torch.device("cpu"), torch.float64


def encoder(latent_dim: int = 3, flows: int = 2) -> tuple[FlowEncoder, Tensor]:
    """An encoder with random weights, larger than at the start of a fit, and observations."""
    view = view_of(SmallProblem(latent_dim=latent_dim))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        built = IAF(flows=flows, hidden=12, context_dim=4).build(view)["encoder"].double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(2)
    return built.requires_grad_(False), view.validation


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=DOUBLE)


@pytest.mark.parametrize("latent_dim", [1, 5])
def test_any_number_of_dimensions(latent_dim: int) -> None:
    """One too, where a flow is an affine map given x; Pyro's warning of it would be an error here."""
    check_method(IAF(hidden=8), SmallProblem(latent_dim=latent_dim))


def test_too_few_hidden_units_are_met_by_a_reason() -> None:
    reason = IAF(hidden=4).unfit(view_of(SmallProblem(latent_dim=5)))
    assert reason == "hidden=4: every latent dimension needs a hidden unit, and there are 5"
    assert IAF(hidden=5).unfit(view_of(SmallProblem(latent_dim=5))) is None


@pytest.mark.parametrize("flows", [1, 2, 3])
def test_the_density_is_that_of_the_map(flows: int, generator: torch.Generator) -> None:
    """log q(z|x) = log N(eps) - log |det dz/deps|, with the determinant by automatic differentiation."""
    flow, x = encoder(flows=flows)
    for one in x[:3]:
        eps = normal(generator, 1, 3)
        z, log_q = flow(one[None], eps)
        jacobian = torch.autograd.functional.jacobian(lambda e, one=one: flow(one[None], e[None])[0][0], eps[0])
        expected = log_normal(eps) - torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(log_q, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(flow.log_prob(one[None], z), expected, rtol=0, atol=1e-10)


def test_the_order_of_the_dimensions_is_reversed_from_layer_to_layer(generator: torch.Generator) -> None:
    """One layer has a triangular Jacobian; in two, every dimension of z depends on every dimension of the noise."""

    def jacobian(flows: int) -> Tensor:
        flow, x = encoder(flows=flows)
        eps = normal(generator, 3)
        return torch.autograd.functional.jacobian(lambda e: flow(x[:1], e[None])[0][0], eps)

    assert not jacobian(1).triu(1).any()
    assert bool((jacobian(1).tril() != 0).sum() == 6)
    assert bool((jacobian(2) != 0).all())


def test_each_latent_meets_its_own_observation(generator: torch.Generator) -> None:
    flow, x = encoder()
    eps = normal(generator, 4, len(x), 3)
    z, log_q = flow(x, eps)
    assert (z.shape, log_q.shape) == ((4, len(x), 3), (4, len(x)))
    density = flow.log_prob(x, z)
    for s in range(4):
        for i in range(len(x)):
            alone, log_q_alone = flow(x[i : i + 1], eps[s, i : i + 1])
            torch.testing.assert_close(alone[0], z[s, i], rtol=0, atol=1e-12)
            torch.testing.assert_close(log_q_alone[0], log_q[s, i], rtol=0, atol=1e-12)
            torch.testing.assert_close(density[s, i], log_q[s, i], rtol=0, atol=1e-10)
    other = flow.log_prob(x, z.flip(1))  # not where the draws are: latents of other observations
    assert not torch.allclose(other, density)


def test_the_density_is_that_of_the_weights_as_they_are_now(generator: torch.Generator) -> None:
    """Pyro's transforms remember their last arguments: what was drawn before a step must not be scored as then."""
    flow, x = encoder()
    z, before = flow(x, normal(generator, 2, len(x), 3))
    for parameter in flow.parameters():
        parameter.mul_(0.9)
    fresh, _ = encoder()
    fresh.load_state_dict(flow.state_dict())
    now = flow.log_prob(x, z)
    torch.testing.assert_close(now, fresh.log_prob(x, z.clone()), rtol=0, atol=0)
    assert not torch.allclose(now, before)


def test_no_tensor_is_kept_in_memory(generator: torch.Generator) -> None:
    """What a step computes goes with it, without the garbage collector."""
    flow, x = encoder()
    posterior = FlowPosterior(flow.requires_grad_(True), 3)

    def tensors() -> int:
        return sum(type(thing) is Tensor for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = tensors()
        z, log_q = posterior.sample_and_log_prob(x, 2, generator)
        scored = posterior.log_prob(x, z.detach())
        assert tensors() > before
        del z, log_q, scored
        assert tensors() == before
    finally:
        gc.enable()


def test_a_flow_finds_correlated_posteriors() -> None:
    """Far below the least gap of any diagonal Gaussian, 0.131 nats; 0.02 is the tolerance for 600 steps."""
    problem, method = LinearGaussian(), IAF(lr=1e-2, lr_decay=0.01, batch_size=256)
    model = problem.model_spec().new_model((problem.data_dim,))
    assert isinstance(model, LinearGaussianModel)
    fit = harness.fit(method, problem, budget="steps=600", device="cpu")
    assert isinstance(fit.posterior, HasDensity)
    assert isinstance(fit.posterior, HasPointDensity)
    run = EvaluationRun(harness.data(problem, device="cpu"), problem, CPU, torch.float32, seed=0)
    with torch.no_grad():
        _, kl = Exact(samples=100).measure(fit, problem, run)
    assert float(model.mean_field_gap()) == pytest.approx(0.1309, abs=1e-4)
    assert kl.stderr < 0.002
    assert -4 * kl.stderr < kl.value < 0.02 + 4 * kl.stderr


def test_options_are_part_of_the_network() -> None:
    """Every layer of the flow is trained, and counted."""
    view = view_of(SmallProblem())

    def parameters(method: IAF) -> int:
        return sum(parameter.numel() for parameter in method.build(view)["encoder"].parameters())

    method = IAF(flows=2, hidden=10, context_dim=4)
    layer = (2 + 4) * 10 + 10 + 10 * 4 + 4
    assert parameters(replace(method, flows=5)) - parameters(method) == 3 * layer
    assert [player.on for player in method.players()] == [("model", "encoder", "kl_weight")]
