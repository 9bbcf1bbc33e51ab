"""The VAE and the IAF of pythae, with the networks of `benchmarks.by_hand`, trained by pythae's own trainer.

Its data sets are fixed, so that the images are binarised once and for all, which costs it nothing while it trains. Its
loader is its own. https://github.com/clementchadebec/benchmark_VAE; needs the extra ``peers``.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path

import torch
from pythae.data.datasets import BaseDataset  # pyright: ignore[reportMissingImports]
from pythae.models import VAE, VAE_IAF, VAE_IAF_Config, VAEConfig  # pyright: ignore[reportMissingImports]
from pythae.models.base.base_utils import ModelOutput  # pyright: ignore[reportMissingImports]
from pythae.models.nn import BaseDecoder, BaseEncoder  # pyright: ignore[reportMissingImports]
from pythae.trainers import BaseTrainer, BaseTrainerConfig  # pyright: ignore[reportMissingImports]
from torch import Tensor

from benchmarks.by_hand import LATENTS, decoder, encoder
from harness_plugins.iaf import IAF

SIDE = 28


class Encoder(BaseEncoder):
    """Mean and log variance."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = encoder()

    def forward(self, x: Tensor) -> ModelOutput:
        mean, log_variance = self.layers(2 * x.flatten(1) - 1).chunk(2, dim=-1)
        return ModelOutput(embedding=mean, log_covariance=log_variance)


class Decoder(BaseDecoder):
    """Probabilities, which is what its likelihood asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = decoder()

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.layers(z).sigmoid().unflatten(-1, (1, SIDE, SIDE)))


def vae() -> VAE:
    config = VAEConfig(input_dim=(1, SIDE, SIDE), latent_dim=LATENTS, reconstruction_loss="bce")
    return VAE(config, Encoder(), Decoder())


def iaf(method: IAF) -> VAE_IAF:
    """Its flows know nothing of x: there is no context."""
    config = VAE_IAF_Config(
        input_dim=(1, SIDE, SIDE),
        latent_dim=LATENTS,
        reconstruction_loss="bce",
        n_made_blocks=method.flows,
        n_hidden_in_made=1,
        hidden_size=method.hidden,
    )
    return VAE_IAF(config, Encoder(), Decoder())


class Trainer:
    """Its trainer with the defaults, but for learning rate and batch size; its progress bar is written to memory.

    Args:
        pixels: Shape (N, 28, 28), uint8.
        out: A folder, which it asks for.
    """

    def __init__(self, model: VAE, pixels: Tensor, lr: float, batch_size: int, out: Path) -> None:
        images = (torch.rand(pixels.shape) < pixels.float() / 255).float()[:, None]
        config = BaseTrainerConfig(
            output_dir=str(out), learning_rate=lr, per_device_train_batch_size=batch_size, no_cuda=True
        )
        self.trainer = BaseTrainer(model, BaseDataset(images, torch.zeros(len(images))), training_config=config)
        self.trainer.prepare_training()
        self.epochs = 0

    def take_epoch(self) -> None:
        """One step for each minibatch."""
        self.epochs += 1
        with redirect_stderr(io.StringIO()):
            self.trainer.train_step(self.epochs)
