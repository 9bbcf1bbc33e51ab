"""Methods and evaluators need not know what kind of networks a problem has: the same checks, on convolutional ones."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from harness.cli import main
from harness.method import Method
from harness.nn import count_parameters
from harness.problem import DatasetSpec, ModelSpec, Problem
from harness.registry import Registry
from harness.specs import Conv1Spec
from harness.store import Store
from harness.testing import check_method, check_problem
from harness.testing.small import view_of

METHODS = Registry.discover().methods


@dataclass(frozen=True, kw_only=True)
class SmallImages(Problem):
    """Binary 8x9 images of a bright rectangle, and convolutional networks of a few channels."""

    name: str = "small-images"

    @property
    def default_budget(self) -> str:
        return "steps=20"

    def dataset(self) -> DatasetSpec:
        corners = np.random.default_rng(0).integers(1, 8, (32, 2))
        images = np.zeros((32, 8, 9), dtype=np.float32)
        for image, (height, width) in zip(images, corners, strict=True):
            image[:height, :width] = 1
        return DatasetSpec(self.name, images[:16], images[16:24], images[24:], binarisation="static")

    def model_spec(self) -> ModelSpec:
        return Conv1Spec(latent_dim=2, channels=(2, 3), encoder_dense=6, decoder_dense=5, pair_channels=(3, 2))


def test_problem() -> None:
    check_problem(SmallImages())


@pytest.mark.parametrize("method", [pytest.param(provided.thing, id=name) for name, provided in METHODS.items()])
def test_method(method: Method) -> None:
    reason = method.unfit(view_of(SmallImages()))
    if reason is not None:
        assert reason.strip()
    else:
        check_method(method, SmallImages())


def test_a_comparison_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--methods", "vae,avb", "--problems", "digits[model=conv1]", "--budget", "steps=5", "--seeds", "1"]
    evaluators = "elbo[samples=5],adversary[samples=5],importance[observations=20,samples=5,moment_samples=20]"
    assert main(["compare", *words, "--evaluators", evaluators, "--out", str(tmp_path)]) == 0
    assert "digits[model=conv1]" in capsys.readouterr().out
    records = Store(tmp_path).records()
    assert set(records["status"]) == {"ok", "skipped"}
    assert set(records["problem"]) == {"digits[model=conv1]"}
    assert all(records["model"].str.startswith("Conv1Spec("))
    spec, shape = Conv1Spec(latent_dim=2), (8, 8)
    decoder, pair = count_parameters(spec.new_model(shape)), count_parameters(spec.pair_trunk(shape))
    assert set(records["decoder_parameters"].dropna()) == {decoder}
    sizes = records.groupby("method")["method_parameters"].max()
    trunk = spec.encoder_trunk(shape, 0)
    assert sizes["vae"] == count_parameters(trunk) + (trunk.features + 1) * 2 * 2  # mean and log-sd of z
    noise_dim = METHODS["avb"].thing.config["noise_dim"]
    encoder = count_parameters(spec.encoder_trunk(shape, noise_dim)) + (trunk.features + 1 + noise_dim) * 2
    assert sizes["avb"] == encoder + pair + spec.pair_trunk(shape).features + 1


def test_the_option_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for problem in ("digits", "mnist", "mnist-static", "file"):
        assert main(["show", problem]) == 0
        assert re.search(r"model +mlp +mlp \| conv1 \| conv0 ", capsys.readouterr().out), problem
