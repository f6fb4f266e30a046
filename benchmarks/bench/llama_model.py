"""llama.cpp's generation with a whole model, through the functions of llama-cpp-python.

The model is written into a GGUF file without a tokenizer, by the library ``gguf``, and llama.cpp
itself puts that in Q4_0 as its users have it done: linear layers in 4 bits, the head and the table
that it is tied to in more. Keys and values are cached in float16, its default.
"""

from __future__ import annotations

import ctypes
import tempfile
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import llama_cpp
from .timing import SkippedError

NAME = "llama.cpp Q4_0"
_INSTALL = (
    "pip install llama-cpp-python, which compiles for minutes, or as benchmarks/README.md says "
    "beside benchmarks/build_llama_cpp.sh"
)
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""The parts of a layer in a GGUF file, and what transformers calls them."""


@cache
def _library() -> ModuleType:
    """llama-cpp-python's functions. Raises `SkippedError` where they are not installed."""
    try:
        from llama_cpp import llama_cpp
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise SkippedError(f"llama-cpp-python cannot be used: {error}; {_INSTALL}") from None
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.qkern_silent = silent  # it must live as long as the library
    llama_cpp.llama_backend_init()
    return llama_cpp


def require(limit: str | None) -> Callable[[], None] | None:
    """What must run before timed calls, if anything; see `llama_cpp.before_calls`.

    Raises `SkippedError` where llama.cpp cannot take part, or uses more than `limit` for a model.
    """
    _library()
    if llama_cpp.AMX in llama_cpp.layouts_within(limit):
        return llama_cpp.before_calls(llama_cpp.AMX)
    if llama_cpp.AMX in (*llama_cpp.working_layouts(), *llama_cpp.broken_layouts()):
        raise SkippedError("its loader would choose the layout for AMX, which is broken or hidden")
    return None


def _gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise SkippedError(f"gguf cannot be imported: {error}") from None
    return gguf


def _heads(name: str, config: Any) -> int | None:
    """How many heads the rows of this weight are of, where they lie in pairs in a GGUF file."""
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name)


def _names(model: nn.Module) -> dict[str, tuple[str, int | None]]:
    """Of every tensor in the file: transformers' name, and whose heads' rows are in pairs."""
    config: Any = model.config
    found: dict[str, tuple[str, int | None]] = {
        "token_embd.weight": ("model.embed_tokens.weight", None),
        "output_norm.weight": ("model.norm.weight", None),
    }
    if not config.tie_word_embeddings:
        found["output.weight"] = ("lm_head.weight", None)
    for layer in range(config.num_hidden_layers):
        for short, long in _LAYER.items():
            name = f"model.layers.{layer}.{long}.weight"
            found[f"blk.{layer}.{short}.weight"] = name, _heads(short, config)
    return found


def _in_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows whose rotated halves lie apart, as transformers has them, side by side as in GGUF."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def _in_halves(weight: Tensor, heads: int) -> Tensor:
    """The opposite of `_in_pairs`."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def write(model: nn.Module, path: Path) -> None:
    """The model's float32 weights and sizes. Raises `SkippedError` unless it is a plain Llama."""
    gguf = _gguf()
    config: Any = model.config
    if config.model_type != "llama":
        raise SkippedError(f"takes plain Llama models here, not {config.model_type}")
    names, state = _names(model), model.state_dict()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if config.hidden_act != "silu" or set(state) - tied != {name for name, _ in names.values()}:
        raise SkippedError("takes plain Llama models here, not one with parts of its own")
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        raise SkippedError(f"takes plain rotary embeddings here, not {rope['rope_type']}")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for name, (source, heads) in names.items():
        weight = state[source].float()
        writer.add_tensor(name, (_in_pairs(weight, heads) if heads else weight).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _quantize(path: Path, to: Path) -> None:
    library = _library()
    params = library.llama_model_quantize_default_params()
    params.nthread = torch.get_num_threads()
    params.ftype = library.LLAMA_FTYPE_MOSTLY_Q4_0
    source, target = str(path).encode(), str(to).encode()
    if status := library.llama_model_quantize(source, target, ctypes.byref(params)):
        raise SkippedError(f"llama_model_quantize returned {status}")


@torch.no_grad()
def read_into(model: nn.Module, path: Path) -> None:
    """Give `model` the dequantised weights of a file that `write` and llama.cpp have made of it."""
    gguf = _gguf()
    names, state = _names(model), model.state_dict()
    for tensor in gguf.GGUFReader(path).tensors:
        source, heads = names[tensor.name]
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        values = values.reshape(state[source].shape)
        state[source].copy_(_in_halves(values, heads) if heads else values)


class Generation:
    """Greedy generation of `new_tokens` after `prompt`, ``[1, length]``, by torch's thread count.

    `model` is in float32, and holds the file's dequantised weights afterwards. Raises
    `SkippedError` where llama.cpp cannot take part.
    """

    def __init__(self, model: nn.Module, prompt: Tensor, new_tokens: int) -> None:
        library = self._library = _library()
        self.prompt, self.new_tokens = prompt, new_tokens
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        with tempfile.TemporaryDirectory() as directory:
            plain, quantized = Path(directory, "plain.gguf"), Path(directory, "q4_0.gguf")
            write(model, plain)
            _quantize(plain, quantized)
            read_into(model, quantized)
            options = library.llama_model_default_params()
            options.use_mmap = False  # the file goes
            loaded = library.llama_model_load_from_file(str(quantized).encode(), options)
        if not loaded:
            raise SkippedError("llama.cpp cannot load the model")
        self._free_model = weakref.finalize(self, library.llama_model_free, loaded)
        options = library.llama_context_default_params()
        options.n_ctx = options.n_batch = prompt.shape[1] + new_tokens
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self._context = library.llama_init_from_model(loaded, options)
        if not self._context:
            raise SkippedError("llama.cpp cannot make a context for the model")
        # What is made later is freed earlier: finalizers run in the opposite order.
        self._free_context = weakref.finalize(self, library.llama_free, self._context)

    def _decode(self, ids: Tensor) -> None:
        tokens = (ctypes.c_int32 * ids.numel())(*ids.flatten().tolist())
        batch = self._library.llama_batch_get_one(tokens, ids.numel())
        if status := self._library.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status}")

    def _reset(self) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), False)

    def logits(self) -> Tensor:
        """Of the last token of the prompt, ``[vocabulary]``, as a copy."""
        self._reset()
        self._decode(self.prompt)
        return torch.from_numpy(self._last().copy())

    def _last(self) -> np.ndarray:
        found = self._library.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(found, shape=(self._vocabulary,))

    def __call__(self) -> Tensor:
        self._reset()
        ids = [self.prompt]
        for _ in range(self.new_tokens):
            self._decode(ids[-1])
            ids.append(torch.tensor([[int(self._last().argmax())]]))
        return torch.cat(ids, 1)
