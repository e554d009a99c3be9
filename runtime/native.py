"""The host side of GPU calls in C++ (templates/host), where it is there: how it is had, and what it is told.

It serves what it has been taught: a call like one that Python has served before. Python serves all others, as it does
where nothing is built.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import warnings
from collections.abc import Callable, Hashable
from itertools import count
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch

from jagtile.runtime.eager import is_eager
from jagtile.runtime.errors import CompilerNotFoundError, JagtileWarning
from jagtile.runtime.layouts import Layout, layout_of_backward
from jagtile.runtime.settings import settings

if TYPE_CHECKING:
    from jagtile.runtime.cuda.recipe import Recipe

log = logging.getLogger("jagtile")

# ``varlen_attention`` and ``sdpa`` of their arguments in order. None: a call for Python; False: for Python, which is
# then to teach it.
serve: Callable[..., torch.Tensor | tuple[torch.Tensor, torch.Tensor] | Literal[False] | None] | None = None
serve_nested: Callable[..., torch.Tensor | Literal[False] | None] | None = None
# ``ops.backward`` of a call without grad and dropout. None: for Python; no tuple: for Python, which is then to teach it
# (``learn_backward``).
serve_backward: Callable[..., tuple[torch.Tensor, ...] | object | None] | None = None

_MAX_LISTS = 4096  # kinds of work lists that have a number: there is one or two for every batch

_host: Any = None  # the extension module
_lock = threading.Lock()
_begun: threading.Thread | None = None
_lists: dict[Hashable, int] = {}
_numbers = count()


def start(wait: bool = False) -> None:
    """Have the host built and loaded, as the setting says: by a thread, or before this returns. Once a process."""
    global _begun
    if settings.native_host == "off":
        return
    with _lock:
        if _begun is None:
            _begun = threading.Thread(target=_have, name="jagtile-native-host", daemon=True)
            _begun.start()
    if wait or settings.native_host == "wait":
        _begun.join()


def _have() -> None:
    try:
        from jagtile.generator.host import built

        cuda = ctypes.CDLL("libcuda.so.1")
        host = built()
        launch, launch_ex = _address(cuda.cuLaunchKernel), _address(cuda.cuLaunchKernelEx)
        connect(host, launch, launch_ex, _address(cuda.cuStreamIsCapturing))
    except (CompilerNotFoundError, ModuleNotFoundError, OSError) as error:
        log.info("Python launches: the native host can't be had: %s", error)
    except Exception as error:  # it is only an accelerator
        warnings.warn(f"the native host can't be used, Python launches: {error}", JagtileWarning, stacklevel=2)


def _address(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


def connect(host: ModuleType, launch: int, launch_ex: int, is_capturing: int, device_type: str = "cuda") -> None:
    """Let a loaded host serve calls on a kind of device by three functions of the driver, given by their addresses."""
    global _host, serve, serve_nested, serve_backward
    from jagtile.runtime.cuda import work_list

    _use_python(host)
    host.use_driver(launch, launch_ex, is_capturing, device_type, torch._C._cuda_getCurrentRawStream, _failed)
    _host = host
    work_list.mirror(_Lists(host))
    serve, serve_nested, serve_backward = host.serve, _first_nested, host.serve_backward


def _use_python(host: Any, marks: tuple[Any, Any] = ((), ())) -> None:
    """What the host asks Python for. marks: names of attributes, of nested tensors and of their values."""
    from torch.nested._internal.nested_int import NestedIntNode
    from torch.nested._internal.nested_tensor import NestedTensor

    from jagtile.runtime.njt_autograd import last_derivative
    from jagtile.runtime.njt_form import Form

    def nest(offsets: Any, cache: Any, size: Any, strides: Any, packed: torch.Tensor) -> torch.Tensor:
        return Form(offsets, None, 2, cache, size, strides).nest(packed)

    host.use_python(_gradients, nest, last_derivative, NestedTensor, NestedIntNode, *marks)


def _first_nested(*call: Any) -> Any:
    """``serve_nested`` until it is known whether the host puts nested tensors together as torch's constructor does.

    That is seen here and not while the host is loaded: the constructor imports modules of torch, which threads must not
    do beside others that may be importing the same.
    """
    global serve_nested
    from jagtile.runtime.njt_form import marks_if

    host = _host
    if host is None or not is_eager():
        return None

    def nest_like(model: Any, values: torch.Tensor, marks: Any) -> Any:
        _use_python(host, (marks.nested, marks.values))
        return host.nest_like(model, values)

    serve_nested = host.serve_nested if marks_if(nest_like) is not None else _leave_to_python
    return serve_nested(*call)


def _leave_to_python(*call: Any) -> None:
    """``serve_nested`` where the host can't."""


def disconnect() -> None:
    """Let Python serve all calls from now on."""
    global _host, serve, serve_nested, serve_backward
    from jagtile.runtime.cuda import work_list

    serve = serve_nested = serve_backward = None
    work_list.mirror(None)
    forget()
    _host = None


def forget() -> None:
    """Forget what was taught: kernels have changed."""
    if _host is not None:
        _host.forget()


def learn(
    batch: tuple[Any, ...],
    is_causal: bool,
    bottom_right: bool,
    scale: float,
    trained: bool,
    return_lse: bool,
    layout: Layout | None,
) -> None:
    """Teach a call that Python has served, by a kernel that does the same in all of its kind."""
    from jagtile.runtime.ops import route_of
    from jagtile.runtime.routes import ROUTES

    host, q, (max_seqlen_q, max_seqlen_k) = _host, batch[0], batch[5:]
    if host is None or layout is None or (is_causal, trained) not in layout.served:
        return
    route = route_of("fwd", layout.sizes, q.dtype, q.get_device(), max_seqlen_q, max_seqlen_k, is_causal)
    kernel = ROUTES.get(route)
    recipe_of = getattr(kernel, "recipe", None)
    recipe = recipe_of and recipe_of(layout, scale, bottom_right, trained or return_lse)
    if recipe is not None:
        host.learn(*batch, is_causal, bottom_right, scale, trained, return_lse, _told(recipe))


def _gradients(
    call: object,
    learns: bool,
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    *operands_and_options: Any,
) -> tuple[torch.Tensor, ...]:
    """What a node of the host gives back where it asks Python, and teaches it if it wants."""
    from jagtile.runtime.autograd import gradients_of

    *operands, options = operands_and_options
    grads = gradients_of(dout, dlse, tuple(operands), (*options, 0.0), None)
    if learns and dout is not None:
        learn_backward(call, dout, tuple(operands), options)
    return grads


def learn_backward(
    call: object, dout: torch.Tensor, operands: tuple[torch.Tensor, ...], options: tuple[Any, ...]
) -> None:
    """Teach the backward of a call, which the host has named, where Python has served it. operands: q, k, v, both
    offsets, out, lse; options: hints, is_causal, bottom_right, scale.
    """
    from jagtile.runtime.ops import route_of
    from jagtile.runtime.routes import BACKWARD_ROUTES

    host = _host
    q, k, v, cu_seqlens_q, cu_seqlens_k, out, _ = operands
    max_seqlen_q, max_seqlen_k, is_causal, bottom_right, scale = options
    layout = layout_of_backward(q, k, v, cu_seqlens_q, cu_seqlens_k, out, dout)
    if host is None or layout is None:
        return
    route = route_of("bwd", layout.sizes, q.dtype, q.get_device(), max_seqlen_q, max_seqlen_k, is_causal)
    kernel = BACKWARD_ROUTES.get(route)
    recipe_of = getattr(kernel, "recipe", None)
    recipe = recipe_of and recipe_of(layout, scale, bottom_right)
    if recipe is not None:
        host.learn_backward(call, dout, _told(recipe))


def _failed(code: int, device_index: int, again: bool) -> None:
    """A launch has. CudaDriverError, unless the thread only had no context, which is tried once more."""
    from jagtile.runtime.cuda import driver

    driver.recover(code, "cuLaunchKernel or cuLaunchKernelEx", device_index, again)


def _told(recipe: Recipe) -> tuple[object, ...]:
    """A recipe in plain values."""
    kernels = tuple((int(function), *numbers) for function, *numbers in recipe.kernels)
    kind = -1 if recipe.list_key is None else _number(recipe.list_key)
    return recipe.block, recipe.words, kernels, recipe.unaligned, recipe.scratch_bytes, kind, recipe.dependent


def _number(list_key: Hashable) -> int:
    """What stands for a kind of work list."""
    if list_key not in _lists:
        if len(_lists) >= _MAX_LISTS:
            _lists.clear()
            forget()
        _lists[list_key] = next(_numbers)
    return _lists[list_key]


class _Lists:
    """Python's work lists as the host finds them."""

    def __init__(self, host: Any) -> None:
        self._host = host
        self._kept: dict[Hashable, object] = {}

    def keep(
        self,
        key: tuple[int, int, Any],
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        buffer: torch.Tensor,
    ) -> None:
        """As ``work_list.Mirror``."""
        list_key, stream = key[2]
        self._kept[key] = self._host.keep_list(cu_seqlens_q, cu_seqlens_k, _number(list_key), stream, buffer)

    def drop(self, key: tuple[int, int, Any]) -> None:
        """As ``work_list.Mirror``."""
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._host.drop_list(kept)
