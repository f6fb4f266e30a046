"""Says all that this machine lacks for `make setup`, with the packages that bring it.

Runs before anything is installed. The version check has to compile on any Python, so the file
keeps to syntax that Python 2 knows, too.
"""

import os
import sys
import sysconfig

if sys.version_info < (3, 10):
    sys.exit(
        "qkern needs Python 3.10 or newer; {} is {}.{}. "
        "Name another one: make PYTHON=python3.12 ...".format(sys.executable, *sys.version_info[:2])
    )

import importlib.util
import shutil


def missing():
    """What is missing, each with the packages that bring it."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        yield "Python's venv module: python3-venv on Debian and Ubuntu"
    cxx = os.environ.get("CXX")
    compilers = [cxx.split()[0]] if cxx else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        names = ", ".join(compilers)
        yield "a C++17 compiler ({}): g++ on Debian and Ubuntu, gcc-c++ on Fedora".format(names)
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        yield "Python.h: python3-dev on Debian and Ubuntu, python3-devel on Fedora"


lacks = list(missing())
if lacks:
    sys.exit("\n  ".join(["This machine lacks:"] + lacks))
