"""What a source distribution and a wheel hold, by setuptools' own lists; nothing is compiled."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[1]
PACKAGE = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "rlhf_fast").rglob("*")
    if path.is_file() and path.suffix not in (".pyc", ".so")
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the list of the sdist's files, and in lib/ the wheel's, over what an older build has left."""
    path = tmp_path_factory.mktemp("built")
    gone = path / "lib/rlhf_fast/gone.py"
    gone.parent.mkdir(parents=True)
    gone.touch()
    (path / "lib/mine.txt").touch()
    commands = ["egg_info", "--egg-base", str(path), "build_py", "--build-lib", str(path / "lib")]
    subprocess.run([sys.executable, "setup.py", "-q", *commands], cwd=ROOT, check=True, capture_output=True)
    return path


def test_the_source_distribution_holds_what_the_build_and_the_tests_need(built):
    listed = set((built / "rlhf_fast.egg-info/SOURCES.txt").read_text().splitlines())
    files = {"CMakeLists.txt", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "constraints.txt", "pyproject.toml",
             "setup.py"}  # fmt: skip
    for folder in ("bench", "csrc", "docs", "examples", "tests"):
        paths = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        files |= {path.relative_to(ROOT).as_posix() for path in paths}
    assert not (files | PACKAGE) - listed
    assert not [name for name in listed if name.endswith((".so", ".pyc")) or name.startswith(("build/", "runs/"))]


def test_the_wheel_holds_the_package_as_it_is_now(built):
    lib = built / "lib"
    assert {path.relative_to(lib).as_posix() for path in (lib / "rlhf_fast").rglob("*") if path.is_file()} == PACKAGE
    assert (lib / "mine.txt").exists()
    assert {"rlhf_fast/py.typed", "rlhf_fast/quickstart/constitution.yaml"} <= PACKAGE


def test_a_build_into_the_directory_of_the_sources_leaves_them_there(tmp_path):
    tree = tmp_path / "rlhf_fast"  # named as the package is: nor is it an earlier build of the directory above
    (tree / "rlhf_fast").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "rlhf_fast/_version.py"):
        shutil.copy(ROOT / name, tree / name)
    for lib in (tree, tmp_path):
        command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(lib)]
        subprocess.run(command, cwd=tree, check=False, capture_output=True)  # it fails, or copies files onto themselves
        assert (tree / "README.md").exists() and (tree / "rlhf_fast/_version.py").exists()
