"""Calls CMake and passes the version on. Sources and flags are CMakeLists.txt's; metadata is pyproject.toml's."""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()


class CleanBuild(build_py):
    def run(self):
        # Or a module that has gone from the tree since an earlier build goes into the wheel. No more than what is ours:
        # --build-lib may be any directory, also one that holds the sources.
        earlier, sources = Path(self.build_lib, "rlhf_fast"), ROOT / "rlhf_fast"
        if not self.editable_mode and not sources.is_relative_to(earlier.resolve()):
            shutil.rmtree(earlier, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Kept in the tree for editable installs, so that they rebuild only what changed; apart from it for wheels.
        kept = self.inplace or self.editable_mode
        build = (ROOT / "build" if kept else Path(self.build_temp).resolve()) / f"cmake-{sys.implementation.cache_tag}"
        pybind11 = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True).strip()
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",  # the one of this isolated environment, not the last one's
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11}",
            f"-DRLHF_FAST_VERSION={self.distribution.get_version()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(
    ext_modules=[Extension("rlhf_fast._C", sources=[])],
    cmdclass={"build_py": CleanBuild, "build_ext": CMakeBuild},
)
