"""The house stands as docs/design/architecture.md draws it: a file imports from its own floor or below."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"

# The longest matching prefix names a module's floor.
FLOORS = {
    "rankwise": 0,  # the package itself: names that are looked up when they are used
    "rankwise.errors": 0,
    "rankwise.identity": 0,
    "rankwise.launchers": 0,
    "rankwise.variables": 0,
    "rankwise.rendezvous": 0,
    "rankwise.visible": 0,
    "rankwise.files": 0,
    "rankwise.redact": 0,
    "rankwise.check": 0,
    "rankwise.telemetry": 0,
    "rankwise.parent": 1,
    "rankwise.device": 1,
    "rankwise.threads": 1,
    "rankwise.seed": 1,
    "rankwise.logs": 1,
    "rankwise.store": 2,
    "rankwise.rollcall": 2,
    "rankwise.lifeline": 2,
    "rankwise.waiting": 2,
    "rankwise.lastwords": 1,
    "rankwise.group": 2,
    "rankwise.rundir": 2,
    "rankwise.session": 2,
    "rankwise.collectives": 2,
    "rankwise.checkpoint": 3,
    "rankwise.monitor": 3,
    "rankwise.simulation": 4,
    "rankwise.runreader": 4,
    "rankwise.top": 4,
    "rankwise.report": 4,
    "rankwise.resumption": 4,
    "rankwise.testing": 4,
    "rankwise.launch": 4,
    "rankwise.as_rank": 4,
    "rankwise.whoami": 4,
    "rankwise.doctor": 4,
    "rankwise.jobfiles": 4,
    "rankwise.logreader": 4,
    "rankwise.ckpt": 4,
    "rankwise.cli": 4,
    "rankwise.__main__": 4,
    "videovae": 10,
    "videovae.errors": 10,
    "videovae.models": 10,
    "videovae.losses": 10,
    "videovae.quality": 10,
    "videovae.optim": 10,
    "videovae.ema": 10,
    "videovae.data": 11,
    "videovae.config": 12,
    "videovae.presets": 12,
    "videovae.tracking": 13,
    "videovae.videos": 13,
    "videovae.state": 13,
    "videovae.resume": 13,
    "videovae.evaluate": 13,
    "videovae.steps": 13,
    "videovae.train": 13,
    "videovae.reconstruct": 13,
    "videovae.published": 13,
    "videovae.weights": 13,
    "videovae.export": 13,
    "videovae.cli": 14,
    "videovae.__main__": 14,
}
NO_TORCH = 0
MODELS = 10


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(SRC.rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def floor_of(module: str) -> int:
    prefix = module
    while prefix not in FLOORS or (prefix in ("rankwise", "videovae") and prefix != module):
        assert "." in prefix, f"{module} stands on no floor; give it one in FLOORS"
        prefix = prefix.rpartition(".")[0]
    return FLOORS[prefix]


def imports(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules that `module` imports anywhere in it, but for type checkers."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for_checkers = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_checkers:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            base = node.module or ""
            members = {f"{base}.{alias.name}" for alias in node.names}
            found |= {member if member in known else base for member in members}
    return found - {module}


def test_every_import_goes_to_the_same_floor_or_down() -> None:
    known = modules()
    upward = [
        f"{module} (floor {floor_of(module)}) imports {other} (floor {floor_of(other)})"
        for module, path in known.items()
        for other in imports(module, path, known)
        if other in known and floor_of(other) > floor_of(module)
    ]
    assert not upward


def test_imports_are_acyclic() -> None:
    known = modules()
    # A package imports its own members, and a member's import runs the package first: that is no cycle of ours.
    graph = {
        module: {
            other
            for other in imports(module, path, known)
            if other in known and not other.startswith(f"{module}.") and not module.startswith(f"{other}.")
        }
        for module, path in known.items()
    }
    assert len(list(TopologicalSorter(graph).static_order())) == len(known)


def test_ground_floor_imports_no_torch() -> None:
    known = modules()
    users = [
        module
        for module, path in known.items()
        if floor_of(module) == NO_TORCH
        and any(name.split(".")[0] in ("torch", "numpy") for name in imports(module, path, known))
    ]
    assert not users


def test_models_and_losses_know_no_rank() -> None:
    known = modules()
    users = [
        f"{module} imports {name}"
        for module, path in known.items()
        if floor_of(module) == MODELS
        for name in imports(module, path, known)
        if name.startswith("torch.distributed") or (name.startswith("rankwise") and name != "rankwise.errors")
    ]
    assert not users


def test_a_module_without_a_floor_is_noticed() -> None:
    with pytest.raises(AssertionError, match="no floor"):
        floor_of("videovae.somewhere")
