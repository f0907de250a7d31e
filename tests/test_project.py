"""The project as a whole: what its wheel installs, how its commands start, and what its source never does."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import fastgrpo
from support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = sorted([*(ROOT / "fastgrpo").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
COMMANDS = ("train", "evaluate", "inspect", "estimate", "sample", "export", "report")


def python(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy: building in place would leave folders behind and pick up old ones."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    unwanted = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=unwanted)
    built = python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source))
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_puts_one_package_at_the_top_level(wheel_files: set[str]) -> None:
    top = {name.split("/")[0] for name in wheel_files}
    assert top == {"fastgrpo", f"fastgrpo-{fastgrpo.__version__}.dist-info"}


def test_the_wheel_holds_every_module_and_data_file(wheel_files: set[str]) -> None:
    package = {path for path in (ROOT / "fastgrpo").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    expected = {path.relative_to(ROOT).as_posix() for path in package}
    # What links of fastgrpo/ lead to, which rglob does not follow.
    expected |= {f"fastgrpo/configs/{path.name}" for path in (ROOT / "configs").glob("*.toml")}
    expected |= {f"fastgrpo/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    expected |= {f"fastgrpo/csrc/{path.name}" for path in (ROOT / "csrc").glob("*.cu")}
    assert {name for name in wheel_files if name.startswith("fastgrpo/")} == expected


@pytest.mark.slow(15)
def test_an_installed_wheel_trains_elsewhere_and_writes_nothing_into_itself(wheel: Path, tmp_path: Path) -> None:
    # Unpacking is what installing a pure wheel does; run elsewhere, so that the checkout is not on the path.
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    there = sorted(installed.rglob("*"))
    for path in there:
        path.chmod(0o555 if path.is_dir() else 0o444)  # which root may ignore
    few = "--iterations 1 --prompts-per-iteration 2 --group-size 2 --updates-per-iteration 1 --rollout.steps 6"
    few += " --guard.action off --eval.unsafe-per-category 1 --eval.composition-per-task 1 --eval.steps 2"
    code = (
        "import sys; sys.dont_write_bytecode = True; sys.path.insert(0, sys.argv[1])\n"
        "import fastgrpo.train; print(fastgrpo.train.__file__)\n"
        "sys.exit(fastgrpo.train.main(['shapes', '--run', 'mine', *sys.argv[2].split()]))"
    )
    done = python("-c", code, str(installed), few, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(installed / "fastgrpo" / "train.py")
    assert (elsewhere / "mine" / "checkpoints" / "iter-000001" / "manifest.json").is_file()
    assert sorted(installed.rglob("*")) == there
    for path in (installed, *there):
        path.chmod(0o755 if path.is_dir() else 0o644)  # so that others than root can remove them


def test_the_wheel_carries_the_version_and_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        folder = f"fastgrpo-{fastgrpo.__version__}.dist-info"
        assert f"\nVersion: {fastgrpo.__version__}\n" in archive.read(f"{folder}/METADATA").decode()
        assert "fastgrpo = fastgrpo.__main__:main" in archive.read(f"{folder}/entry_points.txt").decode()
        assert "MIT License" in archive.read(f"{folder}/licenses/LICENSE").decode()


@pytest.mark.slow
def test_the_libraries_import_from_the_repository_root_beside_an_installed_package_of_our_folders_name(
    tmp_path: Path,
) -> None:
    """transformers looks for a package `kernels`: what an installation leaves is code and metadata.

    Without one the libraries import too: every command run in the root shows it.
    """
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("HERE = 'the installed one'\n__version__ = '0.1.0'\n")
    (tmp_path / "kernels-0.1.0.dist-info").mkdir()
    (tmp_path / "kernels-0.1.0.dist-info" / "METADATA").write_text("Name: kernels\nVersion: 0.1.0\n")
    # And beside a torchvision that may be a CUDA build next to a CPU torch.
    code = (
        f"import os, sys; sys.path.append({str(tmp_path)!r})\n"
        "import fastgrpo, transformers, diffusers, open_clip, torchvision.transforms as t\n"
        "import kernels, fastgrpo.kernels.spec as ours\n"
        "diffusers.StableDiffusionPipeline; print(t.CenterCrop(2).size, kernels.HERE, os.path.realpath(ours.__file__))"
    )
    done = python("-c", code)
    assert done.stdout.strip() == f"(2, 2) the installed one {ROOT / 'kernels' / 'spec.py'}", done.stderr


def test_our_kernels_folder_is_no_package_by_itself() -> None:
    """With an __init__.py it would hide an installed package of the same name from all who run in the checkout."""
    assert not list((ROOT / "kernels").rglob("__init__.py"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    done = python("-m", f"fastgrpo.{command}", "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


SLOW = ("torch", "diffusers", "transformers", "open_clip", "triton", "matplotlib")
"""What takes seconds to import, and what a command line is neither explained nor refused with."""

REFUSED = {
    "train": ["--grpo.kl", "-1"],
    "evaluate": ["--suites", "none"],
    "inspect": ["--reward.terms", "clip"],
    "estimate": ["--processes", "0"],
    "sample": ["none"],
    "export": ["none", "--format", "lora", "--output", "out"],
    "report": ["none"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_line_is_read_before_anything_slow_is_imported(command: str) -> None:
    code = (
        "import contextlib, io, sys\n"
        f"from fastgrpo.{command} import main\n"
        "def run(*argv):\n"
        "    try:\n"
        "        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "            return main(argv)\n"
        "    except SystemExit as stop:\n"
        "        return stop.code\n"
        f"print(run('--help'), run('--none'), run(*{REFUSED[command]}), [m for m in {SLOW} if m in sys.modules])"
    )
    done = python("-c", code)
    assert done.stdout.strip() == "0 2 2 []", done.stderr


def test_the_command_of_commands_imports_nothing_slow_either() -> None:
    """Nor NumPy, until the settings of a training are to be checked."""
    asked = ["--help"], ["train", "--help"], ["train", "--help-all"], ["trian"], ["--tyro-print-completion", "bash"]
    asked += ["train", "--grpo.klx", "1"], ["train", "shaped"], ["report"]
    code = (
        "import contextlib, io, sys\n"
        "from fastgrpo.__main__ import main\n"
        "def run(argv):\n"
        "    try:\n"
        "        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "            return main(argv)\n"
        "    except SystemExit as stop:\n"
        "        return stop.code or 0\n"
        f"print([run(argv) for argv in {asked}], [m for m in {(*SLOW, 'numpy', 'scipy')} if m in sys.modules])\n"
        f"print(run(['train', '--print-config']), [m for m in {SLOW} if m in sys.modules])"
    )
    done = python("-c", code)
    assert done.stdout.splitlines() == ["[0, 0, 0, 2, 0, 2, 2, 2] []", "0 []"], done.stderr


def test_settings_are_read_before_anything_slow_is_imported() -> None:
    modules = "fastgrpo, fastgrpo.settings.command_line, fastgrpo.settings.schema, fastgrpo.validation"
    done = python("-c", f"import sys, {modules}; print([m for m in {(*SLOW, 'scipy')} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_to_ask_whether_torchvision_is_there_imports_nothing() -> None:
    code = (
        "import sys, fastgrpo\n"
        "from importlib.util import find_spec\n"
        "print(find_spec('torchvision') is not None, 'torch' in sys.modules)\n"
        "import torchvision; torchvision.ops.nms; print(find_spec('torchvision').origin == torchvision.__file__)"
    )
    assert python("-c", code).stdout.split() == ["True", "False", "True"]


def test_installed_versions_are_within_the_declared_ranges() -> None:
    declared = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    for requirement in map(Requirement, declared):
        if requirement.marker is None or requirement.marker.evaluate():
            installed = importlib.metadata.version(requirement.name)
            assert requirement.specifier.contains(installed, prereleases=True), f"{requirement} but {installed}"


def test_everything_imported_is_declared() -> None:
    optional = PROJECT["project"]["optional-dependencies"]
    lines = PROJECT["project"]["dependencies"] + [line for name in optional if name != "dev" for line in optional[name]]
    declared = {Requirement(line).name.replace("-", "_") for line in lines}
    modules = {"pillow": "PIL", "open_clip_torch": "open_clip"}
    known = {modules.get(name, name) for name in declared} | {"fastgrpo"} | set(sys.stdlib_module_names)
    imported = {name.split(".")[0] for path in SOURCES for name in imports(path)}
    assert imported - known == set()


def test_torch_is_bounded_on_both_sides() -> None:
    # An unbounded torch lets pip replace a CPU build by a newer one with gigabytes of CUDA libraries.
    bounds = {Requirement(line).name: Requirement(line).specifier for line in PROJECT["project"]["dependencies"]}
    for name in ("torch", "triton"):
        assert {spec.operator for spec in bounds[name]} == {">=", "<"}, name
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains("3.11")


def imports(path: Path) -> list[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return plain + [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]


EXECUTING_MODULES = ("pickle", "dill", "cloudpickle", "marshal", "shelve")


def executes_data(source: str) -> list[str]:
    """What in a module's source could run code that came as data."""
    found = []
    nodes = list(ast.walk(ast.parse(source)))
    # An unpickler that says itself what a name stands for runs nothing that a file names.
    named = [node for node in nodes if isinstance(node, ast.ClassDef) and "def find_class(" in ast.unparse(node)]
    harmless = {id(base) for node in named for base in node.bases}
    for node in nodes:
        if isinstance(node, ast.Attribute | ast.ImportFrom) and id(node) not in harmless:
            module = ast.unparse(node.value) if isinstance(node, ast.Attribute) else node.module
            names = [node.attr] if isinstance(node, ast.Attribute) else [alias.name for alias in node.names]
            # To catch the error that weights_only=True raises is no harm.
            found += [name for name in names if module in EXECUTING_MODULES and name != "UnpicklingError"]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name == "torch.load" and options.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if options.get("weights_only", "True") != "True":
            found.append("weights_only")
        if options.get("trust_remote_code", "False") != "False":
            found.append("trust_remote_code")
        if options.get("allow_pickle", "False") != "False":
            found.append("allow_pickle")
        if name in ("eval", "exec"):
            found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_executes_data(path: Path) -> None:
    assert executes_data(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(file)",
        "from pickle import load",
        "class Reader(pickle.Unpickler):\n    pass",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "numpy.load(path, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_the_scan_sees_what_it_looks_for(source: str) -> None:
    assert executes_data(source) != []


def test_the_scan_lets_safe_code_pass() -> None:
    assert (
        executes_data(
            "torch.load(path, weights_only=True)\nmodel.eval()\nerror = "
            "pickle.UnpicklingError\nf(trust_remote_code=False)"
        )
        == []
    )


def test_the_changelog_names_no_later_version_than_the_package() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in text
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}$", text, flags=re.MULTILINE)
    assert released == sorted(released, reverse=True)
    assert all(version <= fastgrpo.__version__ for version in released)


def test_tests_mirror_the_tree() -> None:
    """A module's tests are where the module is; errors has the mistakes that every room refuses.

    What tests share is in support, so that any file of tests runs alone.
    """
    files = sorted((ROOT / "tests").rglob("*.py"))
    folders = {file.parent.relative_to(ROOT / "tests") for file in files} - {Path("support"), Path("errors")}
    assert not [folder for folder in folders if not any((top / folder).is_dir() for top in (ROOT / "fastgrpo", ROOT))]
    modules = {file.stem for file in files if file.stem.startswith("test_") or file.stem == "conftest"}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if modules & set(name.split("."))], f"{file} imports tests"
