"""The repository's promises about itself: documented names, one test command, layers that point down."""

from __future__ import annotations

import ast
import importlib
import os
import pathlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import pytest

import layout_optax

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("layout_optax", "sage_optax", "lorapre_optax")
LAYERS = {"layout_optax": 0, "sage_optax": 1, "lorapre_optax": 2}

EXAMPLE = ROOT / "examples" / "llama"
COMMANDS = {
    *("train", "finetune", "generate", "evaluate", "export", "compare", "plan"),
}
GROUND = {"model", "data", "optimizers", "devices", "reporting"}
"""The example's folders that import nothing of each other."""
MAY_IMPORT = {
    **{folder: set() for folder in GROUND},
    "training": GROUND,
    "finetuning": GROUND | {"training"},
    "comparing": GROUND | {"training"},
    "commands": GROUND | {"training", "finetuning", "comparing"},
}
"""Each folder of the example, and the others that it may import; a command is a module beside the folders."""


PUBLIC = {
    "layout_optax": """ANY_LEAF LayoutWarning MemoryReport ParamLayout WholeModel adam_direction by_role
        describe infer_layout memory_report resolve_layout state_bytes state_shardings unboxed""",
    "sage_optax": """FactoredRmsState RECOMMENDED_SINKGD RECOMMENDED_WITH_MUON STATIC_ARGS ParamLayout
        SageState describe lion_hybrid sage sage_damper sage_hybrid scale_by_factored_rms scale_by_sage
        scale_by_sinkhorn sinkgd sinkgd_hybrid state_shardings unboxed""",
    "lorapre_optax": """RECOMMENDED RECOMMENDED_MUON STATIC_ARGS LorapreAdamState LowRankState ParamLayout
        describe lorapre_adamw
        lorapre_lion lorapre_metrics lorapre_muon lorapre_sgd lorapre_sinkgd low_rank_ema low_rank_trace
        resize_ranks scale_by_lorapre_adam scale_by_lorapre_lion scale_by_lorapre_muon state_shardings
        suggest_ranks unboxed""",
}


@pytest.mark.parametrize("name", PACKAGES)
def test_the_public_names_are_these(name):
    assert sorted(importlib.import_module(name).__all__) == sorted(PUBLIC[name].split())


@pytest.mark.parametrize("name", PACKAGES)
def test_no_package_imports_a_private_module_of_another(name):
    for path in (ROOT / name).rglob("*.py"):
        for package in re.findall(
            r"^\s*(?:from|import)\s+(\w+_optax)\._", path.read_text(), re.MULTILINE
        ):
            assert package == name, f"{path} imports a private module of {package}"


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_is_in_the_api_page_and_has_a_docstring(name):
    package = importlib.import_module(name)
    section = (ROOT / "docs" / "api.md").read_text().split(f"\n## `{name}`")[1].split("\n## ")[0]
    reexported = set() if package is layout_optax else set(layout_optax.__all__)
    assert len(set(package.__all__) - reexported) <= 18
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


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_folders_of_the_example_import_only_what_lies_below_them(folder):
    modules = EXAMPLE.glob("*.py") if folder == "commands" else (EXAMPLE / folder).glob("*.py")
    allowed = MAY_IMPORT[folder] | ({folder} - {"commands"})
    for path in modules:
        for imported in _imports(path):
            if imported.startswith("examples.llama."):
                where = imported.split(".")[2]
                assert where in allowed, f"{path.relative_to(ROOT)} imports {imported}"


def test_nothing_imports_a_command():
    commands = {f"examples.llama.{name}" for name in COMMANDS}
    for path in [*EXAMPLE.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        found = commands.intersection(_imports(path))
        assert not found, f"{path.relative_to(ROOT)} imports {found}"


def test_a_command_ends_in_one_way():
    """`reporting/command.py` says a user's mistake; `data/arithmetic.py` may not import it, being ground."""
    said = {
        path.relative_to(EXAMPLE).as_posix()
        for path in EXAMPLE.rglob("*.py")
        if re.search(r"""["']error: |USAGE_EXIT = |\breturn 2\b|exit\(2\)""", path.read_text())
    }
    assert said == {"reporting/command.py", "data/arithmetic.py"}


def test_the_example_is_its_folders_and_its_commands():
    inside = [path for path in EXAMPLE.rglob("*.py") if path.name != "__init__.py"]
    assert {path.stem for path in inside if path.parent == EXAMPLE} == COMMANDS
    assert {path.parent.name for path in inside if path.parent != EXAMPLE} == {*MAY_IMPORT} - {
        "commands"
    }
    for folder in MAY_IMPORT.keys() - {"commands"}:
        body = ast.parse((EXAMPLE / folder / "__init__.py").read_text()).body
        assert len(body) == 1, f"{folder}/__init__.py holds more than its docstring"
        assert isinstance(body[0], ast.Expr), folder


@pytest.mark.parametrize("folder", [*PACKAGES, "examples"])
def test_no_import_is_for_the_type_checker_alone(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert "typing.TYPE_CHECKING" not in _imports(path), path.relative_to(ROOT)


def _imports(path: pathlib.Path) -> Iterator[str]:
    """What a file imports, inside functions too: modules, and names as `module.name`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)} has a relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


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
