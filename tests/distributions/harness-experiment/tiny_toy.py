"""A tiny toy: what AVB and the VAE reach in a few steps, and the VAE in AVB's seconds."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import PositiveInt

from harness import hookimpl
from harness.experiment import (
    Column,
    Contents,
    Contrast,
    Differences,
    Done,
    Experiment,
    LatentPlanes,
    Line,
    Reported,
    Scale,
    Suite,
    Tabulated,
    seconds_budget,
)

AVB = Line(label="AVB", suite="equal-steps", run="avb")
VAE = Line(label="VAE", suite="equal-steps", run="vae")
LONGER = Line(label="VAE, in AVB's seconds", suite="equal-seconds", run="vae")
PAPER = Reported(
    label="AVB", figures={"log p(x)": "-1.403"}, source="Table 1 of arXiv:1701.04722, recalled, not read again"
)


@dataclass(frozen=True, kw_only=True)
class TinyToy(Experiment):
    """AVB against a VAE on four points.

    Args:
        steps: Of every fit at the smallest scale; ten times as many at each larger one.
    """

    name: str = "tiny-toy"
    steps: PositiveInt = 20

    def seeds(self, scale: Scale) -> int:
        return 2

    def suites(self, scale: Scale, done: Done) -> list[Suite]:
        steps = self.steps * {"smoke": 1, "laptop": 10, "paper": 100}[scale]
        first = Suite(
            name="equal-steps",
            problem="four-points",
            methods={"avb": "avb[noise_dim=8]", "vae": "vae"},
            evaluators="exact,elbo,adversary",
            budget=f"steps={steps}",
        )
        budget = seconds_budget(done[first.name]) if first.name in done else ""
        if not budget:
            return [first]
        second = Suite(
            name="equal-seconds", problem="four-points", methods={"vae": "vae"}, evaluators="exact,elbo", budget=budget
        )
        return [first, second]

    def contents(self, scale: Scale) -> Contents:
        columns = (
            Column(heading="log p(x)", metrics=("log_likelihood",)),
            Column(heading="ELBO", metrics=("elbo", "adversarial_elbo")),
        )
        return Contents(
            tables=[Tabulated(title="Four points", columns=columns, lines=[AVB, PAPER, VAE, LONGER])],
            contrasts=[
                Contrast(statement="AVB has the higher log p(x) at equal steps", first=AVB, second=VAE),
                Contrast(statement="AVB has the higher log p(x) at equal seconds", first=AVB, second=LONGER),
            ],
            pictures=[
                LatentPlanes(name="latent", caption="Draws of q(z|x), coloured by x.", lines=[VAE, AVB]),
                Differences(name="differences", caption="Paired differences in log p(x).", groups=[""]),
            ],
            remarks=["The paper trained for 100,000 steps, this for very few."],
        )


@hookimpl
def harness_experiments() -> list[TinyToy]:
    return [TinyToy()]
