"""The repository's promises about itself: documented names, one test command, layers that point down."""

from __future__ import annotations

import importlib
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import layout_optax

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("layout_optax", "sage_optax", "lorapre_optax")
LAYERS = {"layout_optax": 0, "sage_optax": 1, "lorapre_optax": 2}


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_is_in_the_api_page_and_has_a_docstring(name):
    package = importlib.import_module(name)
    section = (ROOT / "docs" / "api.md").read_text().split(f"\n## `{name}`")[1].split("\n## ")[0]
    reexported = set() if package is layout_optax else set(layout_optax.__all__)
    assert len(set(package.__all__) - reexported) <= 17
    for public in package.__all__:
        assert f"`{public}`" in section, f"docs/api.md, section {name}, lacks {public}"
        value = getattr(package, public)
        if callable(value):
            assert value.__doc__, public


def test_api_page_names_nothing_that_does_not_exist():
    for name in PACKAGES:
        package = importlib.import_module(name)
        section = (ROOT / "docs" / "api.md").read_text().split(f"\n## `{name}`")[1]
        for documented in re.findall(r"^\| `(\w+)`", section.split("\n## ")[0], re.MULTILINE):
            assert hasattr(package, documented), f"{name}.{documented}"


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_import_only_what_lies_below_them(name):
    allowed = {"jax", "optax", "numpy"} | {p for p in PACKAGES if LAYERS[p] <= LAYERS[name]}
    for path in (ROOT / name).rglob("*.py"):
        text = path.read_text()
        assert "optax._src" not in text, path
        for module in re.findall(r"^\s*(?:from|import)\s+([\w.]+)", text, re.MULTILINE):
            top = module.split(".")[0]
            if top not in sys.stdlib_module_names and top in sys.modules:
                assert top in allowed, f"{path} imports {module}"


def test_importing_the_packages_starts_no_backend_and_needs_no_flax():
    code = (
        "import sys, layout_optax, sage_optax, lorapre_optax\n"
        "assert not {'flax', 'orbax', 'chex'} & set(sys.modules)\n"
    )
    # Starting a backend of this name would fail.
    environment = {**os.environ, "JAX_PLATFORMS": "none_such"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr


def test_ci_calls_exactly_the_readmes_commands():
    readme = (ROOT / "README.md").read_text()
    ci = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^\s*make test\b", readme, re.MULTILINE)
    assert re.search(r"^\s*make demo\b", readme, re.MULTILINE)
    assert re.search(r"^step make test$", ci, re.MULTILINE)


def test_versions_agree():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
    for name in PACKAGES:
        assert importlib.import_module(name).__version__ == version


def test_constraints_carry_no_addresses():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(
            r'[\w.-]+==[\w.]+(; python_version [<>=]+ "3\.12")?', line
        )
