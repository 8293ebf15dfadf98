"""Trains in each framework with our optimizers, in an environment of its own; writes docs/results/frameworks.

``make test-frameworks`` runs all, ``make test-frameworks ARGS=tunix`` one; the others' rows are kept. Each
environment is ``.venv-frameworks/NAME``, made from the pins of ``tools/frameworks/NAME.txt``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
PINS = ROOT / "tools" / "frameworks"
ENVIRONMENTS = ROOT / ".venv-frameworks"
TESTS = pathlib.Path("tests/frameworks")
FRAMEWORKS: Mapping[str, tuple[Sequence[str], Sequence[str]]] = {
    "tunix": (["test_tunix.py"], ["google-tunix", "qwix"]),
    "maxtext": (["test_maxtext.py"], ["maxtext"]),
    "levanter": (
        ["test_equinox.py", "test_levanter.py"],
        ["marin-levanter", "marin-haliax", "equinox"],
    ),
}
"""By environment: its tests, and the packages whose versions the page shows beside those of `COMMON`."""
COMMON = ("jax", "flax", "optax", "numpy")
NOTES = {
    "levanter": "Levanter asks for optax below 0.2.7. Our packages asked for 0.2.8 or later when this "
    "environment was made, and ask for 0.2.6 now."
}
"""Why an environment holds versions that its packages' metadata refuse."""
_VERSIONS = """
import importlib.metadata as m, json, sys
found = {}
for name in sys.argv[1:]:
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: pass
print(json.dumps(found))
"""


def environment(name: str) -> pathlib.Path:
    """The interpreter of a framework's environment, which is made if its pins are new.

    Raises:
      subprocess.CalledProcessError: if pip fails.
    """
    folder, pins = ENVIRONMENTS / name, PINS / f"{name}.txt"
    python, mark = folder / "bin" / "python", folder / ".ready"
    digest = hashlib.sha256(pins.read_bytes()).hexdigest()
    if not mark.exists() or mark.read_text() != digest:
        print(f"== Setting up {folder.relative_to(ROOT)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # The pins are whole environments; `conflicts` says what a resolver would refuse.
        subprocess.run([*pip, "--no-deps", "--requirement", str(pins)], check=True)
        subprocess.run([*pip, "--no-deps", "--editable", str(ROOT)], check=True)
        mark.write_text(digest)
    return python


def conflicts(python: pathlib.Path) -> list[str]:
    """What pip finds wrong with the environment's versions."""
    command = [str(python), "-m", "pip", "check", "--disable-pip-version-check"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip().splitlines() if found.returncode else []


def run(name: str) -> dict[str, Any]:
    """Runs a framework's tests; what they recorded, the versions, and whether all passed."""
    tests, packages = FRAMEWORKS[name]
    try:
        python = environment(name)
    except subprocess.CalledProcessError as error:
        return {"passed": False, "why": f"not installed: {error}", "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        command = [str(python), "-m", "pytest", "-c", str(TESTS / "pytest.ini"), "--rootdir", "."]
        command += [f"--confcutdir={TESTS}", *(str(TESTS / test) for test in tests)]
        print(f"== {name}: {' '.join(command[1:])}", flush=True)
        variables = {**os.environ, "FRAMEWORKS_RESULTS": folder}
        code = subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode
        recorded = sorted(pathlib.Path(folder).glob("*.json"))
        rows = [
            {"framework": path.stem, **row}
            for path in recorded
            for row in json.loads(path.read_text())
        ]
    versions = subprocess.run(
        [str(python), "-c", _VERSIONS, *packages, *COMMON],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return {
        "passed": code == 0,
        "why": "" if code == 0 else f"pytest ended with {code}",
        "python": platform.python_version(),
        "versions": json.loads(versions),
        "conflicts": conflicts(python),
        "rows": rows,
    }


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page about the results."""
    lines = [
        "| framework | trainer, mesh | optimizer | leaves | loss | state, KiB | on a device, KiB "
        "| of AdamW's there | compilations | arrays equal after a restart |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    versions = []
    for name, found in results.items():
        for row in found["rows"]:
            first, last = row["losses"][0], row["losses"][-1]
            share = row["state_a_device"] / row["adamw_a_device"]
            cells = [row["framework"], row["setting"], row["optimizer"], row["leaves"]]
            cells += [f"{first:.2f} to {last:.2f}", f"{row['state'] / 1024:.1f}"]
            cells += [f"{row['state_a_device'] / 1024:.2f}", f"{share:.0%}"]
            cells += [row["compilations"], row["equal_arrays_after_restart"]]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        if not found["passed"]:
            versions.append(f"- `{name}`: **not complete**, {found['why']}")
        if "versions" not in found:
            continue
        pinned = ", ".join(f"{key} {value}" for key, value in found["versions"].items())
        versions.append(f"- `{name}`: Python {found['python']}, {pinned}")
        if found["conflicts"] and name in NOTES:
            versions.append(f"    - {NOTES[name]}")
        versions += [f"    - pip says: {line}" for line in found["conflicts"]]
    table, listed = "\n".join(lines), "\n".join(versions)
    return f"""# Inside frameworks

`make test-frameworks` trains a small Llama-like model with each framework's own trainer, eight steps on eight
virtual CPU devices, through the lines of the page on [frameworks](../frameworks.md). Every row passed these
checks:

- every parameter has the role, rows and columns that are expected of it, without rules;
- every array of the state lies where `state_shardings` puts it, a momentum as its parameter, and no matrix of a
  sharded parameter is copied to every device;
- the training step is compiled once, and once more in the run that goes on;
- a run that restores the checkpoint of about half way ends with the same losses, parameters and state, bit for
  bit.

Models are too small for the share of AdamW's state to mean much: statistics and small ranks weigh more than in
a large one. Losses are of one batch, learnt by heart. Nothing is timed.

{table}

{listed}

The tests are in `tests/frameworks`, the pins in `tools/frameworks`; neither is part of `make test`.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, writes the two files after each framework; 0 if all passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(FRAMEWORKS)}; all if none")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs" / "results")
    options = parser.parse_args(arguments)
    names = options.names or list(FRAMEWORKS)
    if unknown := set(names) - set(FRAMEWORKS):
        parser.error(f"no framework {sorted(unknown)}; there are {', '.join(FRAMEWORKS)}")
    data = options.output / "frameworks.json"
    results = json.loads(data.read_text()) if data.exists() else {}
    for name in names:
        results[name] = run(name)
        ordered = {key: results[key] for key in FRAMEWORKS if key in results}
        data.write_text(json.dumps(ordered, indent=2) + "\n")
        (options.output / "frameworks.md").write_text(page(ordered))
    failed = [name for name in names if not results[name]["passed"]]
    for name in names:
        print(f"== {name}: {'passed' if name not in failed else results[name]['why']}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
