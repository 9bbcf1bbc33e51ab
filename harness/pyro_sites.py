"""What Pyro knows of the statements of a program, and why a program with them is no posterior problem."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint, MixtureSameFamilyConstraint, independent

Site = dict[str, Any]
"""What Pyro knows of one statement of a program: its name, type, distribution, value ..."""


def bijection(distribution: Any) -> Any:
    """From R^k to the support of a distribution; that of a mixture is its components'.

    Raises:
        NotImplementedError: If torch knows none, or components have supports of their own.
    """
    return biject_to(_without_mixture(distribution.support))


def _without_mixture(support: Constraint) -> Constraint:
    if isinstance(support, independent):
        return independent(_without_mixture(support.base_constraint), support.reinterpreted_batch_ndims)
    if not isinstance(support, MixtureSameFamilyConstraint):
        return support
    component: Any = support.base_constraint
    while isinstance(component, independent):
        component = component.base_constraint
    if any(isinstance(bound, Tensor) for bound in vars(component).values()):
        raise NotImplementedError
    return _without_mixture(support.base_constraint)


def log_prob(site: Site) -> Tensor:
    """The log density of a site's value, as the program scales and masks it: a scalar."""
    from pyro.distributions.util import scale_and_mask

    return scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"]).sum()


def is_sample(site: Site) -> bool:
    return site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"  # as in Pyro: a plate's indices


def is_quantity(site: Site) -> bool:
    return not site["is_observed"] or bool(site["infer"].get("_deterministic"))


def element_names(site: Site) -> list[str]:
    """``mu``; or ``theta[0]``, ``theta[1]``; or ``L[0,0]``, ``L[0,1]`` ...: in the order of the flattened value."""
    shape = tuple(site["value"].shape)
    return [f"{site['name']}[{','.join(map(str, i))}]" for i in np.ndindex(*shape)] if shape else [site["name"]]


# Faults


CHANGING = "its sites change from run to run"


def faults(runs: Sequence[Mapping[str, Site]], observed: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Why a program is no problem, from some of its runs."""
    run = runs[0]
    for other in runs[1:]:
        if _structure(run) != _structure(other):
            yield f"{CHANGING}: {', '.join(sorted(_structure(run) ^ _structure(other)))}"
    sites = {name: site for name, site in run.items() if is_sample(site)}
    for name, site in run.items():
        if site["type"] == "param":
            yield f"it has the parameter {name!r}: give it a prior (pyro.sample) or a value; there is nothing to learn"
        if site["type"] == "sample" and name not in sites and len(site["value"]) < site["fn"].size:
            yield f"plate {name!r} is subsampled: there is one observation, and all of it counts"
    for name, shape in observed.items():
        yield from _observed_faults(name, shape, sites)
    latent = [site for site in sites.values() if not site["is_observed"]]
    if not latent:
        yield "it has no latent site: all are observed"
    for site in latent:
        yield from _latent_faults(site)


def _structure(run: Mapping[str, Site]) -> set[str]:
    """What must be the same in all runs."""
    return {f"{name} {tuple(site['value'].shape)}" for name, site in run.items() if is_sample(site)}


def _observed_faults(name: str, shape: tuple[int, ...], sites: Mapping[str, Site]) -> Iterator[str]:
    if name not in sites:
        yield f"there is no site {name!r} for what was observed; its sites are {', '.join(sites)}"
    elif tuple(sites[name]["fn"].shape()) != shape:
        yield f"site {name!r} has the shape {tuple(sites[name]['fn'].shape())}; what was observed has {shape}"


NO_DENSITY = {
    "Masked": "a masked distribution, which is no density",
    "Delta": "a delta distribution, which is no density",
    "VonMises": "a distribution on the circle, which is no density on R: give it one on an interval",
    "SineBivariateVonMises": "a distribution on the torus, which is no density on R^2: give it one on intervals",
    "SineSkewed": "a distribution on the torus, which is no density on R^k: give it one on intervals",
}
"""What a distribution is of which Pyro says that it has a density on all of R^k."""


def _without_density(distribution: Any) -> str:
    """Why a distribution, or what is wrapped in it, has no density in R^k; empty if it has."""
    kind = type(distribution).__name__.removesuffix("Distribution")
    inside = ("base_dist", "base_density", "component_distribution")
    wrapped = [getattr(distribution, name) for name in inside if hasattr(distribution, name)]
    return NO_DENSITY.get(kind, "") or next(filter(None, map(_without_density, wrapped)), "")


def _latent_faults(site: Site) -> Iterator[str]:
    name, distribution = site["name"], site["fn"]
    if distribution.support.is_discrete:
        yield f"the latent site {name!r} is discrete: sum it out; only continuous sites have a density in R^D"
    elif site["infer"].get("enumerate"):
        yield f"the latent site {name!r} is enumerated: sum it out"
    elif site["mask"] is not None or site["scale"] != 1:
        yield f"the latent site {name!r} is scaled or masked: its prior is no density then"
    elif why := _without_density(distribution):
        yield f"the latent site {name!r} has {why}"
    else:
        try:
            bijection(distribution)
        except NotImplementedError:
            support = " ".join(str(distribution.support).split())
            yield f"the support of the latent site {name!r} ({support}) has no known bijection from R^k"
