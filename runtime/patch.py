"""``enable`` and its kin: route ``F.scaled_dot_product_attention`` on nested tensors here."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nested._internal.nested_tensor import NestedTensor

from jagtile.runtime.errors import JagtileError, JagtileWarning, UnsupportedError
from jagtile.runtime.njt import Sdpa, sdpa, torch_sdpa


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
            self._original = getattr(ops, self.attribute)
            setattr(ops, self.attribute, self.call)
        elif not wanted and self._original is not None:
            setattr(ops, self.attribute, self._original)
            self._original = None

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
        if not torch.compiler.is_compiling():
            try:
                return sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
            except UnsupportedError as error:
                if any(isinstance(t, NestedTensor) and t._lengths is not None for t in (query, key, value)):
                    # torch's CUDA kernels compute garbage from holes, silently. A NotImplementedError would not get
                    # through: torch takes it for "not handled here" and goes on.
                    raise JagtileError(str(error)) from error
                self._say(str(error))
        original = self._original or torch_sdpa()
        return original(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"torch's own implementation serves this call: {reason}", JagtileWarning, stacklevel=2)


_route = _Route()


def enable() -> None:
    """Route ``F.scaled_dot_product_attention`` on nested tensors here, in all threads. Calling it twice is the same.

    What jagtile does not serve (grad, dropout, float64, devices without kernels) still goes to torch's own
    implementation, with a JagtileWarning the first time for each reason; so does, without a warning, code under
    torch.compile. Holes raise JagtileError, because torch's CUDA kernels compute garbage from them.
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
