"""The layers that ours is measured beside. Weights are random bits: no peer's time depends on their values.

Every peer has ``name``, ``bits`` (bits per weight, scales included), ``cores`` (of the CPU, that it uses), ``gpu``
(whether it runs there) and ``prepare(x, routings)``, which returns one callable per routing. A call computes
``[rows, top_k, hidden]`` and returns when it is done; on a GPU it is a chain of calls.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU

from bench.cpu.contenders import run_chain
from bench.cpu.shape import Shape


class AffinePeer:
    """mlx-lm's own SwitchGLU with MLX's affine quantization, group 64.

    Activations and scales are float16 on a GPU. On the CPU they are float32, because MLX's CPU backend converts halves
    in software: float16 takes 35 times as long.
    """

    group_size = 64
    peer = True

    def __init__(self, shape: Shape, bits: int, rng: np.random.Generator, gpu: bool = False):
        self.gpu = gpu
        self.cores = 0 if gpu else 1  # MLX's CPU backend runs a stream on one thread
        self._dtype = mx.float16 if gpu else mx.float32
        self.name = f"mlx-lm affine {bits}-bit{' gpu' if gpu else ''}"
        self.bits = bits + 2 * 32 / self.group_size
        self.layer = SwitchGLU(shape.hidden, shape.intermediate, shape.experts)
        for projection, (k, n) in {
            "gate_proj": (shape.hidden, shape.intermediate),
            "up_proj": (shape.hidden, shape.intermediate),
            "down_proj": (shape.intermediate, shape.hidden),
        }.items():
            linear = QuantizedSwitchLinear(k, n, shape.experts, bias=False, group_size=self.group_size, bits=bits)
            words = rng.integers(0, 1 << 32, (shape.experts, n, k * bits // 32), np.uint32)
            scale = k**-0.5 / 2 ** (bits - 1)
            linear.weight = mx.array(words)
            groups = (shape.experts, n, k // self.group_size)
            linear.scales = mx.full(groups, scale, self._dtype)
            linear.biases = mx.full(groups, -scale * (2**bits - 1) / 2, self._dtype)
            setattr(self.layer, projection, linear)
        mx.eval(self.layer.parameters())

    def prepare(self, x: np.ndarray, routings: list[np.ndarray]) -> list:
        x = mx.array(x).astype(self._dtype)
        indices = [mx.array(routing) for routing in routings]
        mx.eval(x, indices)
        if self.gpu:
            return [partial(run_chain, self.layer, x, indices, i) for i in range(len(indices))]
        return [partial(lambda i: mx.eval(self.layer(x, i)), i) for i in indices]


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class _TypeTraits(ctypes.Structure):
    # The leading fields of ggml_type_traits (ggml.h).
    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
    ]


# Name: (ggml_type id, bytes per block of 256 weights, offset and value of each half-precision scale), as in
# ggml-common.h.
GGML_TYPES = {
    "Q2_K": (10, 84, {80: 0.01, 82: 0.01}),
    "Q3_K": (11, 110, {108: 0.001}),
    "Q4_K": (12, 144, {0: 0.0005, 2: 0.0005}),
}
_GGML_F32, _GGML_I32 = 0, 26
_GGML_BLOCK = 256


def ggml_library() -> ctypes.CDLL:
    """ggml inside the wheel of xllamacpp.

    Raises:
        ModuleNotFoundError: If xllamacpp is not installed.
    """
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None:
        raise ModuleNotFoundError("the ggml peer needs the wheel of xllamacpp: pip install xllamacpp")
    g = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    pointer, size, i64, i32 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int
    for name, result, arguments in (
        ("ggml_cpu_init", None, []),
        ("ggml_init", pointer, [_InitParams]),
        ("ggml_free", None, [pointer]),
        ("ggml_new_tensor_2d", pointer, [pointer, i32, i64, i64]),
        ("ggml_new_tensor_3d", pointer, [pointer, i32, i64, i64, i64]),
        ("ggml_get_data", pointer, [pointer]),
        ("ggml_nbytes", size, [pointer]),
        ("ggml_mul_mat_id", pointer, [pointer, pointer, pointer, pointer]),
        ("ggml_swiglu_split", pointer, [pointer, pointer, pointer]),
        ("ggml_new_graph", pointer, [pointer]),
        ("ggml_build_forward_expand", None, [pointer, pointer]),
        ("ggml_backend_cpu_init", pointer, []),
        ("ggml_backend_cpu_set_n_threads", None, [pointer, i32]),
        ("ggml_backend_graph_compute", i32, [pointer, pointer]),
        ("ggml_backend_free", None, [pointer]),
        ("ggml_get_type_traits", ctypes.POINTER(_TypeTraits), [i32]),
        ("ggml_version", ctypes.c_char_p, []),
    ):
        function = getattr(g, name)
        function.restype, function.argtypes = result, arguments
    g.ggml_cpu_init()
    return g


class GgmlPeer:
    """llama.cpp's CPU backend: mul_mat_id twice, swiglu_split, mul_mat_id; float32 in and out, as llama.cpp runs it."""

    peer = True
    gpu = False

    def __init__(self, shape: Shape, type_name: str, rng: np.random.Generator, threads: int):
        self.cores = threads
        self._g = ggml_library()
        self.name = f"ggml {type_name}"
        self.version = self._g.ggml_version().decode()
        self._shape = shape
        self._type, block_bytes, self._scales = GGML_TYPES[type_name]
        self._check_block(block_bytes)
        self.bits = 8 * block_bytes / _GGML_BLOCK
        self._backend = self._g.ggml_backend_cpu_init()
        self._g.ggml_backend_cpu_set_n_threads(self._backend, threads)
        weight_bytes = shape.experts * shape.weights_per_expert * block_bytes // _GGML_BLOCK
        self._context = self._new_context(weight_bytes)
        sizes = ((shape.hidden, shape.intermediate),) * 2 + ((shape.intermediate, shape.hidden),)
        self.weights = [self._random_weight(k, n, block_bytes, rng) for k, n in sizes]
        self._graph_contexts: list[int] = []

    def __del__(self):
        for context in [*self._graph_contexts, self._context]:
            self._g.ggml_free(context)
        self._g.ggml_backend_free(self._backend)

    def _check_block(self, block_bytes: int) -> None:
        traits = self._g.ggml_get_type_traits(self._type).contents
        found = (traits.type_name.decode(), traits.blck_size, traits.type_size)
        if found[1:] != (_GGML_BLOCK, block_bytes):
            raise RuntimeError(f"this ggml has another type {self._type}: {found}; {self.name} was expected")

    def _new_context(self, data_bytes: int) -> int:
        # 1 MiB holds the tensor descriptors, their alignment and the graph.
        context = self._g.ggml_init(_InitParams(data_bytes + (1 << 20), None, False))
        if not context:
            raise MemoryError(f"ggml_init could not allocate {data_bytes} bytes")
        return context

    def _view(self, tensor: int, dtype) -> np.ndarray:
        """The tensor's memory, flat."""
        buffer = (ctypes.c_uint8 * self._g.ggml_nbytes(tensor)).from_address(self._g.ggml_get_data(tensor))
        return np.frombuffer(buffer, dtype)

    def _random_weight(self, k: int, n: int, block_bytes: int, rng: np.random.Generator) -> int:
        tensor = self._g.ggml_new_tensor_3d(self._context, self._type, k, n, self._shape.experts)
        blocks = self._view(tensor, np.uint8).reshape(-1, block_bytes)
        blocks[:] = np.frombuffer(rng.bytes(blocks.size), np.uint8).reshape(blocks.shape)
        for offset, value in self._scales.items():
            blocks[:, offset : offset + 2] = np.array([value], np.float16).view(np.uint8)
        return tensor

    def dequantize(self, projection: int, expert: int) -> np.ndarray:
        """float32 [in, out] of one expert (0 gate, 1 up, 2 down), by ggml's own conversion."""
        k, n = (
            (self._shape.hidden, self._shape.intermediate)
            if projection < 2
            else (self._shape.intermediate, self._shape.hidden)
        )
        convert = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(
            self._g.ggml_get_type_traits(self._type).contents.to_float
        )
        weight = self._view(self.weights[projection], np.uint8).reshape(self._shape.experts, -1)[expert]
        out = np.empty((n, k), np.float32)
        convert(weight.ctypes.data, out.ctypes.data, out.size)
        return out.T

    def _graph(self, rows: int):
        """A graph for a number of rows: (graph, x, indices, result)."""
        s = self._shape
        floats = rows * s.hidden + rows * s.top_k * (3 * s.intermediate + s.hidden + 1)
        context = self._new_context(4 * floats)
        self._graph_contexts.append(context)
        g = self._g
        x = g.ggml_new_tensor_3d(context, _GGML_F32, s.hidden, 1, rows)
        indices = g.ggml_new_tensor_2d(context, _GGML_I32, s.top_k, rows)
        gate, up = (g.ggml_mul_mat_id(context, w, x, indices) for w in self.weights[:2])
        result = g.ggml_mul_mat_id(context, self.weights[2], g.ggml_swiglu_split(context, gate, up), indices)
        graph = g.ggml_new_graph(context)
        g.ggml_build_forward_expand(graph, result)
        return graph, x, indices, result

    def _run(self, graph: int, indices: np.ndarray, routing: np.ndarray) -> None:
        indices[:] = routing
        status = self._g.ggml_backend_graph_compute(self._backend, graph)
        if status:
            raise RuntimeError(f"ggml_backend_graph_compute failed with status {status}")

    def prepare(self, x: np.ndarray, routings: list[np.ndarray]) -> list:
        graph, x_tensor, indices, _ = self._graph(len(x))
        self._view(x_tensor, np.float32)[:] = x.reshape(-1)
        view = self._view(indices, np.int32)
        return [partial(self._run, graph, view, routing.reshape(-1).astype(np.int32)) for routing in routings]

    def result(self, x: np.ndarray, routing: np.ndarray) -> np.ndarray:
        """float32 [rows, top_k, hidden]."""
        graph, x_tensor, indices, result = self._graph(len(x))
        self._view(x_tensor, np.float32)[:] = x.reshape(-1)
        self._run(graph, self._view(indices, np.int32), routing.reshape(-1).astype(np.int32))
        return self._view(result, np.float32).reshape(*routing.shape, self._shape.hidden).copy()
