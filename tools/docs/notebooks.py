"""Executes the notebooks of docs/notebooks and makes pages of them.

A hook of mkdocs. build/notebooks keeps a notebook's outputs by a hash of the notebook and of the code it runs
on, so that `make docs-serve` does not execute it at every change. A cell that raises fails the build. With
DOCS_FAST set (`make docs ARGS=--fast`) nothing is executed: the page shows the kept outputs, or none.
"""

import hashlib
import logging
import os
import pathlib
import tempfile
import time

import nbformat
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import MarkdownExporter

CODE = ("layout_optax", "sage_optax", "lorapre_optax")
CELL_SECONDS = 600

log = logging.getLogger("mkdocs.hooks.notebooks")


def on_files(files, config):
    """Adds the page of each notebook, and its pictures."""
    root = pathlib.Path(config.config_file_path).parent
    code = _hash(path for name in CODE for path in sorted((root / name).rglob("*.py")))
    for source in sorted(pathlib.Path(config.docs_dir).glob("notebooks/*.ipynb")):
        notebook = executed(source, root / "build" / "notebooks", root, code)
        exporter = MarkdownExporter()
        text, resources = exporter.from_notebook_node(notebook)
        name = source.stem
        for picture, data in resources["outputs"].items():
            text = text.replace(f"({picture})", f"({name}_{picture})")
            files.append(File.generated(config, f"notebooks/{name}_{picture}", content=data))
        ran = any(cell.get("outputs") for cell in notebook.cells)
        how = "executed by the build" if ran else "not executed in this build"
        note = f"\n*A notebook, {how}: [{source.name}]({source.name}).*\n"
        title, _, rest = text.lstrip().partition("\n")
        page = File.generated(config, f"notebooks/{name}.md", content=title + "\n" + note + rest)
        files.append(page)
    return files


def executed(source, cache, root, code):
    """The notebook with its outputs, executed in an empty folder unless the outputs exist."""
    kept = cache / f"{source.stem}-{_hash([source])}-{code}.ipynb"
    if kept.exists():
        return nbformat.read(kept, as_version=4)
    notebook = nbformat.read(source, as_version=4)
    if os.environ.get("DOCS_FAST"):
        return notebook
    start = time.monotonic()
    environment = {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        with tempfile.TemporaryDirectory() as folder:
            client = NotebookClient(
                notebook,
                timeout=CELL_SECONDS,
                startup_timeout=CELL_SECONDS,
                kernel_name="python3",
                resources={"metadata": {"path": folder}},
            )
            client.execute()
    except CellExecutionError as error:
        raise PluginError(f"{source.name}: {error}") from error
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    log.info("%s took %.0f seconds", source.name, time.monotonic() - start)
    cache.mkdir(parents=True, exist_ok=True)
    for old in cache.glob(f"{source.stem}-*.ipynb"):
        old.unlink()
    nbformat.write(notebook, kept)
    return notebook


def _hash(paths):
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
