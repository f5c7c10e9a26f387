"""The rules of the house, kept by reading the source: who may import what, what has a home, how large a file may be."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc import locate

import pytest
from omegaconf import OmegaConf

import fedpeft

ROOT = Path(__file__).parents[1]
FOLDERS = ("fedpeft", "strategies", "clients", "server", "experiments")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]

# Third parties stay behind few doors. A door is a file, or a folder with a slash at its end. Change a row with a reason, or not at all.
DOORS = {
    "flwr": [
        "fedpeft/records.py",
        "fedpeft/simulation.py",
        "server/app.py",
        "server/control.py",  # the control port: Flower's commands say neither keys nor folders
        "server/exchange.py",
        "server/flower.py",
        "server/polling.py",
        "clients/app.py",
        "clients/forward.py",
        "clients/process.py",
        "clients/site.py",
        "experiments/drill/twice.py",  # a SuperNode that sends twice
        "experiments/drill/simulation.py",  # breaks messages and replies as Flower's own parts would
        "experiments/benchmarks/",
    ],
    "peft": ["fedpeft/adapters/", "experiments/benchmarks/"],  # a benchmark measures against peft's own calls
    "dp_accounting": ["fedpeft/privacy/accountant.py"],
    "opacus": ["clients/private.py", "experiments/benchmarks/"],
    "hydra": ["fedpeft/config.py", "experiments/"],
    "omegaconf": ["fedpeft/config.py", "experiments/"],
    "transformers": ["fedpeft/models/", "fedpeft/adapters/", "experiments/doctor.py", "experiments/benchmarks/"],
    "datasets": ["fedpeft/data/hub.py"],
    "sklearn": ["fedpeft/data/"],
    "typer": ["experiments/"],
    "rich": ["experiments/"],
    "matplotlib": ["experiments/"],
    "ray": [],
    "pickle": [],  # a pickle from the network runs what its sender likes
    "cloudpickle": [],
}
ALLOWED_BELOW = {
    "fedpeft": {"fedpeft"},
    "strategies": {"fedpeft", "strategies"},
    "clients": {"fedpeft", "strategies", "clients"},
    "server": {"fedpeft", "strategies", "server"},
    "experiments": set(FOLDERS),
}
NO_NAMES = {"utils", "util", "common", "core", "helpers", "helper", "manager", "managers", "factory", "misc", "callbacks"}


@cache
def imported(path: Path) -> tuple[str, ...]:
    """Every module that the file imports, wherever in the file, and those it names in `import_module`."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant) and isinstance(argument.value, str))


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


# Who may import what


@pytest.mark.fast
@pytest.mark.parametrize("library", DOORS)
def test_a_library_comes_in_by_its_doors_only(library):
    inside = [name for name, path in zip(NAMES, FILES, strict=True) if library in roots(path)]
    assert [
        name for name in inside if not any(name == door or (door.endswith("/") and name.startswith(door)) for door in DOORS[library])
    ] == []


@pytest.mark.fast
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_what_lies_below_it(folder):
    for name, path in zip(NAMES, FILES, strict=True):
        if name.startswith(f"{folder}/") and name != "fedpeft/cli.py":  # which hands over to experiments/cli.py by name
            assert roots(path) & set(FOLDERS) <= ALLOWED_BELOW[folder], name


@pytest.mark.fast
def test_a_strategy_builds_on_fedavg_alone():
    for path in (ROOT / "strategies").glob("*.py"):
        others = {name for name in imported(path) if name.startswith("strategies")}
        assert others <= {"strategies.fedavg"}, path.name


@pytest.mark.fast
def test_the_product_does_not_import_its_tests():
    assert [name for name, path in zip(NAMES, FILES, strict=True) if roots(path) & {"tests", "pytest", "hypothesis"}] == []


def test_the_import_contract_is_kept():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


# Loading


@pytest.mark.fast
def test_importing_fedpeft_loads_neither_torch_nor_flower():
    script = "import sys, fedpeft; print(sorted({'torch', 'flwr', 'peft', 'transformers', 'numpy', 'hydra', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.fast
def test_loading_a_config_needs_no_torch():
    script = "import sys, fedpeft; fedpeft.load; print(sorted({'torch', 'flwr', 'peft', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.fast
def test_every_public_name_has_one_home_and_the_three_lists_agree():
    for_types: dict[str, str] = {}
    for node in ast.parse((ROOT / "fedpeft" / "__init__.py").read_text()).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                assert isinstance(line, ast.ImportFrom)
                for_types |= {alias.asname or alias.name: (line.module or "").removeprefix("fedpeft.") for alias in line.names}
    assert for_types == fedpeft._HOMES
    assert fedpeft.__all__ == sorted(fedpeft._HOMES)


@pytest.mark.fast
@pytest.mark.parametrize("name", fedpeft.__all__)
def test_a_public_name_resolves_to_what_its_home_defines(name):
    found = getattr(fedpeft, name)
    assert found is locate(f"fedpeft.{fedpeft._HOMES[name]}.{name}")
    assert getattr(found, "__module__", f"fedpeft.{fedpeft._HOMES[name]}") in (
        f"fedpeft.{fedpeft._HOMES[name]}",
        "builtins",
        "typing",
        "collections.abc",
    )


@pytest.mark.fast
def test_a_name_that_there_is_not_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fedpeft.nothing
    assert not hasattr(fedpeft, "torch")


@pytest.mark.fast
@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments" / "conf").glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_a_presets_target_is_there_and_can_be_called(path):
    target = OmegaConf.to_container(OmegaConf.load(path)).get("_target_")
    if target is None:
        assert path.parent.name == "privacy"
        return
    assert target.partition(".")[0] in ("fedpeft", "strategies")
    assert callable(locate(target)), target


SHARED = ("envelope", "largest", "rice")  # of several codecs: frame and checksum, the largest entries, coded positions


@pytest.mark.fast
def test_every_strategy_and_codec_has_a_preset():
    for family, folder in (("strategy", "strategies"), ("codec", "fedpeft/codecs")):
        targets = {
            OmegaConf.to_container(OmegaConf.load(path))["_target_"] for path in (ROOT / "experiments" / "conf" / family).glob("*.yaml")
        }
        used = {target.rpartition(".")[0].rpartition(".")[2] for target in targets}
        there = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__", "base", *SHARED}
        assert there == used


# Size, names, words


@pytest.mark.fast
@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_is_short_and_opens_with_its_idea(path):
    text = path.read_text()
    assert len(text.splitlines()) < 400
    assert ast.get_docstring(ast.parse(text)), "the file opens with a docstring that says its idea"


@pytest.mark.fast
def test_nothing_is_called_by_a_name_that_says_nothing():
    parts = {part for name in NAMES for part in Path(name).with_suffix("").parts}
    assert parts & NO_NAMES == set()


@pytest.mark.fast
def test_no_file_names_a_place_of_one_machine():
    place = re.compile(r"(?<![\w.])/(home|Users|root|work|mnt|workspace)/\w|[A-Z]:\\\\")
    texts = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml", ".md", ".json", ".html")]
    assert [str(path.relative_to(ROOT)) for path in texts if place.search(path.read_text())] == []


@pytest.mark.fast
def test_every_suppression_says_which_rule_and_why():
    for name, path in zip(NAMES, FILES, strict=True):
        for line in path.read_text().splitlines():
            if found := re.search(r"#\s*(noqa|type: ignore)(.*)$", line):
                assert re.match(r"(: [A-Z]+\d+|\[[a-z,-]+\])(, ?[A-Z]+\d+)*\s+(#\s*)?\S+", found[2]), f"{name}: {line.strip()}"


@pytest.mark.fast
def test_no_draw_comes_from_a_global_state():
    """Every draw starts in `seeds.generator`; `fork_rng` around a library that draws globally gives the state back."""
    drawing = re.compile(
        r"\b(torch\.(rand|randn|randint|randperm|normal|bernoulli|multinomial)\(|np\.random\.(?!Generator|default_rng)|random\.(random|choice|shuffle|sample)\()"
    )
    for name, path in zip(NAMES, FILES, strict=True):
        for line in path.read_text().splitlines():
            if drawing.search(line):
                assert "generator=" in line, f"{name}: {line.strip()}"


@pytest.mark.fast
def test_tests_mirror_the_tree():
    """A test file is named after what it tests; the others cut across all."""
    across = {"test_architecture", "test_conformance", "test_codecs", "test_presets", "test_ranks", "test_phases", "test_private_waves"}
    across |= {"test_flower_replies", "test_base_deltas", "test_exact_strategies", "test_feedback", "test_faults"}
    names = {path.stem for path in FILES} | {path.parent.name for path in FILES}
    for path in (ROOT / "tests").rglob("test_*.py"):
        if "e2e" not in path.parts:
            assert path.stem in across or path.stem.removeprefix("test_") in names, path
