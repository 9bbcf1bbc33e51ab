"""The distribution: what the wheel holds, a third party's plugin in a fresh environment, lazy imports, the texts."""

from __future__ import annotations

import os
import re
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import harness
import harness_plugins

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "tests/distributions/harness-example"
EXPERIMENT = ROOT / "tests/distributions/harness-experiment/tiny_toy.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*command: str | Path, cwd: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_both_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"harness", "harness_plugins"}
    modules = {name for name in names if name.endswith(".py")}
    for package, folder in (("harness", ROOT / "harness"), ("harness_plugins", ROOT / "plugins/harness_plugins")):
        sources = {f"{package}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}
        assert sources <= modules
    assert "harness = harness.cli:main" in entry_points
    licences = {Path(name).name for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


def test_every_entry_point_has_its_module_and_every_module_its_entry_point() -> None:
    targets = PROJECT["project"]["entry-points"]["harness.plugins"].values()
    modules = {f"harness_plugins.{path.stem}" for path in (ROOT / "plugins/harness_plugins").glob("*.py")}
    assert set(targets) == modules - {"harness_plugins.__init__"}


@pytest.mark.skipif("HARNESS_EXPECTS_INSTALLED" not in os.environ, reason="tox says where the wheel is installed")
def test_what_is_tested_is_what_was_installed() -> None:
    installed = Path(os.environ["HARNESS_EXPECTS_INSTALLED"])
    for package in (harness, harness_plugins):
        assert Path(str(package.__file__)).is_relative_to(installed)


def test_the_core_imports_no_plugin() -> None:
    named = [
        path for path in (ROOT / "harness").rglob("*.py") if re.search(r"import.*harness_plugins", path.read_text())
    ]
    assert named == []


def test_a_third_partys_plugin_in_a_fresh_environment(tmp_path: Path) -> None:
    """Install the example distribution into a new environment, by name only, and compare its method with the VAE.

    The new environment sees the libraries of this one through a path file, so that nothing has to be downloaded.
    """
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env/bin/python"
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    libraries = "".join(f"import site; site.addsitedir({folder!r})\n" for folder in site.getsitepackages())
    (purelib / "libraries.pth").write_text(libraries)
    pip = (sys.executable, "-m", "pip", "--python", python, "--quiet", "--disable-pip-version-check")
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "install", *offline, copied_example(tmp_path), cwd=tmp_path)
    harness = (python, "-c", "import sys; from harness.cli import main; sys.exit(main())")
    arguments = "--methods shared-scale,vae --problems four-points --seeds 1 --budget steps=50 --out results".split()
    table = run(*harness, "compare", *arguments, cwd=tmp_path)
    assert "shared-scale" in table
    records = pd.read_parquet(tmp_path / "results/records.parquet")
    assert set(records["method"]) == {"shared-scale", "vae"}
    assert set(records.loc[records["method"] == "shared-scale", "plugin"]) == {"harness-example"}
    assert records["spec_hash"].nunique() == 1
    assert (records["status"] != "failed").all()


def copied_example(folder: Path) -> Path:
    """A build writes into its source folder."""
    source = folder / "harness-example"
    source.mkdir()
    for path in EXAMPLE.iterdir():
        if path.is_file():
            (source / path.name).write_bytes(path.read_bytes())
    return source


@pytest.mark.parametrize("statement", ["import harness", "import harness.cli", "import harness.hookspecs"])
def test_torch_is_imported_on_first_use_only(statement: str, tmp_path: Path) -> None:
    heavy = "{'torch', 'pyro', 'pandas', 'matplotlib', 'sklearn'}"
    code = f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))"
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == "[]"


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)


def test_the_authors_guide_shows_the_example_that_is_tested() -> None:
    guide = ROOT / "plugins/README.md"
    assert (EXAMPLE / "harness_example.py").read_text() in blocks(guide, "python")
    assert EXPERIMENT.read_text() in blocks(guide, "python")
    assert (EXAMPLE.parent / "harness_pyro_example.py").read_text() in blocks(guide, "python")
    assert blocks(guide, "toml") == [(EXAMPLE / "pyproject.toml").read_text()]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the repository")
def test_records_and_reports_are_kept_by_git_and_fits_are_not() -> None:
    made = "report.md summary.csv figures/latent.png trials/records.csv trials/examples.parquet".split()
    large = "trials/fits/x/state.safetensors trials/measurements/x/exact.npz trials/checkpoints/x trials/jobs/x".split()
    paths = [f"results/avb-toy/{name}" for name in (*made, *large)]
    command = ["git", "-C", str(ROOT), "check-ignore", *paths]
    ignored = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.splitlines()
    assert ignored == paths[len(made) :]


def test_versions_are_constrained_for_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(Requirement(line).name) for line in lines if line and not line.startswith("#")}
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [*PROJECT["project"]["dependencies"], *(text for extra in extras for text in extra)]
    names = {canonicalize_name(Requirement(text).name) for text in wanted}
    assert names - {"inference-harness"} <= pinned
    assert "torch==2.13.0" in lines


def test_the_citation_names_the_paper() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    assert f"version: {PROJECT['project']['version']}\n" in text
    assert all(fact in text for fact in ("Mescheder", "Nowozin", "Geiger", "2017", "volume: 70", "1701.04722"))
