"""Convolutional model specs, and problems whose networks are chosen by name.

After the code of Mescheder, Nowozin, Geiger 2017, https://github.com/LMescheder/AdversarialVariationalBayes. Its fully
connected networks full0 have no spec of their own: `MLPSpec` has their sizes. That adds the noise before each
activation, where full0 adds it to x and behind each activation, and full0 comes without a discriminator. The networks
conv2 and conv3, for CelebA, are left out.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt

from harness import convolutions
from harness.convolutions import ConvolutionalDecoder, ConvolutionalTrunk, Size
from harness.model import DecoderModel, LatentModel, LikelihoodName, likelihood_named
from harness.nn import Activation, InnerProductPairTrunk, Trunk
from harness.options import UserError, defaults
from harness.problem import MLPSpec, ModelSpec, Problem

SMALLEST_SIDE = 8

Channels = tuple[PositiveInt, ...]


@dataclass(frozen=True, kw_only=True)
class ConvolutionalSpec(ModelSpec):
    """Convolutional encoder trunk and its mirror image as decoder, for images (H, W); see `harness.convolutions`.

    Documented departures from the AVB paper's code: every method has the same trunk (there, the VAE's conv1 has
    softplus where AVB's has ELU), initial weights are Glorot-uniform everywhere, and a Gaussian likelihood has one
    learnt scale and no sigmoid around its mean, as in `MLPSpec`.

    Args:
        channels: Of the encoder's convolutions; the decoder has them in reverse.
        encoder_dense, decoder_dense: Units of a fully connected layer between maps and latents; 0 for none.
    """

    modules: ClassVar[tuple[ModuleType, ...]] = (convolutions,)

    latent_dim: PositiveInt
    likelihood: LikelihoodName = "bernoulli"
    channels: Channels
    encoder_dense: NonNegativeInt = 0
    decoder_dense: NonNegativeInt = 0
    encoder_activation: Activation = "elu"
    decoder_activation: Activation = "elu"

    @abstractmethod
    def strides(self, size: Size) -> tuple[int, ...]:
        """Of the encoder's convolutions."""

    @property
    def _centre(self) -> bool:
        return self.likelihood == "bernoulli"

    def unfit(self, event_shape: tuple[int, ...]) -> str | None:
        if len(event_shape) == 2 and min(event_shape) >= SMALLEST_SIDE:
            return None
        return (
            f"convolutional networks need images (height, width) of at least {SMALLEST_SIDE} pixels a side, got "
            f"observations of shape {event_shape}; use model=mlp"
        )

    def size(self, event_shape: tuple[int, ...]) -> Size:
        """Height and width.

        Raises:
            UserError: If observations are no images, or too small.
        """
        reason = self.unfit(event_shape)
        if reason is not None:
            raise UserError(reason)
        return event_shape[0], event_shape[1]

    def new_model(self, event_shape: tuple[int, ...]) -> LatentModel:
        size = self.size(event_shape)
        shape = (size, self.channels, self.strides(size))
        decoder = ConvolutionalDecoder(self.latent_dim, *shape, self.decoder_dense, self.decoder_activation)
        return DecoderModel(self.latent_dim, event_shape, decoder, likelihood_named(self.likelihood))

    def encoder_trunk(self, event_shape: tuple[int, ...], noise_dim: int) -> Trunk:
        size = self.size(event_shape)
        shape = (size, self.channels, self.strides(size))
        return ConvolutionalTrunk(
            *shape, self.encoder_dense, self.encoder_activation, centre=self._centre, injected=noise_dim
        )


@dataclass(frozen=True, kw_only=True)
class Conv1Spec(ConvolutionalSpec):
    """The networks conv1 of the AVB paper's code: every convolution halves the sides, from 28 to 14, 7 and 4.

    The discriminator is convolutional, with a linear map of z added to every feature map. Documented departure: there
    it has 64, 128, 256 and 512 channels and strides as in `Conv0Spec`; on images of 28 pixels it costs 170 times as
    much as encoder and decoder together, seconds a step on a CPU. Here it has a quarter of the channels and halves the
    sides each time, which costs about as much as these.
    """

    channels: Channels = (16, 32, 32)
    encoder_dense: NonNegativeInt = 800
    decoder_dense: NonNegativeInt = 300
    decoder_activation: Activation = "softplus"
    pair_channels: Channels = (16, 32, 64, 128)
    pair_activation: Activation = "elu"

    def strides(self, size: Size) -> tuple[int, ...]:
        return (2,) * len(self.channels)

    def pair_trunk(self, event_shape: tuple[int, ...]) -> Trunk:
        strides = (2,) * len(self.pair_channels)
        return ConvolutionalTrunk(
            self.size(event_shape),
            self.pair_channels,
            strides,
            0,
            self.pair_activation,
            centre=self._centre,
            injected=self.latent_dim,
        )


@dataclass(frozen=True, kw_only=True)
class Conv0Spec(ConvolutionalSpec):
    """The networks conv0 of the AVB paper's code: large, meant for a GPU.

    The last convolutions halve the sides, as many as leave 4 to 7 pixels: maps of 28, 28, 14 and 7 for images of 28.
    Documented departures: the decoder's hidden layers have the ELU that the code intends, not the ReLU that a helper's
    default gives them. The discriminator has the form of `InnerProductPairTrunk`: theta(x) shares its hidden layers
    with T(x), and s(z) with T(z), products are weighed by the method's head, and theta(x) has no activation.
    """

    channels: Channels = (64, 128, 256, 512)
    pair_width: PositiveInt = 1024
    pair_depth: PositiveInt = 3
    pair_rank: PositiveInt = 8192
    pair_activation: Activation = "leaky-relu"

    def strides(self, size: Size) -> tuple[int, ...]:
        layers = len(self.channels)
        halvings = min(layers, int(math.log2(min(size))) - 2)
        return (1,) * (layers - halvings) + (2,) * halvings

    def pair_trunk(self, event_shape: tuple[int, ...]) -> Trunk:
        sizes = (math.prod(self.size(event_shape)), self.latent_dim, self.pair_width, self.pair_depth, self.pair_rank)
        return InnerProductPairTrunk(*sizes, self.pair_activation, centre=False)


ModelName = Literal["mlp", "conv1", "conv0"]

_CONVOLUTIONAL: dict[ModelName, type[Conv1Spec] | type[Conv0Spec]] = {"conv1": Conv1Spec, "conv0": Conv0Spec}
_MLP_OPTIONS = ("width", "depth", "activation")


@dataclass(frozen=True, kw_only=True)
class NetworksProblem(Problem):
    """A problem whose networks are chosen by name.

    Args:
        model: Fully connected (``mlp``), or convolutional, for images: ``conv1``, or ``conv0``, which wants a GPU.
        width, depth, activation: Of the hidden layers of ``mlp``; the other models have sizes of their own.
    """

    model: ModelName = "mlp"
    latent_dim: PositiveInt = 32
    width: PositiveInt = 300
    depth: NonNegativeInt = 2
    activation: Activation = "softplus"

    def __post_init__(self) -> None:
        super().__post_init__()
        usual = defaults(type(self))
        foreign = [key for key in _MLP_OPTIONS if getattr(self, key) != usual[key]]
        if self.model != "mlp" and foreign:
            raise UserError(
                f"{self.name}: option {foreign[0]} belongs to model=mlp; leave it out, as model={self.model} has "
                "sizes of its own"
            )

    def networks(self, likelihood: LikelihoodName, pair_width: int = 512) -> ModelSpec:
        """The spec that the options name.

        Args:
            pair_width: Of the pair trunk of ``mlp``.
        """
        if self.model != "mlp":
            return _CONVOLUTIONAL[self.model](latent_dim=self.latent_dim, likelihood=likelihood)
        return MLPSpec(
            latent_dim=self.latent_dim,
            width=self.width,
            depth=self.depth,
            activation=self.activation,
            likelihood=likelihood,
            pair_width=pair_width,
        )
