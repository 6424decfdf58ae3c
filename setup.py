"""Builds libtorch_pd, _runtime (and libtorch_pd_cuda) with CMake and ninja into torch_pd/.

Build-time settings (environment, never read at run time):
  TORCH_PD_CUDA       AUTO (default: when the installed torch is a CUDA build and nvcc is found),
                      ON (compile even against a CPU torch, as CI does) or OFF
  TORCH_PD_CUDA_ARCH  CUDA architectures for CMake, default 90a
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_MODULE = "torch_pd.libtorch_pd_cuda"
RUNTIME_MODULE = "torch_pd._runtime"


def want_cuda(torch) -> bool:
    choice = os.environ.get("TORCH_PD_CUDA", "AUTO").upper()
    if choice not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"TORCH_PD_CUDA must be AUTO, ON or OFF, got {choice!r}")
    nvcc = shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()
    if choice == "ON" and not nvcc:
        raise SystemExit("TORCH_PD_CUDA=ON but nvcc is neither on PATH nor in /usr/local/cuda/bin")
    return choice == "ON" or (choice == "AUTO" and torch.version.cuda is not None and bool(nvcc))


class CMakeBuild(build_ext):
    """Runs CMake once for all libraries; setuptools then copies or installs the outputs."""

    def finalize_options(self):
        try:
            import torch
        except ImportError as error:
            raise SystemExit(
                "torch_pd is built against the installed torch: pip install torch first, then "
                "pip install --no-build-isolation ."
            ) from error
        self.torch = torch
        modules = self.distribution.ext_modules
        if want_cuda(torch) and all(module.name != CUDA_MODULE for module in modules):
            modules.append(Extension(CUDA_MODULE, sources=[]))
        super().finalize_options()

    def get_ext_filename(self, name):
        # The runtime module is for one Python; the libraries of ops are for all.
        suffix = sysconfig.get_config_var("EXT_SUFFIX") if name.endswith("_runtime") else ".so"
        return name.replace(".", "/") + suffix

    def run(self):
        if not any(shutil.which(tool) for tool in ("cmake",)):
            raise SystemExit("cmake not found: pip install cmake ninja")
        cuda = any(extension.name == CUDA_MODULE for extension in self.extensions)
        if not cuda:  # one of an earlier build would go into the wheel
            (Path(self.build_lib) / f"{CUDA_MODULE.replace('.', '/')}.so").unlink(missing_ok=True)
        build = Path(self.build_temp).resolve()
        if self.editable_mode:  # setuptools' folder is a new one each time: all compiled again
            build = ROOT / "build" / "editable"
        build.mkdir(parents=True, exist_ok=True)
        torch_dir = f"-DTORCH_PD_TORCH_DIR={Path(self.torch.__file__).parent}"
        args = [
            torch_dir,
            f"-DTORCH_PD_PYTHON={sys.executable}",
            f"-DTORCH_PD_CUDA={'ON' if cuda else 'OFF'}",
            f"-DTORCH_PD_CUDA_ARCH={os.environ.get('TORCH_PD_CUDA_ARCH', '90a')}",
        ]
        nvcc = Path("/usr/local/cuda/bin/nvcc")
        if cuda and not shutil.which("nvcc"):
            args.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        generator = "Ninja" if shutil.which("ninja") else "Unix Makefiles"
        args.append(f"-G{generator}")
        cache = build / "CMakeCache.txt"
        same = (
            torch_dir[2:].replace("=", ":PATH="),
            f"CMAKE_GENERATOR:INTERNAL={generator}",
            f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}",
            f"CMAKE_CACHEFILE_DIR:INTERNAL={build}",
        )
        if cache.exists() and not set(same) <= set(cache.read_text().splitlines()):
            args.append("--fresh")  # of another environment: what CMake found there is not here
        subprocess.check_call(["cmake", "-S", str(ROOT), "-B", str(build), *args])
        subprocess.check_call(["cmake", "--build", str(build), "--parallel"])
        self.cmake_dir = build
        super().run()

    def build_extension(self, ext):
        built = self.cmake_dir / Path(self.get_ext_filename(ext.name)).name
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new inode: a process that has the old library mapped keeps it.
        target.unlink(missing_ok=True)
        shutil.copy2(built, target)


setup(
    license="Apache-2.0",
    ext_modules=[
        Extension("torch_pd.libtorch_pd", sources=[]),
        Extension(RUNTIME_MODULE, sources=[]),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
