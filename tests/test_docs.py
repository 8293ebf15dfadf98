"""The documentation keeps its promises: complete, linked, running, its figures those that were measured.

The site itself is built by `make docs`, which needs more packages than the tests.
"""

from __future__ import annotations

import ast
import importlib
import json
import pathlib
import re
import statistics
import subprocess

import jax.numpy as jnp
import pytest

import lorapre_optax
from benchmarks.quality.rows import FULL
from tests.snippets import run_page, snippets

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))
MADE = {"changelog.md", "contributing.md", *(f"notebooks/{path.stem}.md" for path in NOTEBOOKS)}
"""Pages that the build makes."""
PACKAGES = ("layout_optax", "sage_optax", "lorapre_optax")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def prose(text):
    """A Markdown text without its code."""
    text = re.sub(r"^(`{3,}|~{3,}).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(?m)(?<=\n\n)(?:^ {4}(?! *[-*\d]).*\n)+", "", text)
    return re.sub(r"`[^`]*`", "code", text)


def anchors(path):
    """The anchors that Python-Markdown makes of a page's headings."""
    text = re.sub(r"^(`{3,}).*?^\1", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    slugs = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        words = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading))
        slugs.add(re.sub(r"[-\s]+", "-", words.strip().lower()))
    return slugs | set(re.findall(r"^::: (\S+)", text, re.MULTILINE))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_every_public_name(package):
    page = (DOCS / "api" / f"{package}.md").read_text()
    documented = re.findall(rf"^::: {package}\.(\S+)$", page, re.MULTILINE)
    assert len(documented) == len(set(documented))
    module = importlib.import_module(package)
    for name in documented:
        *inner, last = name.split(".")
        owner = importlib.import_module(".".join([package, *inner]))
        assert hasattr(owner, last), f"docs/api/{package}.md: no {package}.{name}"
    floor = importlib.import_module("layout_optax")
    expected = set(module.__all__) - (set() if module is floor else set(floor.__all__))
    public = {name for name in documented if "." not in name}
    assert public == expected


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page():
    text = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    entries = re.findall(r"(\S+\.md)\s*$", text, re.MULTILINE)
    listed = {
        found.relative_to(DOCS).as_posix()
        for entry in entries
        if "*" in entry
        for found in DOCS.glob(entry)
    }
    named = {entry for entry in entries if "*" not in entry}
    pages = {path.relative_to(DOCS).as_posix() for path in PAGES}
    assert named - pages == MADE & named
    # The tables of the demo are reached from the page of results.
    apart = {name for name in pages if re.fullmatch(r"results/\w+/table\.md", name)}
    assert pages | MADE == named | listed | apart


@pytest.mark.parametrize(
    "path",
    [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"],
    ids=name_of,
)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if there.is_relative_to(DOCS) and there.relative_to(DOCS).as_posix() in MADE:
            continue
        assert there.exists(), f"{name_of(path)} links to {target}"
        assert there.is_relative_to(ROOT), target
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{name_of(path)} links to {target}"


OWN_TESTS = {
    "docs/compatibility.md": "tests/compatibility/test_page.py",
    "docs/frameworks.md": "tests/frameworks/harness.py",
    "docs/sharding.md": "tests/sharding/test_documented_step.py",
}
"""Pages whose snippets need a mesh or a framework, and the test that runs them."""
PRINTING = ("numerics.md", "lorapre_explained.md", "sage.md")
"""Pages whose snippets print what a test compares."""
RUN = [path for path in [*PAGES, ROOT / "README.md"] if snippets(path.read_text())]
PARAMS = {"embed": {"embedding": jnp.ones((12, 8))}, "up": {"kernel": jnp.ones((8, 16))}}
GIVEN = {
    "docs/index.md": {"params": PARAMS, "grads": PARAMS},
    "README.md": {"params": PARAMS, "grads": PARAMS},
    "docs/lorapre.md": {"schedule": 1e-3, "lorapre_optax": lorapre_optax},
}
"""What a reader of a page has already."""


@pytest.mark.parametrize(
    "path", [path for path in RUN if path not in [DOCS / name for name in PRINTING]], ids=name_of
)
def test_snippets_run(path):
    if name_of(path) in OWN_TESTS:
        assert path.name in (ROOT / OWN_TESTS[name_of(path)]).read_text()
    else:
        run_page(path, GIVEN.get(name_of(path)))


def test_what_the_snippets_print(capsys):
    def printed(page):
        run_page(DOCS / page)
        return capsys.readouterr().out

    numerics, explained, sage = map(printed, PRINTING)
    assert numerics.split() == ["absolute", "0.5", "relative", "1.0", "1.0"]
    paper, exact = (float(x) for x in re.findall(r"(?:paper|exact) ([\d.]+)", explained))
    assert paper == pytest.approx(2.1, abs=0.1)
    assert exact == pytest.approx(1.0, abs=0.1)
    sizes = [int(line.replace(",", "")) for line in re.findall(r"([\d,]+)$", sage, re.MULTILINE)]
    assert sizes[0] > 1.9 * sizes[1] > 3.5 * sizes[2]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_notebooks_are_stored_without_outputs_and_parse(path):
    notebook = json.loads(path.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 6
    for cell in cells:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        ast.parse("".join(cell["source"]))


def test_figures_of_the_choosing_page_are_those_that_were_measured():
    """Every perplexity and share of state below "By memory budget" is in the quality benchmark's file."""
    page = (DOCS / "choosing.md").read_text()
    table = page.partition("## By memory budget")[2].partition("\n\nHeld-out")[0]
    seeds: dict[tuple[str, float], list[dict]] = {}
    for cell in json.loads((DOCS / "results" / "quality.json").read_text())["cells"]:
        if cell["steps"] == FULL:
            seeds.setdefault((cell["variant"], cell["learning_rate"]), []).append(cell)
    rows = [cells[0] for cells in seeds.values()]
    measured = {
        f"{statistics.fmean(cell['heldout_perplexity'] for cell in cells):.1f}"
        for cells in seeds.values()
    }
    shares = {f"{100 * row['state_ratio']:.{digits}f}" for row in rows for digits in (0, 1, 2)}
    lines = [line.split("|")[1:-1] for line in table.splitlines() if re.search(r"\d", line)]
    assert len(lines) == 6
    for _, _, perplexity, state, others in lines:
        assert perplexity.strip() in measured
        assert state.split()[0] in shares
        for share in re.findall(r"\(([\d.]+) %\)", others):
            assert share in shares, others
        for value in re.findall(r"\b(\d{2,3}\.\d)\b(?! %)", others):
            assert value in measured, others
    single = {f"{cell['heldout_perplexity']:.1f}" for cells in seeds.values() for cell in cells}
    said = page.partition("What it shows:")[2].partition("\n## ")[0]
    found = re.findall(r"\b(\d{2,3}\.\d)\b(?! %)", said)
    assert len(found) >= 10
    assert set(found) <= measured | single


def test_perplexities_of_the_readme_are_those_that_were_measured():
    text = (
        (ROOT / "README.md").read_text().partition("make bench-quality")[2].partition("## State")[0]
    )
    seeds: dict[tuple[str, float], list[float]] = {}
    shares = set()
    for cell in json.loads((DOCS / "results" / "quality.json").read_text())["cells"]:
        if cell["steps"] == FULL:
            key = (cell["variant"], cell["learning_rate"])
            seeds.setdefault(key, []).append(cell["heldout_perplexity"])
            shares |= {f"{cell['state_ratio']:.{digits}f}" for digits in (0, 3, 4)}
    known = {f"{statistics.fmean(v):.1f}": v for v in seeds.values()}
    rows = [
        line.split("|")[1:-1]
        for line in text.splitlines()
        if re.search(r"\d\.\d", line) and line[0] == "|"
    ]
    assert len(rows) == 14
    for _, perplexity, spread, share in rows:
        assert share.strip() in shares
        assert perplexity.strip() in known, perplexity
        if spread.strip():
            runs = [v for v in seeds.values() if f"{statistics.fmean(v):.1f}" == perplexity.strip()]
            assert spread.strip() in {f"{min(v):.1f} to {max(v):.1f}" for v in runs}


def test_times_of_the_choosing_page_are_those_that_were_measured():
    page = (DOCS / "choosing.md").read_text().partition("## Time")[2]
    steps = {}
    for folder in ("demo", "demo_all"):
        text = (DOCS / "results" / folder / "comparison.json").read_text()
        steps |= {row["label"]: row["step_time_ratio"] for row in json.loads(text)["rows"]}
    cells = json.loads((DOCS / "results" / "step_time.json").read_text())["cells"]
    updates = {
        cell["label"]: cell["time"]["ratio"]
        for cell in cells
        if tuple(cell[key] for key in ("kind", "preset", "dtype", "allocator"))
        == ("update", "galore_60m", "float32", "keep")
    }
    rows = re.findall(r"^\| ([\w -]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) == 6
    for label, step, update in rows:
        assert step == f"{steps[label]:.2f}", label
        assert update == f"{updates[label]:.2f}", label
    (noise,) = re.findall(r"against itself comes to ([\d.]+);", page)
    assert noise == f"{updates['AdamW']:.2f}"


def test_the_site_brings_what_its_search_needs_without_a_server():
    text = (ROOT / "mkdocs.yml").read_text()
    assert "\n  - offline" in text
    # The offline plugin takes this name for its own shim, which it would load from another host.
    assert "polyfills: [javascripts/iframe-worker.js]" in text
    script = (DOCS / "javascripts" / "iframe-worker.js").read_text()
    assert 'location.protocol === "file:"' in script
    assert "window.IFrameWorker = window.Worker" in script


def test_fast_documentation_runs_no_notebook():
    def dry_run(*arguments):
        command = ["make", "-n", "-C", str(ROOT), "docs", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "DOCS_FAST=1" in dry_run("ARGS=--fast")
    assert "DOCS_FAST" not in dry_run()
    assert 'os.environ.get("DOCS_FAST")' in (ROOT / "tools/docs/notebooks.py").read_text()
