"""Eight Schools as in the AVB paper: KL to the exact posterior against training, both modes or one, and moments.

Mescheder, Nowozin, Geiger 2017, section 6.2, https://arxiv.org/abs/1701.04722
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
    Line,
    Marginals,
    Progression,
    Scale,
    Suite,
    Tabulated,
)
from harness.trials import Trials, at_rates

PROBLEM: dict[Scale, str] = {
    "smoke": "eight-schools-avb[pair_width=128,pair_depth=2]",
    "laptop": "eight-schools-avb[pair_width=128,pair_depth=2]",
    "paper": "eight-schools-avb",
}
CHOSEN_BY = "knn[samples=4000],modes[samples=4000]"
EVALUATORS = f"{CHOSEN_BY},moments[samples=4000],exact"
RATES = {
    "avb": ("1e-3", "5e-4", "2e-3", "4e-3"),
    "avb-ac": ("1e-3", "5e-4", "2e-3", "4e-3"),
    "mean-field": ("0.03", "0.003", "0.01", "0.1"),
    "full-rank": ("0.03", "0.003", "0.01", "0.1"),
}
ADVERSARIAL = ("avb", "avb-ac")
SETTINGS = {
    "avb": "batch_size=512,noise_dim=10,adversary_steps=4,lr_decay=0.01",
    "avb-ac": "batch_size=512,adversary_steps=2,lr_decay=0.01",
    "mean-field": "num_particles=512",
    "full-rank": "num_particles=512",
}
"""512 draws of z at each step. As in the released code, noise of ten dimensions for AVB without adaptive contrast, and
two steps of the adversary with it; without it four. Learning rates end at a hundredth, as is the default of the
Gaussian families."""
ADVERSARY = 4.0
"""Its learning rate is so many times that of the encoder; 2 in the released code."""
TRIAL_SEEDS = (100, 101)
OTHERS: dict[Scale, dict[str, str]] = {
    "smoke": {"laplace": "laplace", "nuts": "nuts[warmup=50,draws=50]"},
    "laptop": {"laplace": "laplace", "nuts": "nuts[draws=4000]"},
    "paper": {"laplace": "laplace", "nuts": "nuts[warmup=2000,draws=5000]"},
}
LABELS = {
    "avb": "AVB",
    "avb-ac": "AVB with AC",
    "mean-field": "mean-field VI",
    "full-rank": "full-rank VI",
    "laplace": "Laplace",
    "nuts": "NUTS",
}
OTHERS_BUDGET: dict[Scale, str] = {"smoke": "steps=100", "laptop": "", "paper": ""}
STEPS: dict[Scale, tuple[int, ...]] = {
    "smoke": (50, 100),
    "laptop": (1250, 2500, 5000, 10_000),
    "paper": (625, 1250, 2500, 5000, 10_000),
}


@dataclass(frozen=True, kw_only=True)
class AVBEightSchools(Experiment):
    """How close AVB, variational families, the Laplace approximation and NUTS come to a posterior with two modes."""

    name: str = "avb-eight-schools"

    def seeds(self, scale: Scale) -> int:
        return 2 if scale == "smoke" else 3

    def suites(self, scale: Scale, done: Done) -> list[Suite]:
        trials = _trials(scale)
        methods = trials.best(done)
        if not methods:
            return [trials.suite]
        trained = [
            Suite(name=_suite(n), problem=PROBLEM[scale], methods=methods, evaluators=EVALUATORS, budget=f"steps={n}")
            for n in STEPS[scale]
        ]
        others = Suite(
            name="others",
            problem=PROBLEM[scale],
            methods=OTHERS[scale],
            evaluators=f"{EVALUATORS},chains",
            budget=OTHERS_BUDGET[scale],
        )
        return [trials.suite, *trained, others, _rubin(scale)]

    def contents(self, scale: Scale) -> Contents:
        longest = STEPS[scale][-1]
        lines = [*(_trained(run, longest) for run in RATES), *OTHER_LINES]
        tables = [
            Tabulated(title=f"After {longest:,} steps", columns=COLUMNS, lines=lines, about=ABOUT),
            Tabulated(title="Against training", columns=NEIGHBOURS, lines=_against_training(scale), about=FLOOR),
            Tabulated(title="Rubin's data", columns=RUBIN_COLUMNS, lines=RUBIN_LINES, about=RUBIN),
            _trials(scale).table(TRIAL_COLUMNS),
        ]
        return Contents(
            tables=tables,
            contrasts=_contrasts(longest),
            pictures=[
                _progression(scale),
                Marginals(name="marginals", caption=MARGINALS, planes=[("mu", "tau"), ("tau", "eta[1]")], lines=lines),
                Differences(name="differences", caption=DIFFERENCES, groups=[_group(longest)]),
            ],
            remarks=[*REMARKS, SIZES[scale]],
        )


def _trials(scale: Scale) -> Trials:
    """As many settings for each method; adversaries learn faster than encoders."""
    tried = 1 if scale == "smoke" else None
    return Trials(
        problem=PROBLEM[scale],
        settings={
            method: at_rates(
                method, rates[:tried], SETTINGS[method], adversary=ADVERSARY if method in ADVERSARIAL else 0.0
            )
            for method, rates in RATES.items()
        },
        evaluators=CHOSEN_BY,
        budget=f"steps={STEPS[scale][-1]}",
        seeds=TRIAL_SEEDS[:tried],
        metric="kl_to_posterior",
        lowest=True,
    )


def _rubin(scale: Scale) -> Suite:
    """The usual Eight Schools, with one mode."""
    return Suite(
        name="rubin",
        problem="eight-schools",
        methods={"mean-field": "mean-field", "full-rank": "full-rank", **OTHERS[scale]},
        evaluators="knn[samples=4000],moments[samples=4000],exact,chains",
        budget=OTHERS_BUDGET[scale],
    )


def _suite(steps: int) -> str:
    return f"steps-{steps}"


def _trained(run: str, steps: int) -> Line:
    return Line(label=LABELS[run], suite=_suite(steps), run=run)


OTHER_LINES = [Line(label=LABELS[run], suite="others", run=run) for run in ("laplace", "nuts")]


RUBIN_LINES = [
    Line(label=LABELS[run], suite="rubin", run=run) for run in ("mean-field", "full-rank", "laplace", "nuts")
]


def _against_training(scale: Scale) -> list[Line]:
    return [
        Line(label=f"{LABELS[run]}, {steps:,} steps", suite=_suite(steps), run=run)
        for run in RATES
        for steps in STEPS[scale]
    ]


def _progression(scale: Scale) -> Progression:
    curves = {LABELS[run]: [_trained(run, steps) for steps in STEPS[scale]] for run in RATES}
    return Progression(
        name="training",
        caption=TRAINING,
        curves=curves,
        levels=OTHER_LINES,
        metric="kl_to_posterior",
        evaluator="knn",
        floor="kl_to_posterior_floor",
        axis="KL(q(z), p(z|x)) by nearest neighbours [nats]",
    )


def _group(steps: int) -> str:
    return f"KL to the posterior after {steps:,} steps"


def _contrasts(steps: int) -> list[Contrast]:
    others = [_trained("mean-field", steps), _trained("full-rank", steps), OTHER_LINES[0]]
    return [
        Contrast(
            statement=f"{LABELS[run]} is closer to the posterior than {other.label}",
            first=other,
            second=_trained(run, steps),
            group=_group(steps),
            metrics=("kl_to_posterior",),
            evaluator="knn",
            floor="kl_to_posterior_floor",
        )
        for run in ADVERSARIAL
        for other in others
    ]


NEIGHBOURS = (
    Column(heading="KL(q, p(z|x)), neighbours", metrics=("kl_to_posterior",), evaluator="knn"),
    Column(heading="of exact draws", metrics=("kl_to_posterior_floor",), evaluator="knn"),
)
MODE_ERROR = Column(heading="mode error", metrics=("mode_error",))
TRIAL_COLUMNS = (*NEIGHBOURS, MODE_ERROR)
COLUMNS = (
    *NEIGHBOURS,
    Column(heading="KL(q, p(z|x)), density", metrics=("kl_to_posterior",), evaluator="exact"),
    MODE_ERROR,
    Column(heading="mean error", metrics=("mean_error",)),
    Column(heading="sd error", metrics=("sd_error",)),
    Column(heading="largest R-hat", metrics=("r_hat_max",)),
)
RUBIN_COLUMNS = tuple(column for column in COLUMNS if column != MODE_ERROR)
RUBIN = (
    "Eight Schools as it is usually posed (posteriordb): Rubin's data and tau > 0, so that there is one mode. Columns "
    "as above, with mu, tau and theta."
)
ABOUT = (
    "KL by nearest neighbours between draws from q(z|x) and exact draws from p(z|x), and beside it what the same "
    "estimator says of exact draws in their place: no difference below it means anything. In ten dimensions neighbours "
    "are far and the estimate is too small; where q(z|x) has a density, the next column is the KL without that bias. "
    "Mode error: total variation between shares of the two modes and one half each, 0.5 if one of them is missing. "
    "Mean and sd errors: the largest over mu, tau, |tau|, theta and eta, in exact standard deviations."
)
FLOOR = (
    "Each line is a fit of its own, trained from the start for that many steps. Learning rates were chosen for the "
    "longest fits, where those of the Gaussian families are as good as each other: a rate that was chosen for a short "
    "one may do much better there."
)
TRAINING = (
    "KL to the exact posterior against training steps and, where fits ran one at a time, against seconds; every point "
    "is a fit of its own that was trained for that long, large: mean over seeds, small: seeds. Level lines: other "
    "methods, at their own budgets. Learning rates were chosen for the longest fits."
)
MARGINALS = (
    "Draws of the first seed of each method over the exact density (contour lines around 50 % and 90 % of it). The "
    "signs of tau and of all eta can be turned at once, so that the exact density has two equal modes."
)
DIFFERENCES = "KL to the posterior of the other method less that of AVB, over seeds."
REMARKS = [
    "Learning rates are chosen by the KL to the posterior: that can be done only where it is known.",
    "The posterior is known exactly: given tau everything is Gaussian. The paper compared with draws by Stan's HMC.",
    (
        "The paper shows a KL against training (nearest neighbours, to HMC draws) and marginals, and no table; so "
        "there are no reported figures here."
    ),
    "Data and standard errors are those of the paper's code, not Rubin's: y/10, and sigma close to sigma/20.",
    (
        "The released code normalises z by minibatch statistics (adaptive contrast), on a network of injected noise, "
        "with 512 draws of z at each update. On its data every method has 512 here; AVB is without adaptive contrast, "
        "and AVB with AC has the encoder of basis functions. Gradients of both are clipped at a norm of 50, which the "
        "released code does not do."
    ),
    (
        "Before these trials 13 settings of AVB without adaptive contrast were tried by hand, with the same seeds "
        "(one with 102 too): 128 or 512 draws, an adversary that learns two or four times as fast as the "
        "encoder and takes two or four steps, learning rates that fall to a tenth or a hundredth, and likelihoods "
        "whose weight grows. With 128 draws, two steps at twice the rate, and a tenth, most of one mode was lost. 512 "
        "draws, four times the rate and a hundredth brought the KL of this report from 1.79 to 0.37, with shares of "
        "the modes of 0.21, 0.17 and 0.45 on the seeds 0 to 2; that is why four steps were tried then, on other seeds. "
        "The four rates of both forms of AVB were set by hand too. Of the Gaussian families only the number of draws "
        "was changed."
    ),
]
SMALLER = (
    "The adversary has two residual blocks of 128 units, where the released code has five of 256: six times faster on "
    "a CPU, so that as many steps as in the paper, 10,000, take a minute or two."
)
SIZES: dict[Scale, str] = {
    "smoke": "Scale smoke only shows that the experiment works: 100 steps train nothing.",
    "laptop": SMALLER,
    "paper": (
        "Adversaries have the size of the released code's, and so has the encoder of AVB without adaptive contrast. "
        "With it there are eight basis functions of two layers of 64 units on noise of 16 dimensions, where the "
        "released code has a network of 128 units on noise of ten. Its adversary learns twice as fast as the encoder "
        "and takes two steps; ours learn four times as fast, with four steps without adaptive contrast."
    ),
}


@hookimpl
def harness_experiments() -> list[AVBEightSchools]:
    return [AVBEightSchools()]
