"""Four folders are one package, however it is installed and wherever Python starts."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"zoo": "zoo", "kernels": "zoo.kernels", "recipes": "zoo.recipes", "weights": "zoo.weights"}
NEEDS_AN_IMPORT = "import zoo, zoo.kernels.dispatch, zoo.recipes.api, zoo.weights.loader"


def python(code: str, *, cwd: Path, path: list[Path] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path or []))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def succeed(code: str, *, cwd: Path, path: list[Path] | None = None) -> str:
    result = python(code, cwd=cwd, path=path)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_every_folder_with_code_or_data_is_listed_as_a_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    wanted = set()
    for folder, package in FOLDERS.items():
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in {".py", ".yaml", ".safetensors"} and "__pycache__" not in file.parts:
                below = file.parent.relative_to(ROOT / folder).parts
                wanted.add(".".join((package, *below)))
    assert set(settings["packages"]) == wanted
    assert settings["package-dir"] == {package: folder for folder, package in FOLDERS.items()}


@pytest.mark.parametrize("folder", ["kernels", "recipes", "weights"])
def test_a_mapped_folder_is_no_regular_package_of_its_own(folder):
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The built wheel, unpacked: what an installation puts into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if tracked.returncode:
        pytest.skip("not a git checkout, so the files of the project are not known")
    source = folder / "source"
    for name in filter(lambda name: (ROOT / name).is_file(), tracked.stdout.splitlines()):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build, str(folder)], cwd=source, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(next(folder.glob("attnzoo-*.whl"))) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_every_file_of_the_four_folders(wheel):
    for folder, package in FOLDERS.items():
        inside = wheel / package.replace(".", "/")
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in {".py", ".yaml", ".safetensors"} and "__pycache__" not in file.parts:
                assert (inside / file.relative_to(ROOT / folder)).is_file(), file
    assert not (wheel / "kernels").exists(), "a top-level kernels would break another package"


@pytest.mark.slow
def test_the_wheel_works_away_from_the_checkout(wheel, tmp_path):
    where = succeed(f"{NEEDS_AN_IMPORT}; print(zoo.__file__)", cwd=tmp_path, path=[wheel])
    assert Path(where) == wheel / "zoo" / "__init__.py"


def test_a_checkout_works_without_installation(tmp_path):
    where = succeed(f"{NEEDS_AN_IMPORT}; print(zoo.kernels.dispatch.__file__)", cwd=tmp_path, path=[ROOT])
    assert Path(where) == ROOT / "kernels" / "dispatch.py"


@pytest.mark.slow
def test_another_package_named_kernels_keeps_working_beside_ours(tmp_path):
    """Hugging Face publishes a package of that name; it must win over our folder, also in the root."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = 'theirs'\n")
    code = f"{NEEDS_AN_IMPORT}; import kernels; print(kernels.get_kernel, zoo.kernels.dispatch.__name__)"
    assert succeed(code, cwd=ROOT, path=[tmp_path]) == "theirs zoo.kernels.dispatch"
    code = f"import kernels; {NEEDS_AN_IMPORT}; print(kernels.get_kernel)"
    assert succeed(code, cwd=ROOT, path=[tmp_path]) == "theirs"


def test_importing_the_zoo_is_cheap_and_needs_no_optional_package(tmp_path):
    heavy = [
        "torch",
        "timm",
        "triton",
        "diffusers",
        "transformers",
        "pytorch_lightning",
        "matplotlib",
        "sklearn",
    ]
    code = f"import sys, zoo; print([name for name in {heavy} if name in sys.modules])"
    assert succeed(code, cwd=tmp_path, path=[ROOT]) == "[]"


def test_models_and_operations_work_without_triton_diffusers_or_lightning(tmp_path):
    code = (
        "import sys\n"
        "for name in ('triton', 'diffusers', 'pytorch_lightning', 'lightning', 'matplotlib', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        "import warnings, torch, zoo\n"
        "print(*zoo.create_model('nat_digits').eval()(torch.zeros(1, 3, 32, 32)).shape)\n"
    )
    assert succeed(code, cwd=tmp_path, path=[ROOT]) == "1 10"


@pytest.mark.parametrize(
    "order", ["import zoo, timm", pytest.param("import timm, zoo", marks=pytest.mark.slow)]
)
def test_timm_finds_our_models_in_either_order_of_import(order, tmp_path):
    code = f"{order}; print(type(timm.create_model('nat_digits')).__module__)"
    assert succeed(code, cwd=tmp_path, path=[ROOT]) == "zoo.models.nat"


@pytest.mark.slow
def test_a_model_goes_through_pickle_to_a_spawned_worker(tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(
        "import multiprocessing, torch, zoo\n"
        "def count(model):\n"
        "    return sum(p.numel() for p in model.parameters())\n"
        "if __name__ == '__main__':\n"
        "    model = zoo.create_model('nat_digits')\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        assert pool.apply(count, (model,)) == count(model)\n"
        "    print('same')\n"
    )
    result = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "same", result.stderr


def test_imports_point_one_way():
    """recipes -> zoo -> kernels; the command line and the lazy front door are the only way back up."""
    allowed_up = {"zoo/cli", "zoo/__init__.py"}
    for folder, banned in {
        "kernels": ("zoo.recipes", "zoo.weights", "zoo.models", "zoo.attention", "zoo.registry"),
        "weights": ("zoo.recipes", "zoo.models", "zoo.attention"),
        "zoo": ("zoo.recipes",),
    }.items():
        for file in (ROOT / folder).rglob("*.py"):
            name = file.relative_to(ROOT).as_posix()
            if any(name.startswith(door) for door in allowed_up):
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                modules = []
                if isinstance(node, ast.Import):
                    modules = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    modules = [node.module or ""]
                assert not [m for m in modules if m.startswith(banned)], f"{name} imports {modules}"
