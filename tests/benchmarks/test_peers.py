"""The peers: they get qkern's weights, share the memory, and say why they are missing."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bench import kernels, llama_cpp, matmul, peers, timing, weights

import qkern
from tests.benchmarks.contests import play

pytestmark = pytest.mark.unpoisoned


def test_int4_peer_is_near():
    pytest.importorskip("torchao.prototype.quantization.int4")
    _, samples = play("forward", (64, 128), 5, torch.bfloat16, chosen=("torchao",))
    assert [sample.name for sample in samples] == ["qkern", "torchao int4"]


def test_own_format_is_held_to_its_own_weight():
    shape = (64, 96)
    qw = weights.random_weight(shape, torch.float32)
    held = weights.rows(qw, torch.arange(64)) * 1.1
    x, _ = matmul.activations(3, shape, torch.float32)
    peer = peers.LinearPeer(lambda _: None, 0, tolerance=0.001, rows=lambda wanted: held[wanted])
    judge = matmul.Check(qw, x).judge("other", peer)
    judge((x @ held.T,))
    with pytest.raises(AssertionError, match="relative error"):
        judge((x @ held.T * 1.01,))
    judge = matmul.Check(qw, x).judge("other", replace(peer, rows=lambda i: held[i] * 1.4))
    with pytest.raises(AssertionError, match=r"relative error 0\.5"):  # another weight
        judge((x @ held.T * 1.4,))


def test_peers_share_the_memory(monkeypatch):
    qw = weights.random_weight((64, 128), torch.float32)
    choice = peers.Choice(peers=("dense",))

    def left(copies: int) -> list[str]:
        return peers.linear_peers(qw, torch.float32, choice, copies=copies)[1]

    dense = 4 * qw.numel()
    free = int((qw.nbytes + dense) / peers._MEMORY_SHARE) + 2
    monkeypatch.setattr(peers.memory, "available", lambda: free)
    assert left(copies=1) == []
    (reason,) = left(copies=2)
    assert reason.startswith("dense: needs 0.0 GiB")


def test_scratch_of_one_peer_counts_for_all(monkeypatch):
    qw = weights.random_weight((64, 128), torch.float32)
    makers = [
        ("large scratch", lambda *_: peers.LinearPeer(lambda _: None, 100, 0.0, scratch=1000)),
        ("next", lambda *_: peers.LinearPeer(lambda _: None, 100, 0.0, held=100)),
    ]
    monkeypatch.setattr(peers, "_makers", lambda _: makers)

    def found(room: int) -> list[str]:
        free = (qw.nbytes + room) / peers._MEMORY_SHARE + 1
        monkeypatch.setattr(peers.memory, "available", lambda: free)
        return list(peers.linear_peers(qw, torch.float32, peers.Choice())[0])

    assert found(room=1300) == ["qkern", "large scratch", "next"]
    assert found(room=1299) == ["qkern", "large scratch"]
    assert found(room=1099) == ["qkern", "next"]


@pytest.fixture
def fresh_llama_cpp():
    """The module without what it found before."""
    caches = (llama_cpp._library, llama_cpp.working_layouts)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def llama_cpp_reason(**fields) -> list[str]:
    choice = kernels.Choice(peers=("llama.cpp",), **fields)
    return kernels.contest("forward", (64, 256), 2, torch.float32, choice)[2]


def test_missing_llama_cpp_tells_how_to_get_it(fresh_llama_cpp, monkeypatch, tmp_path):
    monkeypatch.delenv("LLAMA_CPP_LIB_PATH", raising=False)
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    reasons = llama_cpp_reason()
    assert [reason.split(":")[0] for reason in reasons] == ["llama.cpp Q4_0", "llama.cpp Q4_K"]
    assert "pip install llama-cpp-python" in reasons[0]
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    assert "libggml-base" in llama_cpp_reason()[0]


def test_layout_that_crashes_is_left_out(fresh_llama_cpp, monkeypatch):
    library = SimpleNamespace(layouts={"AMX": 1, "CPU_REPACK": 2, "CPU": 3})
    monkeypatch.setattr(llama_cpp, "_library", lambda: library)

    def run(command, **_):
        return subprocess.CompletedProcess(command, -4, "CPU\nCPU_REPACK\n", "")

    monkeypatch.setattr(llama_cpp.subprocess, "run", run)
    assert llama_cpp.working_layouts() == ("CPU_REPACK", "CPU")
    assert llama_cpp.broken_layouts() == ["AMX"]


def test_no_layout_that_works(fresh_llama_cpp, monkeypatch):
    monkeypatch.setattr(llama_cpp, "_library", lambda: SimpleNamespace(layouts={"CPU": 1}))
    finished = subprocess.CompletedProcess([], 1, "", "first\nCPU, Q4_0: relative error 0.5\n")
    monkeypatch.setattr(llama_cpp.subprocess, "run", lambda *_, **__: finished)
    with pytest.raises(
        timing.SkippedError, match=r"no layout works: CPU, Q4_0: relative error 0.5"
    ):
        llama_cpp.working_layouts()


def require_llama_cpp() -> tuple[str, ...]:
    try:
        return llama_cpp.working_layouts()
    except timing.SkippedError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("m", [1, 5, 40])
def test_llama_cpp_peer(m):
    require_llama_cpp()
    _, samples = play("forward", (64, 512), m, chosen=("llama.cpp",))
    ours = ["qkern (int8)"] if m <= peers.INT8_ROWS else []
    assert [s.name for s in samples] == ["qkern", "llama.cpp Q4_0", "llama.cpp Q4_K", *ours]
    play("mixed", (64, 512), m, chosen=("llama.cpp",))
    play("overhead", (64, 512), m, chosen=("llama.cpp",))


def test_llama_cpp_beside_others_that_use_the_tile_unit():
    layouts = require_llama_cpp()
    qw = weights.random_weight((64, 512), torch.float32)
    x, _ = matmul.activations(40, (64, 512), torch.float32)
    for layout in layouts:
        weight = llama_cpp.Weight.quantize(llama_cpp.KINDS[0], qw)
        linear = llama_cpp.Linear(weight, (layout,))
        before = llama_cpp.before_calls(layout) or (lambda: None)
        before()
        expected = linear(x).clone()
        qkern.linear_4bit(x.bfloat16(), qw)
        x.bfloat16() @ x.bfloat16().T
        before()
        assert torch.equal(linear(x), expected), layout


def test_llama_cpp_hides_no_more_than_amx():
    layouts = require_llama_cpp()
    assert llama_cpp_reason(limit="avx512vnni") == []
    assert "cannot be limited to avx512" in llama_cpp_reason(limit="avx512")[0]
    weight = llama_cpp.Weight(llama_cpp.KINDS[0], (64, 256))
    limited = [name for name in layouts if name != "AMX"]
    assert llama_cpp.Linear(weight, tuple(limited)).layout in limited


def test_llama_cpp_weight_is_near_and_wrong_results_are_seen(monkeypatch):
    require_llama_cpp()
    right = llama_cpp.Linear.__call__
    monkeypatch.setattr(llama_cpp.Linear, "__call__", lambda self, x: right(self, x) * 1.05)
    with pytest.raises(timing.WrongResultError, match=r"llama\.cpp Q4_0, forward"):
        play("forward", (64, 512), 5, chosen=("llama.cpp",))
