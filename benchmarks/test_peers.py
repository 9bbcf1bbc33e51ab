"""The harness's training loop against those of other libraries: the same networks, optimiser and batch size, in turns.

Run with ``pytest benchmarks/test_peers.py --log-cli-level=INFO``; pythae comes with the extra ``peers``. The harness
does what it does at every step of a fit, and draws pixels faster than ``rand(x.shape) < x``, by which those of Pyro's
loop are drawn; pythae's are drawn before it is timed. That both sides minimise the same function of as many parameters
is tested here, but for pythae's IAF: its flows have neither context nor gates.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from benchmarks import by_hand
from benchmarks.by_hand import PIXELS, Images, Loop, PlainlyDrawnImages, copied
from benchmarks.mnist_sized import LOOPS, Looped, MNISTShaped, begun
from benchmarks.peers import PyroIAF, PyroVAE
from benchmarks.turns import CPU, Work, take_turns, tell, times_as_fast
from harness.nn import count_parameters
from harness.problem import placed
from harness.seeding import seeded
from harness.training import GradientMethod
from harness_plugins.avb import AVB
from harness_plugins.iaf import IAF
from harness_plugins.vae import VAE

PROBLEM = MNISTShaped()
STEPS = {128: 40, 512: 20}  # of a turn, by the batch size
PEERS = {
    VAE(): ["pyro", "pythae"],
    IAF(): ["pyro", "pythae"],
    AVB(clip_norm=0): ["two steps"],
}
CASES = [
    pytest.param(replace(method, batch_size=n), peer, id=f"{method.name}-{peer.replace(' ', '-')}-{n}")
    for method, peers in PEERS.items()
    for peer in peers
    for n in {"vae": [128, 512], "iaf": [512], "avb": [128]}[method.name]
]


def pythae_peers() -> Any:
    pytest.importorskip("pythae", reason="pythae is not installed: pip install -c constraints.txt '.[peers]'")
    from benchmarks import pythae_peers

    return pythae_peers


def peer_of(method: GradientMethod, name: str, out: Path) -> tuple[nn.Module, Work]:
    """Networks, and what trains them for a turn: as many steps as the harness takes in its own."""
    pixels, batch_size = placed(PROBLEM, CPU, torch.float32).train.values, method.batch_size
    steps = STEPS[batch_size]
    if name == "pythae":
        peers = pythae_peers()
        model = peers.iaf(method) if isinstance(method, IAF) else peers.vae()
        trainer = peers.Trainer(model, pixels[: steps * batch_size], method.config["lr"], batch_size, out)
        return model, trainer.take_epoch
    if isinstance(method, AVB):
        networks = by_hand.TwoStepAVB(method.lr, method.adversary_lr, method.beta1)
        loop = Loop(networks, Images(pixels, batch_size))
        return networks, lambda: loop.take(steps)
    images = PlainlyDrawnImages(pixels, batch_size)
    peer = PyroIAF(method, images) if isinstance(method, IAF) else PyroVAE(method.config["lr"], images)
    return peer, lambda: peer.take(steps)


@pytest.mark.parametrize(("method", "peer"), CASES)
def test_loop(benchmark: BenchmarkFixture, tmp_path: Path, method: GradientMethod, peer: str) -> None:
    steps = STEPS[method.batch_size]
    with seeded(0):
        networks, theirs = peer_of(method, peer, tmp_path)
    view, _ = begun(method, PROBLEM)
    parameters = count_parameters(method.build(view))
    assert count_parameters(networks) + without_context(method, peer) == parameters
    loops = {name: Looped(method, PROBLEM, step=step) for name, step in LOOPS.items()}
    ours = {name: partial(loop, steps) for name, loop in loops.items()}
    times = take_turns(benchmark, {**ours, peer: theirs}, rounds=30, warm_up=2)
    tell(
        benchmark,
        f"training loop, {method.name}, batch {method.batch_size}",
        parameters=parameters,
        steps_per_second={way: steps / statistics.median(found) for way, found in times.items()},
        compile_seconds={name: loop.compile_seconds for name, loop in loops.items()},
        ratios=times_as_fast(times, *LOOPS, of_one=steps),
    )


def without_context(method: GradientMethod, peer: str) -> int:
    """Parameters that a peer has to do without: pythae's flows are not conditioned on x."""
    if not isinstance(method, IAF) or peer != "pythae":
        return 0
    return (by_hand.WIDTH + 1) * method.context_dim + method.flows * method.context_dim * method.hidden


# The losses are the same, on the same weights, images and noise, but for the rounding of float32


def binary_images(n: int) -> torch.Tensor:
    with seeded(1):
        return (torch.rand(n, PIXELS) < 0.3).float()


def test_the_loss_of_the_vae_in_pyro_is_the_harnesss() -> None:
    x = binary_images(16)
    networks, peer = by_hand.VAE(1e-3), PyroVAE(1e-3, Images(x, 16))
    copied(peer.encoder.parameters(), networks.encoder.parameters())
    copied(peer.decoder.parameters(), networks.decoder.parameters())
    with seeded(0):
        [expected] = networks.losses(x, [torch.randn(16, by_hand.LATENTS)])
    with seeded(0):
        found = peer.loss(x)
    assert found == pytest.approx(float(expected.detach()), rel=1e-5)


def test_the_loss_of_the_iaf_in_pyro_is_the_harnesss() -> None:
    method, x = IAF(), binary_images(16)
    modules = method.build(begun(method, PROBLEM)[0])
    peer = PyroIAF(method, Images(x, 16))
    trunk, head, flows = (modules["encoder"].get_submodule(name) for name in ("trunk", "head", "layers"))
    copied(peer.encoder.parameters(), [*trunk.parameters(), *head.parameters()])
    copied(peer.flows.parameters(), flows.parameters())
    copied(peer.decoder.parameters(), modules["model"].parameters())
    with seeded(0):
        losses = method.losses(modules, x, {"eps": torch.randn(16, by_hand.LATENTS)})
    with seeded(0):
        found = peer.loss(x)
    assert found == pytest.approx(float(losses["negative_elbo"].detach()), rel=1e-5)


def test_the_loss_of_the_vae_in_pythae_is_the_harnesss() -> None:
    peer, x = pythae_peers().vae(), binary_images(16)
    networks = by_hand.VAE(1e-3)
    copied(peer.decoder.parameters(), networks.decoder.parameters())
    copied(peer.encoder.parameters(), networks.encoder.parameters())
    with torch.no_grad():  # its encoder's second output is a log variance, ours the half of it
        last = peer.encoder.layers[-1]
        last.weight[by_hand.LATENTS :] *= 2
        last.bias[by_hand.LATENTS :] *= 2
    with seeded(0):
        [expected] = networks.losses(x, [torch.randn(16, by_hand.LATENTS)])
    with seeded(0):
        found = peer({"data": x.unflatten(1, (1, 28, 28))}).loss
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_the_first_of_two_steps_of_avb_is_that_from_the_shared_forward_pass() -> None:
    shared, apart = stepped_avb(lr=1e-3)
    torch.testing.assert_close(parameters_of(apart.decoder), parameters_of(shared.decoder), rtol=0, atol=1e-9)
    torch.testing.assert_close(parameters_of(apart.encoder), parameters_of(shared.encoder), rtol=0, atol=1e-9)


def test_the_second_of_two_steps_of_avb_is_that_from_the_shared_forward_pass_if_the_encoder_stays() -> None:
    shared, apart = stepped_avb(lr=0.0)
    torch.testing.assert_close(parameters_of(apart.adversary), parameters_of(shared.adversary), rtol=0, atol=1e-9)


def stepped_avb(lr: float) -> tuple[by_hand.AVB, by_hand.AVB]:
    """Both forms after a step from the same weights with the same noise, in float64."""
    shared, apart = by_hand.SharedForwardAVB(lr, 1e-3, 0.5).double(), by_hand.TwoStepAVB(lr, 1e-3, 0.5).double()
    copied(apart.parameters(), shared.parameters())
    with seeded(0):
        noise = [torch.randn(16, size, dtype=torch.float64) for size in shared.noise_sizes]
    for networks in (shared, apart):
        networks.step(binary_images(16).double(), noise)
    return shared, apart


def parameters_of(networks: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in networks.parameters()]
