"""``enable`` and its kin: route ``F.scaled_dot_product_attention`` on nested tensors here."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType
from typing import NamedTuple

import torch
from torch.nested._internal.nested_tensor import NestedTensor

from jagtile.runtime.errors import JagtileError, JagtileWarning, UnsupportedError
from jagtile.runtime.fallback import no_target
from jagtile.runtime.njt import Sdpa, sdpa, torch_sdpa, values_of


class _Route:
    """Owns the attribute of torch through which ``F.scaled_dot_product_attention`` reaches its code for NJTs.

    Installed while ``enable()`` holds or any ``enabled()`` block is open, in any thread: it is one for the process.
    """

    attribute = "jagged_scaled_dot_product_attention"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._switched_on = False
        self._blocks = 0
        self._original: Sdpa | None = None
        self._said: set[str] = set()
        self._known_graphs: dict[int, weakref.ref[CodeType]] = {}  # by identity: codes that say the same are equal

    def switch(self, on: bool) -> None:
        with self._lock:
            self._switched_on = on
            self._apply()

    @contextmanager
    def block(self) -> Iterator[None]:
        with self._lock:
            self._blocks += 1
            self._apply()
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                self._apply()

    def _apply(self) -> None:
        from torch.nested._internal import ops

        wanted = self._switched_on or self._blocks > 0
        if wanted and self._original is None:
            if not hasattr(ops, self.attribute):
                raise JagtileError(
                    f"torch {torch.__version__} has no torch.nested._internal.ops.{self.attribute} to replace: "
                    f"call jagtile.sdpa directly"
                )
            self._warn_of_old_graphs()
            self._original = getattr(ops, self.attribute)
            setattr(ops, self.attribute, self.call)
        elif not wanted and self._original is not None:
            setattr(ops, self.attribute, self._original)
            self._original = None
            self._newly_seen(compiled_graphs())  # they hold what this route had

    def call(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """``sdpa``, or torch's implementation for what it does not serve, said once for each reason."""
        given = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if fused_allowed():
            reason = no_target(values_of(query).device) if isinstance(query, NestedTensor) else None
            if reason is None:
                try:
                    return sdpa(*given)
                except UnsupportedError as error:
                    reason = str(error)
            if not torch.compiler.is_compiling():
                self._say(f"torch's own implementation serves this call: {reason}")
        return (self._original or torch_sdpa())(*given)

    def _warn_of_old_graphs(self) -> None:
        names = sorted({graph.name for graph in self._newly_seen(compiled_graphs()) if graph.over_nested_tensors()})
        if names:
            warnings.warn(
                f"torch.compile has graphs over nested tensors ({', '.join(names)}), which keep the attention "
                f"that they were made with: enable jagtile before the first call, or call torch._dynamo.reset()",
                JagtileWarning,
                stacklevel=4,
            )

    def _newly_seen(self, graphs: list[CompiledGraph]) -> list[CompiledGraph]:
        """Those that are seen for the first time."""
        known = {key: code for key, reference in self._known_graphs.items() if (code := reference()) is not None}
        self._known_graphs = {id(graph.code): weakref.ref(graph.code) for graph in graphs}
        return [graph for graph in graphs if known.get(id(graph.code)) is not graph.code]

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(what, JagtileWarning, stacklevel=4)


def fused_allowed() -> bool:
    """Whether the user lets fused kernels run: ``sdpa_kernel([MATH])`` asks for torch's reference numerics."""
    allowed = torch.backends.cuda
    return bool(
        allowed.flash_sdp_enabled()  # type: ignore[no-untyped-call]
        or allowed.mem_efficient_sdp_enabled()  # type: ignore[no-untyped-call]
        or allowed.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    )


def compiled_codes() -> list[CodeType]:
    """What torch.compile has compiled and not forgotten, as far as this torch tells."""
    convert_frame = sys.modules.get("torch._dynamo.convert_frame")
    references = getattr(getattr(convert_frame, "input_codes", None), "seen", ())
    return [code for code in (reference() for reference in references) if code is not None]


class CompiledGraph(NamedTuple):
    """One of the graphs that a function was compiled to."""

    name: str  # the function's
    code: CodeType  # what runs in its place
    guards: object

    def over_nested_tensors(self) -> bool:
        """Whether its guards name the type of a nested tensor, or how torch puts one together inside of the graph."""
        text = str(self.guards)
        return any(name in text for name in ("NestedTensor", "nested_tensor", "nested_view_from"))


def compiled_graphs() -> list[CompiledGraph]:
    """Those of every compiled code."""
    entries_of = getattr(sys.modules.get("torch._dynamo.eval_frame"), "_debug_get_cache_entry_list", lambda code: ())
    return [
        CompiledGraph(code.co_name, entry.code, entry.guard_manager)
        for code in compiled_codes()
        for entry in entries_of(code)
    ]


_route = _Route()


def enable() -> None:
    """Route ``F.scaled_dot_product_attention`` on nested tensors here, in all threads. Calling it twice is the same.

    What jagtile does not serve (dropout on GPUs, devices for which it makes no kernels) still goes to torch's own
    implementation, with a JagtileWarning the first time for each reason; so does, as asked for, everything where
    ``torch.nn.attention.sdpa_kernel`` allows no fused backend. Code under torch.compile comes here too; graphs over
    nested tensors that were made before keep what they hold, and a JagtileWarning names them.
    """
    _route.switch(True)


def disable() -> None:
    """Undo ``enable()``. An open ``enabled()`` block stays in force until its end."""
    _route.switch(False)


@contextmanager
def enabled() -> Iterator[None]:
    """A ``with`` block inside which ``enable()`` holds. May be nested and used by several threads at once."""
    with _route.block():
        yield
