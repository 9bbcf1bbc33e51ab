"""Table 1 and the latent space of the AVB paper: four points, AVB against a Gaussian VAE, both tuned by equal effort.

Mescheder, Nowozin, Geiger 2017, section 6.1, https://arxiv.org/abs/1701.04722
"""

from __future__ import annotations

from dataclasses import dataclass

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
)
from harness.trials import Trials, at_rates

TRIAL_SEEDS = (100, 101)
DECAYS = ("0.1", "1")
RATES = {"avb": ("1e-3", "2e-3", "4e-3"), "vae": ("1e-3", "3e-3", "1e-2")}
ADVERSARY = {"avb": 2.0, "vae": 0.0}
OPTIONS = {"avb": ",clip_norm=0", "vae": ""}
RELEASED_FOR_ALL = "lr=2e-5,lr_decay=1,batch_size=512"
RELEASED = {
    "avb": f"avb[{RELEASED_FOR_ALL},noise_dim=64,adversary_lr=1e-4,adversary_steps=2,beta1=0.9,clip_norm=0]",
    "vae": f"vae[{RELEASED_FOR_ALL}]",
}
PROBLEM: dict[Scale, str] = {
    "smoke": "four-points",
    "laptop": "four-points",
    "paper": "four-points[depth=3,pair_width=256,pair_depth=5]",
}
BUDGET: dict[Scale, str] = {"smoke": "steps=50", "laptop": "steps=5000", "paper": "steps=100000"}

AVB = Line(label="AVB", suite="toy", run="avb")
VAE = Line(label="VAE", suite="toy", run="vae")
SOURCE = "Table 1 of the paper, recalled and not read again"
PAPER_VAE = Reported(
    label="VAE",
    figures={"log p(x)": "-1.568", "reconstruction": "0.0885", "ELBO": "-1.697", "KL(q(z), p(z))": "about 0.165"},
    source=SOURCE,
)
PAPER_AVB = Reported(
    label="AVB",
    figures={"log p(x)": "-1.403", "reconstruction": "0.00577", "ELBO": "about -1.421", "KL(q(z), p(z))": "0.026"},
    source=SOURCE,
)
COLUMNS = (
    Column(heading="log p(x)", metrics=("log_likelihood",)),
    Column(heading="reconstruction", metrics=("reconstruction",)),
    Column(heading="ELBO", metrics=("elbo", "adversarial_elbo")),
    Column(heading="KL(q(z), p(z))", metrics=("aggregate_kl",)),
    Column(heading="I(x; z)", metrics=("mutual_information",)),
)


@dataclass(frozen=True, kw_only=True)
class AVBToy(Experiment):
    """Four points: exact log p(x) and what the posteriors make of the latent space, for AVB and a Gaussian VAE."""

    name: str = "avb-toy"

    def seeds(self, scale: Scale) -> int:
        return 2 if scale == "smoke" else 5

    def suites(self, scale: Scale, done: Done) -> list[Suite]:
        if scale == "paper":
            return [_toy(scale, RELEASED)]
        trials = _trials(scale)
        best = trials.best(done)
        return [trials.suite, _toy(scale, best)] if best else [trials.suite]

    def contents(self, scale: Scale) -> Contents:
        tables = [
            Tabulated(
                title="Table 1",
                columns=COLUMNS,
                lines=[AVB, PAPER_AVB, VAE, PAPER_VAE],
                about="No model can have a log p(x) above -log 4 = -1.3863. Reconstruction is E[-log p(x|z)]; lower is "
                "better.",
            )
        ]
        return Contents(
            tables=tables if scale == "paper" else [*tables, _trials(scale).table(COLUMNS[:1])],
            contrasts=CONTRASTS,
            pictures=[LATENT, Differences(name="differences", caption=DIFFERENCES, groups=[GROUP])],
            remarks=REMARKS[scale],
        )


def _trials(scale: Scale) -> Trials:
    """AVB's adversary learns twice as fast; gradients are not clipped, as in the released code."""
    tried = 1 if scale == "smoke" else None
    return Trials(
        problem=PROBLEM[scale],
        settings={
            method: [
                run
                for rate in rates[:tried]
                for decay in DECAYS
                for run in at_rates(method, [rate], f"lr_decay={decay}{OPTIONS[method]}", adversary=ADVERSARY[method])
            ]
            for method, rates in RATES.items()
        },
        evaluators="exact",
        budget=BUDGET[scale],
        seeds=TRIAL_SEEDS[:tried],
    )


def _toy(scale: Scale, methods: dict[str, str]) -> Suite:
    evaluators = "exact,reconstruction,elbo,adversary,aggregate"
    return Suite(name="toy", problem=PROBLEM[scale], methods=methods, evaluators=evaluators, budget=BUDGET[scale])


GROUP = "AVB and VAE"
CONTRASTS = [
    Contrast(statement="AVB has the higher log p(x)", first=AVB, second=VAE, group=GROUP),
    Contrast(
        statement="AVB has the lower reconstruction cost",
        first=VAE,
        second=AVB,
        group=GROUP,
        metrics=("reconstruction",),
    ),
]
LATENT = LatentPlanes(
    name="latent",
    caption="Draws of z from q(z|x), coloured by x, first seed; as in the paper's figure of the toy.",
    lines=[VAE, AVB],
)
DIFFERENCES = "Paired differences over seeds; the four points are the whole population, so they add no noise."
COMMON = [
    "log p(x) is exact, by quadrature over the two latent dimensions.",
    "The ELBO of AVB rests on its adversary's density ratio: it is no bound and can exceed log p(x).",
    (
        "-ELBO = reconstruction + I(x; z) + KL(q(z), p(z)) where all four are exact, and I(x; z) is at most log 4 = "
        "1.386. For a posterior without density KL(q(z), p(z)) is estimated from nearest neighbours, and I(x; z) is "
        "not known."
    ),
    (
        "Networks differ: the paper names two layers of 512 units (recalled); the released code has three of 64, and a "
        "discriminator of five residual blocks of 256, as at scale paper. Else it is two layers and two blocks of 64."
    ),
]
REMARKS: dict[Scale, list[str]] = {
    "smoke": [*COMMON, "Scale smoke only shows that the experiment works: 50 steps train nothing."],
    "laptop": [*COMMON, "Fits are 5,000 steps of batch 128 long; those of the released code 100,000 of batch 512."],
    "paper": [
        *COMMON,
        "Sizes of networks, learning rates, batch, steps and noise are those of the released code; nothing was tuned.",
        (
            "Else networks differ: noise enters every layer of the encoder, and blocks of the discriminator have leaky "
            "ReLUs before their products, where the released ones have ELUs after them."
        ),
    ],
}


@hookimpl
def harness_experiments() -> list[AVBToy]:
    return [AVBToy()]
