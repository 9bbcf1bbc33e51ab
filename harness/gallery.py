"""Arrays for the figures of a report, computed once after a fit, so that a report needs no model and no torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from harness.method import Fit
from harness.model import CanSimulate, HasExactDraws, HasPlanes, LatentModel, NamesQuantities
from harness.problem import DeviceData
from harness.seeding import generator

LATENT_DRAWS = 4000
SAMPLES = 64
RECONSTRUCTIONS = 10
POSTERIOR_DRAWS = 4000
MOST_DIMENSIONS = 16  # of a latent space whose draws are kept
CELLS = 120
"""A side of the grid on which the density in a plane is kept."""
BEYOND = 0.1
"""Part of the range of exact draws by which that grid reaches further on either side."""


@torch.no_grad()
def gallery(fit: Fit, data: DeviceData, seed: int) -> dict[str, np.ndarray]:
    """What can be shown of a fit.

    Returns:
        latent (M, 2) and latent_label (M,): draws of the aggregate posterior over test observations, where D = 2.
        samples (64, H, W): E[x|z] for draws z from the prior; observed and reconstructed (n, H, W): test observations
        and E[x|z] for one draw z from q(z|x) each; where observations have an image's shape.
        quantities (4000, Q) and quantity_names (Q,): the model's named quantities, else its latents z1, z2 ..., of
        draws from q(z|x) for the one test observation, where there is one only and D is at most 16; exact_quantities
        (4000, Q): of as many draws from p(z|x), where these are to be had. planes (P, 2), names, with plane_axes
        (P, 2, 120) and plane_density (P, 120, 120), the second quantity along its rows: exact densities in planes.
    """
    stream = generator(data.test.device, "gallery", seed)
    shown: dict[str, Tensor] = {}
    if fit.model.latent_dim == 2:
        shown |= _latent(fit, data, stream)
    if len(data.spec.event_shape) == 2 and isinstance(fit.model, CanSimulate):
        observed, _ = data.scored(RECONSTRUCTIONS)
        z = fit.posterior.sample(observed, 1, stream)
        shown["samples"] = fit.model.mean(fit.model.sample_prior(SAMPLES, stream))
        shown["observed"], shown["reconstructed"] = observed, fit.model.mean(z)[0]
    arrays = {name: tensor.cpu().numpy() for name, tensor in shown.items()}
    if len(data.test) == 1 and fit.model.latent_dim <= MOST_DIMENSIONS:
        arrays |= _of_one_posterior(fit, data.test, stream)
    return arrays


def _latent(fit: Fit, data: DeviceData, stream: torch.Generator) -> dict[str, Tensor]:
    x, indices = data.scored(LATENT_DRAWS)
    z = fit.posterior.sample(x, max(1, LATENT_DRAWS // len(x)), stream)
    labels = data.spec.test_labels
    label = np.zeros(len(data.test), dtype=np.int64) if labels is None else labels
    label_of_draw = torch.from_numpy(np.asarray(label)).to(indices.device)[indices].expand(z.shape[:2])
    return {"latent": z.flatten(0, 1), "latent_label": label_of_draw.flatten()}


def _of_one_posterior(fit: Fit, x: Tensor, stream: torch.Generator) -> dict[str, np.ndarray]:
    drawn = _quantities(fit.model, fit.posterior.sample(x, POSTERIOR_DRAWS, stream)[:, 0])
    arrays = {"quantity_names": np.array(list(drawn)), "quantities": _columns(drawn)}
    if isinstance(fit.model, HasExactDraws):
        exact = fit.model.sample_exact_posterior(x, POSTERIOR_DRAWS, stream)[:, 0]
        known = _quantities(fit.model, exact)
        arrays["exact_quantities"] = _columns(known)
        if isinstance(fit.model, HasPlanes):
            arrays |= _in_planes(fit.model, x, known)
    return arrays


def _in_planes(model: HasPlanes, x: Tensor, exact: dict[str, Tensor]) -> dict[str, np.ndarray]:
    axes: list[Tensor] = []
    densities: list[Tensor] = []
    for plane in model.planes:
        sides = torch.stack([_side(exact[name].double()) for name in plane])
        points = torch.stack(torch.meshgrid(*sides, indexing="xy"), dim=-1)
        axes.append(sides)
        densities.append(model.log_density_in_plane(x, plane, points).exp())
    stacked = {"plane_axes": torch.stack(axes), "plane_density": torch.stack(densities)}
    return {"planes": np.array(model.planes), **{name: each.cpu().numpy() for name, each in stacked.items()}}


def _side(draws: Tensor) -> Tensor:
    low, high = draws.aminmax()
    reach = BEYOND * (high - low)
    return torch.linspace(0, 1, CELLS, dtype=draws.dtype, device=draws.device) * (high - low + 2 * reach) + low - reach


def _quantities(model: LatentModel, z: Tensor) -> dict[str, Tensor]:
    """Each (M,), by name, of latents (M, D)."""
    if isinstance(model, NamesQuantities):
        return model.quantities(z)
    return {f"z{i + 1}": column for i, column in enumerate(z.unbind(-1))}


def _columns(quantities: dict[str, Tensor]) -> np.ndarray:
    return torch.stack(list(quantities.values()), dim=-1).cpu().numpy()
