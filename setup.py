"""Package metadata lives in pyproject.toml; this file only names the compiled parts."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

CSRC = Path("megatron_ext/csrc")
HEADERS = sorted(str(header) for header in CSRC.glob("*.h*"))

# Each `csrc/<name>.cpp` becomes `megatron_ext._<name>`; one that does not compile is left
# out (optional=True) and the Python path is used instead.
EXTENSIONS = [
    Pybind11Extension(
        f"megatron_ext._{source.stem}",
        [str(source)],
        depends=HEADERS,
        cxx_std=17,
        extra_compile_args=["-O3", "-pthread"],
        extra_link_args=["-pthread"],
        optional=True,
    )
    for source in sorted(CSRC.glob("*.cpp"))
]

setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": build_ext})
