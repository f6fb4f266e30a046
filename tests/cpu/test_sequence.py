"""Pieces of work that threads go through without waiting for one another: `parallel_sequence`.

The OpenMP runtime is a stand-in of the program's own, with threads of the standard library.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lab.cuda.emulator import build

CPU = Path(__file__).parents[2] / "csrc" / "cpu"
MAIN = r"""
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "parallel.h"

using namespace qkern::cpu;

extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned number, unsigned) {
  std::vector<std::thread> others;
  for (unsigned i = 1; i < number; ++i) others.emplace_back(body, data);
  body(data);
  for (std::thread& other : others) other.join();
}

namespace {

constexpr std::int64_t kLong = 1'000'000'000;
constexpr int kPieces = 12;

// Takes one piece's items, each of which is counted where the piece has it.
template <typename Count>
void work_queue(std::int64_t items, std::int64_t grain, const Count& count) {
  WorkQueue queue(items, grain);
  auto body = [&] {
    std::int64_t begin, end;
    while (queue.next(&begin, &end)) count(begin, end);
  };
  parallel(3, kLong, body);
}

template <typename Count>
void parted_queue(std::int64_t items, std::int64_t grain, int threads, const Count& count) {
  PartedQueue queue(items, grain, threads);
  auto body = [&] {
    PartedQueue::Reader reader(queue);
    std::int64_t begin, end;
    while (reader.next(&begin, &end)) count(begin, end);
  };
  parallel(threads, kLong, body);
}

// Every item of every piece is taken once, whoever takes it.
int every_item_once(int threads) {
  std::vector<std::vector<std::atomic<int>>> taken;
  for (int piece = 0; piece < kPieces; ++piece) {
    taken.emplace_back(static_cast<std::size_t>(piece * piece * 7));  // the first has none
  }
  auto body = [&] {
    for (int piece = 0; piece < kPieces; ++piece) {
      auto& items = taken[static_cast<std::size_t>(piece)];
      const auto number = static_cast<std::int64_t>(items.size());
      const auto count = [&](std::int64_t begin, std::int64_t end) {
        for (; begin < end; ++begin) ++items[static_cast<std::size_t>(begin)];
      };
      if (piece % 2 == 0) {
        work_queue(number, 3, count);
      } else {
        parted_queue(number, 4, piece % 3 == 0 ? 100 : threads, count);
      }
    }
  };
  parallel_sequence(threads, kLong, kPieces, body);
  int wrong = 0;
  for (const auto& items : taken) {
    for (const auto& count : items) wrong += count != 1;
  }
  return wrong;
}

// Who takes the only item of the first piece keeps it until the last piece has been done: by
// another thread, which must not have waited.
int no_waiting() {
  std::atomic<bool> last_done{false};
  auto body = [&] {
    for (int piece = 0; piece < kPieces; ++piece) {
      work_queue(1, 1, [&](std::int64_t, std::int64_t) {
        if (piece == kPieces - 1) last_done = true;
        while (piece == 0 && !last_done) std::this_thread::yield();
      });
    }
  };
  parallel_sequence(2, kLong, kPieces, body);
  return last_done ? 0 : 1;
}

}  // namespace

int main(int arguments, char**) {
  share_always(true);
  if (arguments > 1) {
    auto body = [] {
      for (int piece = 0; piece < 3; ++piece) work_queue(1, 1, [](std::int64_t, std::int64_t) {});
    };
    parallel_sequence(2, kLong, 2, body);
    return 0;
  }
  int wrong = 0;
  for (const int threads : {1, 2, 3, 5, 70}) {
    for (int i = 0; i < 20; ++i) wrong += every_item_once(threads);
  }
  wrong += no_waiting();
  wrong += every_item_once(3);  // a sequence leaves nothing behind
  std::atomic<int> outside{0};
  work_queue(10, 3, [&](std::int64_t begin, std::int64_t end) { outside += end - begin; });
  std::printf("%d %d\n", wrong, outside.load());
}
"""


def compiled(folder: Path, *flags: str) -> Path:
    if not sys.platform.startswith("linux"):
        pytest.skip("symbols of a program are found by another flag")
    if build.compiler() is None:
        pytest.skip("needs g++ or CXX")
    (folder / "main.cpp").write_text(MAIN)
    sources = [str(folder / "main.cpp"), str(CPU / "parallel.cpp")]
    usual = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{CPU}", "-rdynamic")
    command = [build.compiler() or "g++", *usual, *flags, *sources, "-ldl", "-pthread"]
    subprocess.run([*command, "-o", str(folder / "main")], check=True)
    return folder / "main"


def test_every_item_is_taken_once_and_nobody_waits(tmp_path: Path) -> None:
    done = subprocess.run(
        [compiled(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["0", "10"]


def test_threads_do_not_race(tmp_path: Path) -> None:
    """By the compiler's own checker, which stops at a race."""
    program = compiled(tmp_path, "-fsanitize=thread", "-g")
    done = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the checker does not run on this system")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "10"]


def test_more_queues_than_were_said_are_not_done_twice(tmp_path: Path) -> None:
    done = subprocess.run([compiled(tmp_path), "more"], check=False, timeout=60)
    assert done.returncode != 0
