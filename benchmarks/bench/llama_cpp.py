"""llama.cpp's 4-bit matrix product: one ``ggml_mul_mat`` on its CPU backend, called as C functions.

The weight lies in the layout that llama.cpp's loader would choose on this processor: tiles for
AMX, rows interleaved for vectors, or rows as in the file. Activations are float32, which the
product rounds to 8 bits inside. The libraries are those of the package llama-cpp-python, or of the
directory that its variable ``LLAMA_CPP_LIB_PATH`` names; ``build_llama_cpp.sh`` builds just these.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

import qkern

from . import machinecode, weights
from .timing import SkippedError

DIRECTORY_VARIABLE = "LLAMA_CPP_LIB_PATH"
AMX = "AMX"  # its name in llama.cpp

_VNNI, _BFLOAT16 = "avx512vnni", "avx512bf16"  # what its build may use here besides AMX
_AMX_BYTES = 1 << 31  # of a weight: its offsets have 32 bits, and larger ones end in a crash

_INSTALL = (
    "pip install llama-cpp-python, which compiles for minutes, or run "
    f"benchmarks/build_llama_cpp.sh DIRECTORY and set {DIRECTORY_VARIABLE} to it"
)
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
_CONTEXT_BYTES = 1 << 20  # of descriptions; the tensors' memory is elsewhere
_TRIAL = (64, 512, 5)  # out_features, in_features, rows that every layout takes
_LOADERS_ROWS = 512  # of activations, for which the loader asks whether a layout is supported
_TRIAL_ERROR = 0.03

_F32 = 0
_POINTER, _INT, _LONG, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_LOGGER = ctypes.CFUNCTYPE(None, _INT, ctypes.c_char_p, _POINTER)


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool))


@dataclass(frozen=True)
class Kind:
    """One of ggml's types: its number, and how many weights a block of so many bytes holds."""

    name: str
    number: int
    block: int
    bytes: int


KINDS = (Kind("Q4_0", 2, 32, 18), Kind("Q4_K", 12, 256, 144))

_BASE = {
    "ggml_version": (ctypes.c_char_p, ()),
    "ggml_log_set": (None, (_LOGGER, _POINTER)),
    "ggml_init": (_POINTER, (_InitParams,)),
    "ggml_free": (None, (_POINTER,)),
    "ggml_new_tensor_2d": (_POINTER, (_POINTER, _INT, _LONG, _LONG)),
    "ggml_mul_mat": (_POINTER, (_POINTER, _POINTER, _POINTER)),
    "ggml_new_graph": (_POINTER, (_POINTER,)),
    "ggml_build_forward_expand": (None, (_POINTER, _POINTER)),
    "ggml_quantize_chunk": (_SIZE, (_INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER)),
    "dequantize_row_q4_0": (None, (_POINTER, _POINTER, _LONG)),
    "dequantize_row_q4_K": (None, (_POINTER, _POINTER, _LONG)),
    "ggml_backend_reg_dev_get": (_POINTER, (_POINTER, _SIZE)),
    "ggml_backend_reg_get_proc_address": (_POINTER, (_POINTER, ctypes.c_char_p)),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, (_POINTER, _POINTER)),
    "ggml_backend_cpu_buffer_type": (_POINTER, ()),
    "ggml_backend_cpu_buffer_from_ptr": (_POINTER, (_POINTER, _SIZE)),
    "ggml_backend_buft_name": (ctypes.c_char_p, (_POINTER,)),
    "ggml_backend_buft_get_alloc_size": (_SIZE, (_POINTER, _POINTER)),
    "ggml_backend_buft_alloc_buffer": (_POINTER, (_POINTER, _SIZE)),
    "ggml_backend_buffer_get_base": (_POINTER, (_POINTER,)),
    "ggml_backend_buffer_get_size": (_SIZE, (_POINTER,)),
    "ggml_backend_buffer_free": (None, (_POINTER,)),
    "ggml_backend_tensor_alloc": (_INT, (_POINTER, _POINTER, _POINTER)),
    "ggml_backend_tensor_set": (None, (_POINTER, _POINTER, _SIZE, _SIZE)),
    "ggml_backend_graph_compute": (_INT, (_POINTER, _POINTER)),
}
_CPU = {
    "ggml_backend_cpu_reg": (_POINTER, ()),
    "ggml_backend_cpu_init": (_POINTER, ()),
    "ggml_backend_cpu_set_n_threads": (None, (_POINTER, _INT)),
}


@cache
def _library() -> _Library:
    """The functions. Raises `SkippedError` where they are not installed."""
    named = os.environ.get(DIRECTORY_VARIABLE)
    spec = None if named else importlib.util.find_spec("llama_cpp")
    if named:
        directory = Path(named)
    elif spec is not None and spec.submodule_search_locations:
        directory = Path(spec.submodule_search_locations[0]) / "lib"
    else:
        raise SkippedError(_INSTALL)
    try:
        return _Library(directory)
    except (OSError, AttributeError) as error:
        raise SkippedError(f"its libraries cannot be used: {error}; {_INSTALL}") from None


class _Library:
    def __init__(self, directory: Path) -> None:
        for name, functions in (("base", _BASE), ("cpu", _CPU)):
            handle = ctypes.CDLL(str(directory / f"libggml-{name}{_SUFFIX}"))
            for function, (result, arguments) in functions.items():
                found = getattr(handle, function)
                found.restype, found.argtypes = result, arguments
                setattr(self, function, found)
        self._logger = _LOGGER(lambda *_: None)  # it tells of every tensor
        self.ggml_log_set(self._logger, None)
        registry = self.ggml_backend_cpu_reg()
        self.device = self.ggml_backend_reg_dev_get(registry, 0)
        self.backends: dict[int, int] = {}
        extra = self.ggml_backend_reg_get_proc_address(
            registry, b"ggml_backend_dev_get_extra_bufts"
        )
        found = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(extra)(self.device)
        buffers = []
        while found and found[len(buffers)]:
            buffers.append(found[len(buffers)])
        buffers.append(self.ggml_backend_cpu_buffer_type())
        self.layouts = {self.ggml_backend_buft_name(b).decode(): b for b in buffers}
        """The kinds of buffers by name, in the order that the loader prefers."""

    def backend(self, threads: int) -> int:
        if threads not in self.backends:
            backend = self.ggml_backend_cpu_init()
            self.ggml_backend_cpu_set_n_threads(backend, threads)
            self.backends[threads] = backend
        return self.backends[threads]

    def context(self) -> int:
        return self.ggml_init(_InitParams(_CONTEXT_BYTES, None, True))


def version() -> str:
    """Of ggml. Raises `SkippedError` where it is not installed."""
    return _library().ggml_version().decode()


@cache
def working_layouts() -> tuple[str, ...]:
    """The layouts whose product is right in a fresh process, the preferred first.

    A processor's instructions may be missing and a compiler may have built the wrong ones (see
    ``build_llama_cpp.sh``); either ends the process. Raises `SkippedError` where none works.
    """
    known = list(_library().layouts)
    finished = subprocess.run(
        [sys.executable, "-m", "bench.llama_cpp"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    right = finished.stdout.split()
    if not right:
        said = finished.stderr.strip().splitlines() or [f"exit status {finished.returncode}"]
        raise SkippedError(f"no layout works: {said[-1]}")
    return tuple(name for name in known if name in right)


def layouts_within(limit: str | None) -> tuple[str, ...]:
    """The working layouts that use nothing beyond the instruction set `limit`.

    Its build is for one processor: of what a run hides, it can leave out AMX alone. Raises
    `SkippedError` where that is not enough.
    """
    found = working_layouts()
    if limit not in (None, _VNNI, _BFLOAT16):
        raise SkippedError(f"its build cannot be limited to {limit}")
    return tuple(name for name in found if limit is None or name != AMX)


def broken_layouts() -> list[str]:
    """Those that it has and that failed."""
    return [name for name in _library().layouts if name not in working_layouts()]


class Weight:
    """A weight in one of ggml's types as in a file; `packed` is ``[out_features, bytes a row]``."""

    def __init__(self, kind: Kind, shape: tuple[int, int]) -> None:
        self.kind = kind
        self.shape = shape
        self.packed = torch.empty(shape[0], shape[1] // kind.block * kind.bytes, dtype=torch.uint8)

    @classmethod
    def quantize(cls, kind: Kind, qw: qkern.QuantizedTensor) -> Weight:
        """The dequantised `qw` by llama.cpp's own rule. Raises `SkippedError` on an odd shape."""
        n, k = qw.shape
        if k % kind.block:
            raise SkippedError(f"takes in_features divisible by {kind.block}")
        found = cls(kind, (n, k))
        quantize = _library().ggml_quantize_chunk
        for where, piece in weights.pieces(qw):
            dense, target = piece.dequantize(torch.float32), found.packed[where]
            quantize(kind.number, dense.data_ptr(), target.data_ptr(), 0, len(dense), k, None)
        return found

    def rows(self, wanted: Tensor) -> Tensor:
        """Some rows dequantised, in float32."""
        chosen = self.packed[wanted]
        out = torch.empty(len(chosen), self.shape[1])
        dequantize = getattr(_library(), f"dequantize_row_{self.kind.name.replace('Q', 'q')}")
        dequantize(chosen.data_ptr(), out.data_ptr(), out.numel())
        return out


class Linear:
    """``x @ W.T`` for float32 `x`, by as many threads as torch has when this is made.

    `layouts` are tried in turn; `layout` is the one taken, `nbytes` what the weight takes there.
    The result lies in memory that the next call uses again, as in llama.cpp.
    """

    def __init__(self, weight: Weight, layouts: tuple[str, ...]) -> None:
        self._weight = weight.shape
        lib = self._lib = _library()
        self._context = lib.context()
        self._free = weakref.finalize(self, lib.ggml_free, self._context)
        self._backend = lib.backend(torch.get_num_threads())
        self._input: Tensor | None = None
        self._graph: weakref.finalize | None = None
        self.layout, self._tensor, buffer = self._place(weight, layouts)
        self._buffer = weakref.finalize(self, lib.ggml_backend_buffer_free, buffer)
        self.nbytes = lib.ggml_backend_buffer_get_size(buffer)
        packed = weight.packed
        lib.ggml_backend_tensor_set(self._tensor, packed.data_ptr(), 0, packed.nbytes)

    def _place(self, weight: Weight, layouts: tuple[str, ...]) -> tuple[str, int, int]:
        """The layout, the tensor there without its values, and its buffer."""
        for layout in layouts:
            if layout == AMX and weight.packed.nbytes >= _AMX_BYTES:
                continue
            tensor, buffer = self._allocate(weight, self._lib.layouts[layout])
            if self._supported(tensor):
                return layout, tensor, buffer
            self._lib.ggml_backend_buffer_free(buffer)
        raise SkippedError("no layout takes this shape")

    def _allocate(self, weight: Weight, kind_of_buffer: int) -> tuple[int, int]:
        lib, (n, k) = self._lib, weight.shape
        tensor = lib.ggml_new_tensor_2d(self._context, weight.kind.number, k, n)
        size = lib.ggml_backend_buft_get_alloc_size(kind_of_buffer, tensor)
        buffer = lib.ggml_backend_buft_alloc_buffer(kind_of_buffer, size)
        if not buffer:
            raise SkippedError(f"cannot allocate {size / 2**30:.1f} GiB")
        base = lib.ggml_backend_buffer_get_base(buffer)
        lib.ggml_backend_tensor_alloc(buffer, tensor, base)
        return tensor, buffer

    def _supported(self, tensor: int) -> bool:
        lib = self._lib
        x = lib.ggml_new_tensor_2d(self._context, _F32, self._weight[1], _LOADERS_ROWS)
        product = lib.ggml_mul_mat(self._context, tensor, x)
        return lib.ggml_backend_dev_supports_op(lib.device, product)

    def __call__(self, x: Tensor) -> Tensor:
        if x is not self._input:
            self.bind(x)
        if status := self._compute():
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        return self._output

    def bind(self, x: Tensor) -> None:
        """Make the graph for this `x`, whose memory calls will read; one with another `x` does."""
        width = self._weight[1]
        if x.dtype != torch.float32 or not x.is_contiguous() or x.shape[1:] != (width,):
            raise ValueError(
                f"x: got {x.dtype} {tuple(x.shape)}; takes contiguous float32 [rows, {width}]"
            )
        lib = self._lib
        self._input, self._output = x, torch.zeros(len(x), self._weight[0])
        context = lib.context()
        matrix = lib.ggml_new_tensor_2d(context, _F32, self._weight[1], len(x))
        product = lib.ggml_mul_mat(context, self._tensor, matrix)
        buffers = [self._lend(x, matrix), self._lend(self._output, product)]
        graph = lib.ggml_new_graph(context)
        lib.ggml_build_forward_expand(graph, product)
        self._compute = partial(lib.ggml_backend_graph_compute, self._backend, graph)
        if self._graph is not None:
            self._graph()
        self._graph = weakref.finalize(self, _free_graph, lib, context, buffers)

    def _lend(self, memory: Tensor, tensor: int) -> int:
        buffer = self._lib.ggml_backend_cpu_buffer_from_ptr(memory.data_ptr(), memory.nbytes)
        self._lib.ggml_backend_tensor_alloc(buffer, tensor, memory.data_ptr())
        return buffer


def _free_graph(lib: _Library, context: int, buffers: list[int]) -> None:
    for buffer in buffers:
        lib.ggml_backend_buffer_free(buffer)
    lib.ggml_free(context)


@cache
def _tile_state() -> machinecode.TileState:
    """What ggml sets a thread's tile unit to, once, and other libraries release after each use."""
    weight = _trial_weight(KINDS[0])
    Linear(weight, (AMX,))(torch.zeros(_TRIAL[2], _TRIAL[1]))
    try:
        return machinecode.TileState()
    except (OSError, AttributeError) as error:
        raise SkippedError(f"cannot share the tile unit with other libraries: {error}") from None


def before_calls(layout: str) -> Callable[[], None] | None:
    """What must run before calls, when other libraries have used the tile unit since."""
    if layout != AMX:
        return None
    return partial(_tile_state().restore, torch.get_num_threads())


def _trial_weight(kind: Kind) -> Weight:
    generator = torch.Generator().manual_seed(0)
    n, k, _ = _TRIAL
    return Weight.quantize(kind, qkern.quantize_4bit(torch.randn(n, k, generator=generator)))


def main() -> None:
    """Print each layout whose products are right, the plainest first: a wrong one may crash."""
    for layout in reversed(_library().layouts):
        for kind in KINDS:
            weight = _trial_weight(kind)
            try:
                linear = Linear(weight, (layout,))
            except SkippedError:
                continue  # not for weights of this kind
            for m in (1, _TRIAL[2]):
                x = torch.randn(m, _TRIAL[1])
                exact = x.double() @ weight.rows(torch.arange(_TRIAL[0])).double().mT
                error = (linear(x).double() - exact).norm() / exact.norm()
                if error > _TRIAL_ERROR:
                    raise SystemExit(f"{layout}, {kind.name}: relative error {error:.3g}")
        print(layout, flush=True)


if __name__ == "__main__":
    main()
