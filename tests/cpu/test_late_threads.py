"""A caller whose threads come late works alone, and asks for them again later: `run_parallel`.

The OpenMP runtime is a stand-in of the program's own, whose threads come as late as it says.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lab.cuda.emulator import build

CPU = Path(__file__).parents[2] / "csrc" / "cpu"
MAIN = r"""
#include <chrono>
#include <cstdio>
#include <thread>

#include "parallel.h"

namespace {

std::chrono::microseconds late_before{0}, late_after{0};
int shared = 0, done = 0;

int shares(int calls, std::int64_t nanoseconds) {
  shared = 0;
  auto body = [] { ++done; };
  for (int i = 0; i < calls; ++i) qkern::cpu::parallel(2, nanoseconds, body);
  return shared;
}

}  // namespace

extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned, unsigned) {
  ++shared;
  std::this_thread::sleep_for(late_before);
  body(data);
  std::this_thread::sleep_for(late_after);
}

int main(int arguments, char**) {
  qkern::cpu::share_always(arguments > 1);
  constexpr std::int64_t kTiny = 1'000, kShort = 100'000, kLong = 1'000'000'000;
  constexpr std::chrono::microseconds kLate{4000}, kNever{0};
  std::printf("%d ", shares(20, kTiny));   // not worth waking anybody
  std::printf("%d ", shares(20, kShort));  // on time
  late_after = kLate;
  std::printf("%d ", shares(200, kShort));
  std::printf("%d ", shares(20, kLong));  // their part takes longer than they are late
  late_after = kNever;
  shares(5000, kShort);
  std::printf("%d ", shares(20, kShort));  // on time again
  late_before = kLate;                     // still on the way from the call before
  std::printf("%d ", shares(200, kShort));
  std::printf("%d\n", done);
}
"""
CALLS = 20 + 20 + 200 + 20 + 5000 + 20 + 200


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not sys.platform.startswith("linux"):
        pytest.skip("symbols of a program are found by another flag")
    if build.compiler() is None:
        pytest.skip("needs g++ or CXX")
    folder = tmp_path_factory.mktemp("late")
    (folder / "main.cpp").write_text(MAIN)
    sources = [str(folder / "main.cpp"), str(CPU / "parallel.cpp")]
    flags = ("-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{CPU}", "-rdynamic")
    command = [build.compiler() or "g++", *flags, *sources, "-ldl", "-o", str(folder / "main")]
    subprocess.run(command, check=True)
    return folder / "main"


def shares(program: Path, *arguments: str) -> list[int]:
    """Calls that were shared, by phase of the program; at the end how often work was done."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    return [int(number) for number in done.stdout.split()]


def test_who_waits_works_alone_until_others_come_in_time(program: Path) -> None:
    tiny, on_time, late, long, again, before, done = shares(program)
    assert tiny == 0
    assert on_time == 20
    assert 1 <= late < 20  # of 200
    assert long == 20
    assert again == 20
    assert 1 <= before < 20
    assert done == CALLS


def test_threads_can_be_asked_for_every_time(program: Path) -> None:
    assert shares(program, "always") == [20, 20, 200, 20, 20, 200, CALLS]
