"""Streams are derived by name, and one job's randomness never leaks into another's."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness.seeding import Streams, derive, drawing_from, flushed, isolated, seeded

CPU = torch.device("cpu")


def draw(stream: torch.Generator) -> list[float]:
    return torch.rand(4, generator=stream, dtype=torch.float64).tolist()


def test_a_seed_depends_on_every_name_and_on_their_order() -> None:
    names: list[tuple[str | int, ...]] = [
        ("a", "b"),
        ("b", "a"),
        ("ab",),
        ("a", "b", ""),
        ("a", 1),
        ("a", 11),
        (1, "a"),
    ]
    seeds = [derive(*each) for each in names]
    assert len(set(seeds)) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive("a", "b") == derive("a", "b")


def test_seeds_are_the_same_in_every_process_and_version() -> None:
    """Stored results are compared with new ones: a change here makes all of them stale."""
    assert derive("shared", 0, "digits", "minibatches") == 7992512223642312876


def test_shared_streams_do_not_know_the_method_and_own_streams_do() -> None:
    avb, vae = Streams(0, "digits", "avb", CPU), Streams(0, "digits", "vae", CPU)
    assert draw(avb.shared("minibatches")) == draw(vae.shared("minibatches"))
    assert draw(avb.own("noise")) != draw(vae.own("noise"))
    assert draw(avb.own("noise")) == draw(Streams(0, "digits", "avb", CPU).own("noise"))


@pytest.mark.parametrize(
    "other", [Streams(1, "digits", "avb", CPU), Streams(0, "mnist", "avb", CPU), Streams(0, "digits", "avb2", CPU)]
)
def test_streams_differ_in_seed_problem_and_purpose(other: Streams) -> None:
    own = Streams(0, "digits", "avb", CPU)
    assert draw(own.own("noise")) != draw(other.own("noise"))
    assert draw(own.own("noise")) != draw(own.own("other"))
    assert draw(own.own("noise")) != draw(own.shared("noise"))


def weights(streams: Streams, *, shared: bool) -> Tensor:
    with streams.initial_weights(shared=shared):
        return nn.Linear(3, 3).weight.detach()


def test_initial_weights_are_shared_or_own() -> None:
    avb, vae = Streams(0, "digits", "avb", CPU), Streams(0, "digits", "vae", CPU)
    assert torch.equal(weights(avb, shared=True), weights(vae, shared=True))
    assert not torch.equal(weights(avb, shared=False), weights(vae, shared=False))
    assert not torch.equal(weights(avb, shared=True), weights(avb, shared=False))


def process_state() -> tuple[object, ...]:
    numpy_state = np.random.get_state()
    return (
        torch.get_rng_state().tolist(),
        repr(numpy_state),
        random.getstate(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
    )


def disturb() -> None:
    torch.rand(3)
    np.random.random(3)
    random.random()
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)


def disturb_and_raise() -> None:
    disturb()
    raise KeyError


def test_initial_weights_leave_the_process_generator_alone() -> None:
    before = process_state()
    weights(Streams(0, "digits", "avb", CPU), shared=True)
    assert process_state() == before


def test_isolation_restores_the_process_even_after_an_exception() -> None:
    before = process_state()
    with pytest.raises(KeyError), isolated(1):
        disturb_and_raise()
    assert process_state() == before


def test_inside_isolation_everything_is_seeded() -> None:
    def inside(seed: int) -> tuple[float, float, float]:
        with isolated(seed):
            return float(torch.rand(())), float(np.random.random()), random.random()

    first = inside(1)
    torch.rand(7)
    assert inside(1) == first
    assert all(a != b for a, b in zip(inside(2), first, strict=True))


@pytest.mark.parametrize("before", [True, False])
def test_inside_isolation_convolutions_keep_their_precision(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
    with suppress(KeyError), isolated(1):
        assert not torch.backends.cudnn.allow_tf32
        raise KeyError
    assert torch.backends.cudnn.allow_tf32 == before


def test_isolation_restores_pyro() -> None:
    import pyro

    validation = pyro.settings.get("validate_distributions_pyro")
    pyro.clear_param_store()
    pyro.param("kept", torch.tensor(1.0))
    with isolated(1):
        pyro.enable_validation(not validation)
        pyro.clear_param_store()
        pyro.param("left_behind", torch.tensor(2.0))
    assert pyro.settings.get("validate_distributions_pyro") == validation
    assert set(pyro.get_param_store().keys()) == {"kept"}
    pyro.clear_param_store()


def test_a_pyro_that_is_imported_inside_leaves_nothing_behind() -> None:
    """In a fresh process: a plugin's import of Pyro is the first."""
    code = """
        import sys
        from harness.seeding import isolated
        assert "pyro" not in sys.modules
        with isolated(1):
            import pyro, torch
            pyro.param("left_behind", torch.tensor(2.0))
        assert not pyro.get_param_store().keys()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def drawn() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.random()), random.random()


def draw_and_raise(expected: tuple[float, float, float]) -> None:
    assert drawn() == expected
    raise KeyError


def test_what_is_seeded_repeats_and_leaves_the_process_as_it_was() -> None:
    before = process_state()
    with seeded(3):
        first = drawn()
    with pytest.raises(KeyError), seeded(3):
        draw_and_raise(first)
    with seeded(4):
        assert all(a != b for a, b in zip(drawn(), first, strict=True))
    assert process_state() == before


def test_a_library_draws_from_the_generator_that_is_handed_in(generator: torch.Generator) -> None:
    """Each time other numbers, that depend on the generator alone and move it on by one draw."""
    before, start = process_state(), generator.get_state()
    with drawing_from(generator):
        first = drawn()
    with drawing_from(generator):
        second = drawn()
    assert all(a != b for a, b in zip(first, second, strict=True))
    generator.set_state(start)
    torch.rand(3)
    with drawing_from(generator):
        assert drawn() == first
    generator.set_state(start)
    torch.randint(2**63 - 1, (), generator=generator)
    with drawing_from(generator):
        assert drawn() == second
    torch.set_rng_state(torch.tensor(before[0], dtype=torch.uint8))  # type: ignore[arg-type]
    assert process_state() == before


def subnormal() -> bool:
    """Whether such numbers are told from zero here."""
    return bool(torch.tensor(1e-40) * 0.5 != 0)


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="the processor cannot flush denormal numbers")
@pytest.mark.parametrize("before", [True, False])
def test_a_job_flushes_denormal_numbers_and_leaves_the_process_as_it_was(before: bool) -> None:
    torch.set_flush_denormal(before)
    try:
        with suppress(KeyError), isolated(1):
            assert not subnormal()
            with flushed():
                assert not subnormal()
            assert not subnormal()
            raise KeyError
        assert subnormal() == (not before)
    finally:
        torch.set_flush_denormal(False)
