r"""The oracle: a linear-Gaussian model, in which evidence, posterior and best mean-field posterior are known exactly.

.. math:: z \sim N(0, I_D), \quad x = W z + b + \sigma \epsilon, \quad \epsilon \sim N(0, I_E), \quad W^\top W = s^2 C

where C has unit diagonal and the correlation rho everywhere else, so that the posterior precision is I + (s/sigma)^2 C.
Probabilistic PCA: Tipping and Bishop 1999, https://doi.org/10.1111/1467-9868.00196
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from harness import hookimpl
from harness.model import LOG_2PI, DecoderModel, GaussianLikelihood, LatentModel
from harness.nn import EncoderTrunk, ResidualPairTrunk, Trunk, linear
from harness.options import UserError
from harness.problem import DatasetSpec, ModelSpec, Problem
from harness.seeding import derive

Correlation = Annotated[float, Field(ge=0, lt=1)]


class LinearGaussianModel(DecoderModel):
    """p(x|z) = N(Wz + b, sd^2 I). Closed forms are computed in float64, whatever the model's own precision."""

    def __init__(self, latent_dim: int, data_dim: int) -> None:
        super().__init__(latent_dim, (data_dim,), linear(latent_dim, data_dim), GaussianLikelihood())

    @staticmethod
    def fixed(weight: np.ndarray, bias: np.ndarray, sd: float) -> LinearGaussianModel:
        """A model without parameters, from W (E, D) and b (E,)."""
        model = LinearGaussianModel(weight.shape[1], weight.shape[0])
        _fix(model.decoder, {"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
        _fix(model.likelihood, {"log_sd": torch.tensor(math.log(sd), dtype=torch.float64)})
        return model

    def log_evidence(self, x: Tensor) -> Tensor:
        """log N(x; b, W W^T + sd^2 I): (N, E) -> (N,), nats, float64."""
        weight, bias, variance = self._facts()
        covariance = weight @ weight.T + variance * torch.eye(len(bias), dtype=bias.dtype, device=bias.device)
        return MultivariateNormal(bias, covariance).log_prob(x.double())

    def exact_posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (N, D) and covariance (D, D) of p(z|x), float64."""
        weight, bias, variance = self._facts()
        cholesky = torch.linalg.cholesky(self._precision())
        scaled = (x.double() - bias) @ weight / variance
        return torch.cholesky_solve(scaled.T, cholesky).T, torch.cholesky_inverse(cholesky)

    def sample_exact_posterior(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Independent draws from p(z|x): x (N, E) -> (n, N, D), of the dtype of x."""
        mean, covariance = self.exact_posterior(x)
        noise = torch.randn((n, *mean.shape), generator=generator, device=mean.device, dtype=mean.dtype)
        return (mean + noise @ torch.linalg.cholesky(covariance).T).to(x.dtype)

    def best_mean_field(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (N, D) and standard deviations (D,) of the diagonal Gaussian q that minimises KL(q || p(z|x))."""
        return self.exact_posterior(x)[0], self._precision().diagonal().rsqrt()

    def mean_field_gap(self) -> Tensor:
        r"""The least KL(q || p(z|x)) of a diagonal Gaussian q, the same for every x: a scalar, nats.

        .. math:: \tfrac12 \bigl(\textstyle\sum_i \log \Lambda_{ii} - \log\det \Lambda\bigr)
        """
        precision = self._precision()
        return 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))

    def _precision(self) -> Tensor:
        weight, _, variance = self._facts()
        return torch.eye(self.latent_dim, dtype=weight.dtype, device=weight.device) + weight.T @ weight / variance

    def _facts(self) -> tuple[Tensor, Tensor, Tensor]:
        """W (E, D), b (E,) and the noise variance, float64, whether they are parameters or not."""
        tensors = {name: tensor.double() for name, tensor in self.state_dict().items()}
        return tensors["decoder.weight"], tensors["decoder.bias"], torch.exp(2 * tensors["likelihood.log_sd"])


def _fix(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Put constants in the place of a module's parameters."""
    for name, value in values.items():
        delattr(module, name)
        module.register_buffer(name, value)


@dataclass(frozen=True, kw_only=True)
class LinearGaussianSpec(ModelSpec):
    """The model, an encoder trunk that is x itself (linear heads reach the exact mean) and a residual pair trunk."""

    latent_dim: int
    correlation: float
    scale: float
    noise: float
    learn: bool

    def new_model(self, event_shape: tuple[int, ...]) -> LatentModel:
        if self.learn:
            return LinearGaussianModel(self.latent_dim, event_shape[0])
        weight, bias = true_parameters(self.latent_dim, event_shape[0], self.correlation, self.scale)
        return LinearGaussianModel.fixed(weight, bias, self.noise)

    def encoder_trunk(self, event_shape: tuple[int, ...], noise_dim: int) -> Trunk:
        return EncoderTrunk(event_shape[0], 1, 0, "elu", centre=False, noise_dim=noise_dim)

    def pair_trunk(self, event_shape: tuple[int, ...]) -> Trunk:
        return ResidualPairTrunk(event_shape[0], self.latent_dim, 64, 2, "elu", centre=False)


def true_parameters(latent_dim: int, data_dim: int, correlation: float, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """W (E, D) with W^T W = scale^2 C, and b (E,), float64; each from a fixed stream."""
    directions, _ = np.linalg.qr(_stream("directions").standard_normal((data_dim, latent_dim)))
    gram = (1 - correlation) * np.eye(latent_dim) + correlation
    return scale * directions @ np.linalg.cholesky(gram).T, _stream("bias").standard_normal(data_dim)


def _stream(purpose: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(derive("linear-gaussian", purpose)))


@dataclass(frozen=True, kw_only=True)
class LinearGaussian(Problem):
    """Data from a known linear-Gaussian model, the same for all jobs.

    By default importance weights have a finite variance even for the best mean-field posterior, widened by 1.2, alone
    (the smallest posterior precision exceeds its diagonal / (2 * 1.2^2)), and that posterior's gap is 0.13 nats.

    Args:
        correlation: rho, between any two columns of W: what makes the exact posterior correlated.
        scale: s, the length of each column of W.
        noise: sigma.
        learn: Learn W, b and sigma; else they are known and the model has no parameters.
    """

    name: str = "linear-gaussian"
    latent_dim: PositiveInt = 2
    data_dim: PositiveInt = 10
    correlation: Correlation = 0.6
    scale: PositiveFloat = 1.0
    noise: PositiveFloat = 0.5
    learn: bool = False
    n_train: PositiveInt = 10_000
    n_validation: PositiveInt = 1000
    n_test: PositiveInt = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_dim < self.latent_dim:
            raise UserError(
                f"{self.name}: option data_dim={self.data_dim}: must be at least latent_dim, which is {self.latent_dim}"
            )

    @property
    def default_budget(self) -> str:
        return "steps=15000"

    @property
    def optimum(self) -> float:
        """Minus the entropy of x: the covariance has the determinant sigma^(2E) det Lambda."""
        ratio, d = (self.scale / self.noise) ** 2, self.latent_dim
        log_det = math.log1p(ratio * (1 + (d - 1) * self.correlation))
        log_det += (d - 1) * math.log1p(ratio * (1 - self.correlation))
        return -0.5 * (self.data_dim * (1 + LOG_2PI + 2 * math.log(self.noise)) + log_det)

    def dataset(self) -> DatasetSpec:
        train, validation = self._draw(self.n_train, "train"), self._draw(self.n_validation, "validation")
        return DatasetSpec(self.name, train, validation, self._draw(self.n_test, "test"))

    def _draw(self, n: int, split: str) -> np.ndarray:
        weight, bias = true_parameters(self.latent_dim, self.data_dim, self.correlation, self.scale)
        stream = _stream(split)
        z = stream.standard_normal((n, self.latent_dim))
        return (z @ weight.T + bias + self.noise * stream.standard_normal((n, self.data_dim))).astype(np.float32)

    def model_spec(self) -> ModelSpec:
        return LinearGaussianSpec(
            latent_dim=self.latent_dim,
            correlation=self.correlation,
            scale=self.scale,
            noise=self.noise,
            learn=self.learn,
        )


@hookimpl
def harness_problems() -> list[LinearGaussian]:
    return [LinearGaussian()]
