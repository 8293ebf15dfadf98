"""Imports the packages from an installed wheel and checks that they come from the wheel."""

import importlib
import pathlib
import sys


def main() -> None:
    """Fails unless every package comes from the directory given, typed, without the example."""
    site = pathlib.Path(sys.argv[1]).resolve()
    for name in ("layout_optax", "sage_optax", "lorapre_optax"):
        package = importlib.import_module(name)
        location = pathlib.Path(package.__file__ or "").resolve()
        assert location.is_relative_to(site), f"{name} came from {location}, not from {site}"
        assert (location.parent / "py.typed").exists(), f"{name} ships no py.typed"
        for public in package.__all__:
            getattr(package, public)
    forbidden = {"flax", "orbax", "chex"} & set(sys.modules)
    assert not forbidden, f"the packages imported {sorted(forbidden)}"
    for name in ("tests", "examples", "benchmarks"):
        assert not (site / name).exists(), f"{name} is in the wheel"
    print("The wheel imports from an empty directory:", *sorted(p.name for p in site.iterdir()))


if __name__ == "__main__":
    main()
