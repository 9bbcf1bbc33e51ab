"""Networks of adversarial methods: an implicit encoder, and the adversary that learns a log density ratio.

Mescheder, Nowozin, Geiger 2017, https://arxiv.org/abs/1701.04722
"""

from __future__ import annotations

from torch import Tensor, nn

from harness.nn import Trunk, linear


class NoiseInjectedEncoder(nn.Module):
    """z = z_phi(x, eps): x (N, *E) and eps (..., N, noise_dim) -> (..., N, D)."""

    def __init__(self, trunk: Trunk, noise_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = linear(trunk.features, latent_dim)
        self.injection = linear(noise_dim, latent_dim, bias=False)

    def forward(self, x: Tensor, eps: Tensor) -> Tensor:
        return self.head(self.trunk(x, eps)) + self.injection(eps)


class LogRatio(nn.Module):
    """T(x, z) = network + |z|^2/2: the network has to learn log q up to a constant, not log q - log p.

    x (N, *E) and z (..., N, D) -> (..., N), nats.

    Args:
        quadratic: Whether |z|^2/2 is added; else T is the network alone.
    """

    def __init__(self, trunk: Trunk, *, quadratic: bool = True) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = linear(trunk.features, 1)
        self.quadratic = quadratic

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        t = self.head(self.trunk(x, z)).squeeze(-1)
        return t + 0.5 * z.square().sum(-1) if self.quadratic else t
