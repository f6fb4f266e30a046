"""Says what this machine lacks for `make setup`, all of it at once, with what to install.

Runs before anything is installed and on Pythons too old for qkern, so it keeps to syntax that
these understand and to the standard library.
"""

import os
import sys
import sysconfig

if sys.version_info < (3, 10):
    sys.exit(
        "qkern needs Python 3.10 or newer; {} is {}.{}. "
        "Name another one: make PYTHON=python3.12 ...".format(
            sys.executable, sys.version_info[0], sys.version_info[1]
        )
    )

import importlib.util
import shutil


def missing():
    """What is missing, one line each: what, and the packages that bring it."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        yield "Python's venv module: python3-venv on Debian and Ubuntu"
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        yield "a C++17 compiler ({}): g++ on Debian and Ubuntu, gcc-c++ on Fedora".format(
            ", ".join(compilers)
        )
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        yield "Python.h: python3-dev on Debian and Ubuntu, python3-devel on Fedora"


lines = list(missing())
if lines:
    sys.exit("\n  ".join(["This machine lacks:", *lines]))
