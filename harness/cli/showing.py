"""`harness show`: what a method, problem, evaluator, dataset, experiment or executor is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_args

import click

from harness.cli.listing import THINGS
from harness.cli.parsing import StrictCommand
from harness.cli.suite import plugin_option

if TYPE_CHECKING:
    from harness.executor import Executor
    from harness.experiment import Experiment
    from harness.problem import DatasetSpec, Problem
    from harness.registry import Plugin, Registry

Facts = Iterator[tuple[str, str]]


@click.command(cls=StrictCommand)
@click.argument("name")
@plugin_option
def show(name: str, plugin: tuple[str, ...]) -> int:
    """Show what NAME is.

    Equation and source, options, capabilities and data of a method, problem, evaluator, data set, experiment or
    executor, and where it comes from. NAME may have options: 'avb[lr=1e-4]'.
    """
    from harness.registry import Registry

    registry = Registry.discover(plugin)
    for kind, thing in _named(registry, name):
        _print(kind, thing, registry.plugin_of(kind, thing))
    return 0


def _named(registry: Registry, text: str) -> list[tuple[str, Any]]:
    """Everything of that name; a dataset and a problem may share one."""
    from harness.options import UserError, parse_selection, unknown

    selected = parse_selection(text)
    if len(selected) > 1:
        raise UserError(f"show takes one name, got {text!r}")
    stem = selected[0][0].partition(":")[0]
    kinds = [kind for kind in THINGS if stem in getattr(registry, kind)]
    if not kinds:
        known = {name for kind in THINGS for name in getattr(registry, kind)}
        raise UserError(unknown("name", selected[0][0], known))
    if selected[0][1]:  # a dataset without options must not hide the problem that has them
        kinds = [kind for kind in kinds if getattr(registry, kind)[stem].thing.config] or kinds
    return [(kind, registry.select(kind, text)[0]) for kind in kinds]


def _print(kind: str, thing: Any, plugin: Plugin) -> None:
    from harness.cli.console import print_table
    from harness.cli.describe import module_docstring, options, summary

    facts = [("plugin", str(plugin)), *_FACTS[kind](thing)]
    click.secho(f"{kind[:-1]} {thing.label}", bold=True)
    for text in (summary(thing.__class__), module_docstring(thing.__class__)):
        if text:
            click.echo(f"\n{text}")
    click.echo()
    width = max(len(key) for key, _ in facts)
    for key, value in facts:
        click.echo(f"{key.ljust(width)}  {value}")
    rows = options(thing)
    click.echo("\noptions" if rows else "\nno options")
    if rows:
        print_table(
            ("name", "value", "default", "type", ""),
            [(row.name, row.value if row.value != row.default else "", row.default, row.type, row.doc) for row in rows],
        )
    click.echo()


def _of_method(thing: Any) -> Facts:
    """Capabilities of the posterior classes that the method's module defines or imports."""
    import sys

    from harness import posterior

    for name, cls in vars(sys.modules[type(thing).__module__]).items():
        if isinstance(cls, type) and issubclass(cls, posterior.Posterior) and cls is not posterior.Posterior:
            offered = _capabilities(posterior, partial(_has_methods, cls))
            yield "posterior", f"{name}: {offered or 'sampling only'}"


def _of_problem(problem: Problem) -> Facts:
    from harness import model
    from harness.nn import count_parameters
    from harness.options import UserError
    from harness.planning import check
    from harness.problem import DataError, loaded

    yield "default budget", problem.default_budget
    try:
        check(problem)
    except (DataError, UserError) as error:  # of one that needs an argument (`file:PATH`), the rest can still be told
        yield "not available", str(error)
        return
    data = loaded(problem)
    yield "model", repr(problem.model_spec())
    decoder = problem.model_spec().new_model(data.event_shape)
    offered = _capabilities(model, partial(isinstance, decoder))
    yield "decoder", f"{count_parameters(decoder)} parameters; {offered or 'nothing optional'}"
    yield from _of_data(data)
    yield "spec hash", problem.spec_hash
    if problem.optimum is not None:
        yield "optimum", f"{problem.optimum:.4f} nats, the highest expected log-likelihood that any model can reach"


def _of_dataset(dataset: Any) -> Facts:
    from harness.problem import DataError

    yield "location", dataset.location
    try:
        yield from _of_data(dataset.load())
    except DataError as error:
        yield "data", f"not available: {error}"


def _of_data(data: DatasetSpec) -> Facts:
    sizes = ", ".join(f"{len(getattr(data, split))} {split}" for split in ("train", "validation", "test"))
    yield "observations", f"{sizes}; shape {'x'.join(map(str, data.event_shape))}, binarisation {data.binarisation}"
    yield "content hash", data.content_hash


def _of_evaluator(evaluator: Any) -> Facts:
    yield "by default", "yes" if evaluator.by_default else "no: name it with --evaluators"


def _of_experiment(experiment: Experiment) -> Facts:
    """What is run at each scale; of a suite that depends on earlier ones, not what these decide."""
    from harness.experiment import Scale
    from harness.rehearsal import rehearse

    for scale in get_args(Scale):
        asked = list(rehearse(experiment, scale))
        for suite in asked[-1]:
            runs = ",".join(suite.methods.values())
            seeds = f"seeds {','.join(map(str, suite.seeds))}" if suite.seeds else f"{experiment.seeds(scale)} seeds"
            known = f"{runs} on {suite.problem}, {suite.budget or 'default budget'}, {seeds}"
            later = f"on {suite.problem}, {seeds}; depends on the suites before it"
            yield scale, f"{suite.name}: {known if suite in asked[0] else later}"


def _of_executor(executor: Executor) -> Facts:
    yield (
        "runs apart",
        "yes" if executor.apart else "no: others may run beside its jobs, whose seconds say nothing then",
    )


_FACTS = {
    "methods": _of_method,
    "problems": _of_problem,
    "datasets": _of_dataset,
    "evaluators": _of_evaluator,
    "experiments": _of_experiment,
    "executors": _of_executor,
}


def _capabilities(module: ModuleType, offers: Callable[[Any], bool]) -> str:
    """The optional protocols of a core module that something offers, each in the words of its docstring."""
    from harness.cli.describe import summary

    names: dict[str, Any] = vars(module)
    protocols = [found for found in names.values() if getattr(found, "_is_protocol", False)]
    own = [found for found in protocols if found.__module__ == module.__name__ and offers(found)]
    return "; ".join(f"{found.__name__} ({summary(found).rstrip('.')})" for found in own)


def _has_methods(cls: type, protocol: type) -> bool:
    """Whether a class has all methods of a protocol; other attributes may be those of an instance."""
    bases = [base for base in protocol.__mro__ if getattr(base, "_is_protocol", False)]
    names = {name for base in bases for name, member in vars(base).items() if inspect.isfunction(member)}
    return all(hasattr(cls, name) for name in names)
