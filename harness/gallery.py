"""Arrays for the figures of a report, computed once after a fit, so that a report needs no model and no torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from harness.method import Fit
from harness.model import CanSimulate
from harness.problem import DeviceData
from harness.seeding import generator

LATENT_DRAWS = 4000
SAMPLES = 64
RECONSTRUCTIONS = 10


@torch.no_grad()
def gallery(fit: Fit, data: DeviceData, seed: int) -> dict[str, np.ndarray]:
    """What can be shown of a fit.

    Returns:
        latent (M, 2) and latent_label (M,): draws of the aggregate posterior over test observations, where D = 2.
        samples (64, H, W): E[x|z] for draws z from the prior; observed and reconstructed (n, H, W): test observations
        and E[x|z] for one draw z from q(z|x) each; where observations have an image's shape.
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
    return {name: tensor.cpu().numpy() for name, tensor in shown.items()}


def _latent(fit: Fit, data: DeviceData, stream: torch.Generator) -> dict[str, Tensor]:
    x, indices = data.scored(LATENT_DRAWS)
    z = fit.posterior.sample(x, max(1, LATENT_DRAWS // len(x)), stream)
    labels = data.spec.test_labels
    label = np.zeros(len(data.test), dtype=np.int64) if labels is None else labels
    label_of_draw = torch.from_numpy(np.asarray(label)).to(indices.device)[indices].expand(z.shape[:2])
    return {"latent": z.flatten(0, 1), "latent_label": label_of_draw.flatten()}
