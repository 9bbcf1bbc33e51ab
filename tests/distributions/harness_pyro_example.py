"""A Pyro guide as a method, and a Pyro program as a problem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from harness import hookimpl
from harness.nn import Trunk, linear
from harness.problem import TrainingView
from harness.pyro_guide import GuideMethod
from harness.pyro_problem import PyroProblem


class Guide(nn.Module):
    """q(z|x): independent Student's t distributions that share their degrees of freedom."""

    def __init__(self, trunk: Trunk, latent_dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = linear(trunk.features, 2 * latent_dim)

    def forward(self, x: Tensor) -> None:
        import pyro
        import pyro.distributions as dist

        centre, log_scale = self.head(self.trunk(x)).chunk(2, dim=-1)
        freedom = pyro.param("freedom", torch.tensor(10.0), constraint=dist.constraints.greater_than(2.0))
        with pyro.plate("observations", len(x)):
            pyro.sample("z", dist.StudentT(freedom, centre, torch.exp(log_scale)).to_event(1))


@dataclass(frozen=True, kw_only=True)
class StudentVAE(GuideMethod):
    """VAE whose posterior has heavy tails."""

    name: str = "student-vae"

    def guide(self, view: TrainingView) -> Guide:
        return Guide(view.encoder_trunk(), view.latent_dim)


@dataclass(frozen=True, kw_only=True)
class Repeated(PyroProblem):
    """A length measured six times, with an error that nobody knows."""

    name: str = "repeated"

    def observed(self) -> Mapping[str, np.ndarray]:
        return {"y": np.array([9.8, 10.4, 10.1, 9.6, 11.0, 10.2])}

    def pyro_model(self) -> None:
        import pyro
        import pyro.distributions as dist

        length = pyro.sample("length", dist.Normal(10.0, 5.0))
        error = pyro.sample("error", dist.HalfNormal(2.0))
        with pyro.plate("measurements", 6):
            pyro.sample("y", dist.Normal(length, error))


@hookimpl
def harness_methods() -> list[StudentVAE]:
    return [StudentVAE()]


@hookimpl
def harness_problems() -> list[Repeated]:
    return [Repeated()]
