"""The plugin seam: discovery, broken, duplicate, malformed and too-new plugins, one-off files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from harness.options import UserError
from harness.registry import Plugin, PluginWarning, Registry
from harness.sources import class_sources

HEAD = """
from dataclasses import dataclass
from harness import hookimpl
from harness.method import Method

@dataclass(frozen=True, kw_only=True)
class Mine(Method):
    name: str = "mine"
    size: int = 1

    def fit(self, view, run): ...
    def restore(self, view, state): ...
"""


def hook(body: str, signature: str = "harness_methods()") -> str:
    return f"{HEAD}\n@hookimpl\ndef {signature}:\n    {body}\n"


HOOK = hook("return [Mine()]").removeprefix(HEAD)

WriteDistribution = Callable[..., None]


def broken(registry: Registry) -> dict[str, str]:
    return {plugin.name: plugin.broken for plugin in registry.plugins if plugin.broken}


def test_built_in_plugins_are_entry_points_like_any_others() -> None:
    """The core knows no plugin: without the distribution's entry points there is nothing to run."""
    entry_points = metadata.distribution("inference-harness").entry_points.select(group="harness.plugins")
    registry = Registry.discover()
    assert {plugin.name for plugin in registry.plugins} == set(entry_points.names)
    assert {"avb", "vae"} <= set(registry.methods)
    assert {"four-points", "digits", "mnist", "linear-gaussian"} <= set(registry.problems)
    assert {"exact", "importance", "elbo", "adversary", "reconstruction"} <= set(registry.evaluators)
    assert registry.methods["avb"].plugin == Plugin("avb", "inference-harness", metadata.version("inference-harness"))


def test_without_entry_points_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    registry = Registry.discover()
    assert vars(registry) == {**vars(Registry()), "manager": registry.manager}


def test_an_installed_plugin_is_found_with_its_origin(write_distribution: WriteDistribution) -> None:
    write_distribution("their-plugin", HEAD + HOOK, version="2.5")
    registry = Registry.discover()
    assert registry.methods["mine"].plugin == Plugin("their-plugin", "their-plugin", "2.5")
    assert "avb" in registry.methods
    assert [item.label for item in registry.select("methods", "mine[size=3]")] == ["mine[size=3]"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise RuntimeError('first line\\nsecond')", "RuntimeError: first line; second"),
        ("import sys; sys.exit('away')", "SystemExit: away"),
        ("def f(:", "SyntaxError: "),
        ("from harness.training import FromTheFuture", "ImportError: cannot import name 'FromTheFuture'"),
        (HEAD + HOOK.replace("@hookimpl", ""), "harness_methods is not marked: write @hookimpl"),
        (hook("raise KeyError('k')"), "KeyError: 'k'"),
        (hook("return Mine()"), "harness_methods must return a list of Method, got Mine"),
        (hook("pass"), "harness_methods must return a list of Method, got NoneType"),
        (hook("yield Mine()"), "harness_methods must return a list of Method, got generator"),
        (hook("return [Mine]"), "harness_methods must return instances: Mine(), not the class Mine"),
        (hook("return ['mine']"), "harness_methods must return instances of Method, got 'mine'"),
        (hook("return [Mine(), Mine(size=2)]"), "harness_methods gives one name to two things: mine, mine"),
        (hook("return [Mine()]", "harness_problems()"), "harness_problems must return instances of Problem, got Mine"),
        (
            hook("return [Mine()]", "harness_experiments()"),
            "harness_experiments must return instances of Experiment, got",
        ),
        (
            hook("return [Mine()]", "harness_methods(config)"),
            "Argument(s) {'config'} are declared in the hookimpl but can not be found in the",
        ),
        (hook("return []", "harness_from_the_future()"), "it implements harness_from_the_future, which inference-"),
        (HEAD.replace("@dataclass(frozen=True, kw_only=True)", "") + HOOK, "Mine must be a frozen dataclass"),
        (HEAD.replace("frozen=True", "frozen=False") + HOOK, "Mine must be a frozen dataclass"),
        (HEAD.replace('"mine"', '"My_Method"') + HOOK, "Mine has the name 'My_Method': expected lower-case words"),
        (HEAD.replace('"mine"', '"mine-"') + HOOK, "Mine has the name 'mine-': expected lower-case words"),
        (HEAD.replace("size: int = 1", "size: int = 0.5") + HOOK, "mine: option size=0.5: "),
        (
            HEAD.replace("size: int = 1", "size: object = len") + HOOK,
            "the options of 'mine' must be hashable and JSON-compatible",
        ),
    ],
)
def test_a_broken_plugin_is_listed_with_its_reason(
    write_distribution: WriteDistribution, source: str, reason: str
) -> None:
    write_distribution("faulty", source)
    with pytest.warns(PluginWarning, match="plugin 'faulty' of faulty 1.0 is broken: "):
        registry = Registry.discover()
    assert reason in broken(registry)["faulty"]
    assert "\n" not in broken(registry)["faulty"]
    assert "mine" not in registry.methods
    assert "avb" in registry.methods
    assert registry.manager.hook.harness_methods() != []  # what remains registered can be called


def test_an_optional_hook_of_a_later_version_is_ignored(write_distribution: WriteDistribution) -> None:
    later = "\n@hookimpl(optionalhook=True)\ndef harness_from_the_future():\n    return []\n"
    write_distribution("careful", HEAD + HOOK + later)
    assert "mine" in Registry.discover().methods


def test_two_plugins_with_one_name_are_refused(write_distribution: WriteDistribution) -> None:
    write_distribution("first-plugin", HEAD + HOOK)
    write_distribution("second-plugin", HEAD + HOOK, version="0.2")
    with pytest.raises(UserError, match="two plugins claim the method 'mine'") as caught:
        Registry.discover()
    assert "first-plugin 1.0" in str(caught.value)
    assert "second-plugin 0.2" in str(caught.value)


def test_one_module_under_two_entry_points_is_loaded_once(write_distribution: WriteDistribution) -> None:
    write_distribution("first-plugin", HEAD + HOOK)
    write_distribution("second-plugin", "", value="first_plugin")
    with pytest.warns(PluginWarning, match="registered already, under another entry point"):
        registry = Registry.discover()
    assert "mine" in registry.methods


def test_a_plugin_file(tmp_path: Path) -> None:
    path = tmp_path / "one_off.py"
    path.write_text(HEAD + HOOK)
    registry = Registry.discover([path])
    assert registry.methods["mine"].plugin == Plugin("one_off", "file one_off.py", "")
    assert list(tmp_path.iterdir()) == [path]  # nothing is written beside it


def test_what_was_imported_is_known_by_its_source_of_then(tmp_path: Path) -> None:
    """Whatever becomes of the file before it is used: else its results would pass for those of the edited one."""
    path = tmp_path / "mine.py"
    path.write_text(HEAD + HOOK)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    registry = Registry.discover([path])
    path.write_text(HEAD + HOOK + "# edited")
    assert digest in class_sources(type(registry.methods["mine"].thing))


def test_an_edited_plugin_file_is_read_again(tmp_path: Path) -> None:
    """Even when size and time stamp are the same: cached byte code would run under the new source's key."""
    path = tmp_path / "edited.py"
    path.write_text(HEAD + HOOK)
    assert Registry.discover([path]).methods["mine"].thing.config == {"size": 1}
    path.write_text((HEAD + HOOK).replace("size: int = 1", "size: int = 2"))
    assert Registry.discover([path]).methods["mine"].thing.config == {"size": 2}


def test_two_files_of_one_name_in_different_folders(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "plugin.py").write_text((HEAD + HOOK).replace('"mine"', f'"mine-{folder}"'))
    assert {"mine-a", "mine-b"} <= set(Registry.discover([tmp_path / "a/plugin.py", tmp_path / "b/plugin.py"]).methods)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "does not exist"),
        ("1/0", "is broken: ZeroDivisionError: division by zero"),
        (HEAD + HOOK.replace("@hookimpl\n", ""), "is broken: harness_methods is not marked"),
        ((HEAD + HOOK).replace('"mine"', '"avb"'), "two plugins claim the method 'avb': 'avb' of inference-harness"),
    ],
)
def test_a_faulty_plugin_file_is_the_users_mistake(tmp_path: Path, source: str | None, message: str) -> None:
    path = tmp_path / "faulty.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(UserError, match=re.escape(message)):
        Registry.discover([path])


def test_the_same_file_twice_is_the_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one_off.py").write_text(HEAD + HOOK)
    with pytest.raises(UserError, match=r"'\./one_off\.py' is given twice|'one_off\.py' is given twice"):
        Registry.discover([tmp_path / "one_off.py", "./one_off.py"])


def test_notifications_reach_every_plugin_and_stop_at_none(tmp_path: Path) -> None:
    heard = tmp_path / "heard.txt"
    (tmp_path / "deaf.py").write_text(
        "from harness import hookimpl\n@hookimpl\ndef harness_job_finished(outcome):\n    raise OSError('full')\n"
    )
    (tmp_path / "listening.py").write_text(
        "from harness import hookimpl\n@hookimpl\ndef harness_job_finished(job, outcome):\n"
        f"    with open({str(heard)!r}, 'a') as file:\n        file.write(f'{{job}} {{outcome}};')\n"
    )
    registry = Registry.discover([tmp_path / "listening.py", tmp_path / "deaf.py"])
    with pytest.warns(PluginWarning, match="harness_job_finished failed: OSError: full"):
        registry.notify("harness_job_finished", job="a job", outcome="ok")
    assert heard.read_text() == "a job ok;"
