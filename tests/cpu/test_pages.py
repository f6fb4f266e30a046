"""Memory that was just allocated is told from memory that is in use: `has_pages`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lab.cuda.emulator import build

CPU = Path(__file__).parents[2] / "csrc" / "cpu"
MAIN = r"""
#include <sys/mman.h>

#include <cstdio>
#include <cstring>

#include "pages.h"

int main() {
  constexpr std::size_t kBytes = std::size_t{32} << 20;
  void* const map = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
                         0);
  if (map == MAP_FAILED) return 1;
  char* const data = static_cast<char*>(map);
  const auto tell = [&] { std::printf("%d ", qkern::cpu::has_pages(data + 64, kBytes - 64)); };
  tell();
  data[64] = 1;  // as an allocator's note, which says nothing of the rest
  tell();
  std::memset(data, 1, kBytes);
  tell();
  qkern::cpu::ask_for_large_pages(data + 64, kBytes - 64);
  for (std::size_t i = 0; i < kBytes; ++i) {
    if (data[i] != 1) return 2;
  }
  madvise(data, kBytes, MADV_DONTNEED);
  tell();
}
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="others do not tell")
@pytest.mark.skipif(build.compiler() is None, reason="needs g++ or CXX")
def test_pages_are_there_once_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "main.cpp").write_text(MAIN)
    program = tmp_path / "main"
    sources = [str(tmp_path / "main.cpp"), str(CPU / "pages.cpp")]
    flags = ("-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{CPU}")
    command = [build.compiler() or "g++", *flags, *sources, "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "0", "1", "0"]
