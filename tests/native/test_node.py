"""The compiled node is a node of autograd like any other."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType

import pytest
import torch
from stand_in import Batch
from torch.utils.checkpoint import checkpoint

import jagtile
from jagtile.runtime.errors import UnsupportedError

pytestmark = pytest.mark.usefixtures("default_kernels")


@pytest.fixture
def taught(recorder, default_kernels, batch: Batch) -> Batch:
    """Its calls and their backwards are served by the host."""
    for _ in range(2):
        for out, leaves, dout in both(batch):
            torch.autograd.grad(out, leaves, dout)
    recorder.take()
    return batch


def both(batch: Batch) -> list[tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]]:
    """(output, leaves, its gradient), packed and nested."""
    return [(batch.attend(), batch.leaves, batch.dout), (batch.attend_nested(), batch.nested_leaves, batch.nested_dout)]


def test_it_is_used_by_backward_and_by_grad(recorder, taught):
    for out, leaves, dout in both(taught):
        torch.autograd.grad(out, leaves, dout, retain_graph=True)
        out.backward(dout)
        assert all(x.grad.shape == x.shape and x.grad.is_nested == x.is_nested for x in leaves)
    recorder.take("native")


def test_a_second_backward_needs_retain_graph(recorder, taught):
    for out, leaves, dout in both(taught):
        torch.autograd.grad(out, leaves, dout, retain_graph=True)
        torch.autograd.grad(out, leaves, dout)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize("which", range(3))
def test_an_operand_changed_in_place_is_noticed(taught, which):
    operands = [x * 1 for x in taught.leaves]
    out = jagtile.varlen_attention(*operands, taught.cu, taught.cu)
    with torch.no_grad():
        operands[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(taught.dout)
    nested = [x * 1 for x in taught.nested_leaves]
    out = jagtile.sdpa(*nested)
    with torch.no_grad():
        nested[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(taught.nested_dout)


def test_offsets_and_outputs_changed_in_place_are_noticed(taught):
    cu = taught.cu.clone()
    for _ in range(2):
        out = jagtile.varlen_attention(*taught.leaves, cu, cu)
    cu.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(taught.dout)
    for out, _, dout in both(taught):
        with torch.no_grad():
            out.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward(dout)


def test_a_second_derivative_is_refused(taught):
    for out, leaves, dout in both(taught):
        dout = dout.detach().requires_grad_()
        grads = torch.autograd.grad(out, leaves, dout, create_graph=True)
        assert all(grad.requires_grad for grad in grads)
        with pytest.raises(UnsupportedError, match="no second derivatives"):
            sum((grad.values() if grad.is_nested else grad).float().sum() for grad in grads).backward()


def test_an_lse_has_a_gradient(recorder, taught):
    for _ in range(2):
        out, lse = jagtile.varlen_attention(*taught.leaves, taught.cu, taught.cu, return_lse=True)
        assert lse.requires_grad
        (out.float().sum() + lse.sum()).backward()
        out, lse = jagtile.varlen_attention(*taught.leaves, taught.cu, taught.cu, return_lse=True)
        lse.sum().backward()  # out has none: Python
    assert recorder.take()[-1].by == "python"


def test_hooks_see_gradients(taught):
    for out, leaves, dout in both(taught):
        seen = []
        out.register_hook(lambda grad: seen.append("out"))  # noqa: B023
        out.grad_fn.register_hook(lambda grads, _: seen.append("node"))  # noqa: B023
        leaves[1].register_hook(lambda grad: seen.append("leaf"))  # noqa: B023
        out.backward(dout)
        assert seen == ["out", "node", "leaf"]


def test_hooks_of_saved_tensors_pack_and_unpack(taught):
    packed, unpacked = [], []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: packed.append(x.shape) or x.clone(), lambda x: unpacked.append(x.shape) or x
    ):
        outs = both(taught)
    for out, _, dout in outs:
        out.backward(dout)
    assert len(packed) == len(unpacked) == 14
    assert packed[:7] == packed[7:]


def test_a_checkpoint_recomputes(taught):
    fresh = Batch(lengths=(4, 4))
    for batch in (fresh, taught):  # the forward by Python, the recomputation by the host; both by the host
        for attend, dout in ((batch.attend, batch.dout), (batch.attend_nested, batch.nested_dout)):
            checkpoint(attend, use_reentrant=False).backward(dout)


def test_a_graph_dies_with_its_output(taught):
    for attend in (taught.attend, taught.attend_nested):
        out = attend()
        alive = weakref.ref(out)
        del out
        gc.collect()
        assert alive() is None


def test_a_graph_holds_what_it_needs(recorder, taught):
    cu = taught.cu.clone()
    for _ in range(2):
        out = jagtile.varlen_attention(*taught.leaves, cu, cu)
    recorder.take()
    del cu
    gc.collect()
    for expected in ("python", "native"):  # the first builds the backward's list
        torch.autograd.grad(out, taught.leaves, taught.dout, retain_graph=True)
        assert recorder.take()[-1].by == expected


def test_inference_and_no_grad(recorder, taught):
    for mode in (torch.no_grad, torch.inference_mode):
        for _ in range(2):
            with mode():
                outs = taught.attend(), taught.attend_nested()
        assert not any(out.requires_grad for out in outs)
        assert all(out.is_inference() == (mode is torch.inference_mode) for out in outs)
    recorder.take()


def test_threads_share_what_was_taught(recorder, taught):
    failures = []

    def train() -> None:
        try:
            for _ in range(20):
                for out, leaves, dout in both(taught):
                    torch.autograd.grad(out, leaves, dout)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(recorder.take("native")) == 4 * 20 * 2 * 3


def test_nested_outputs_can_be_copied_and_viewed(taught):
    out = taught.attend_nested()
    assert copy.deepcopy(out.detach()).shape[1:2] == out.shape[1:2]
    # The driver computes nothing: the values are whatever the memory held, so their place is compared.
    assert out.values().data_ptr() == out._values.data_ptr()
    (out.transpose(1, 2).flatten(2) * 2).values().sum().backward()
    assert all(x.grad is not None for x in taught.nested_leaves)


def test_size_and_layout_of_what_it_makes_ask_nothing_of_python(taught):
    out = taught.attend_nested()
    grads = torch.autograd.grad(out, taught.nested_leaves, taught.nested_dout)
    assert asks_python(taught.nest(taught.q))
    for made in (out, *grads):
        assert not asks_python(made)
        assert made.layout == torch.jagged
        assert (made.shape, made.stride()) == (made._size, made._strides)


def test_sizes_of_what_it_makes_are_copied_and_compared_without_pythons_nested_ints(taught):
    out = taught.attend_nested()
    called = python_called(lambda: torch.autograd.grad(out, taught.nested_leaves, taught.nested_dout))
    asked = [name for name, file in called if file.endswith("nested_int.py")]
    assert "clone" not in asked
    assert asked.count("eq") <= 2  # of dout, by torch's Python and by autograd


def test_autograd_takes_no_gradient_of_other_lengths_that_it_makes(taught):
    """Whose size is compared in C++: torch's Python sees only what ``grad`` is given."""
    other = Batch(lengths=(3, 40, 0, 5))
    with torch.no_grad():
        made = [other.attend_nested() for _ in range(2)][-1]
    assert not asks_python(made)

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dout):
            return made

    with pytest.raises(RuntimeError, match="invalid gradient"):
        torch.autograd.grad(Wrong.apply(taught.attend_nested()), taught.nested_leaves, taught.nested_dout)


def asks_python(nested: torch.Tensor) -> bool:
    """Whether looks at size and layout get to a rule for nested tensors, or to their class."""
    with torch._C.DisableTorchFunctionSubclass():
        called = {name for name, _ in python_called(lambda: (nested.layout, nested.shape))}
    return bool(called & {"find_torch_dispatch_rule", "__torch_dispatch__"})


def python_called(work: Callable[[], object]) -> list[tuple[str, str]]:
    """Names and files of the Python functions that this thread runs meanwhile."""
    called = []

    def look(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            called.append((frame.f_code.co_name, frame.f_code.co_filename))

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return called


def test_compiled_autograd_sees_the_operator(taught):
    from torch._dynamo import compiled_autograd

    seen = []
    out = taught.attend()
    with compiled_autograd._enable(lambda graph: seen.append(graph.code) or graph):
        out.backward(taught.dout)
    assert "jagtile.backward" in seen[0]
    assert all(x.grad is not None for x in taught.leaves)
