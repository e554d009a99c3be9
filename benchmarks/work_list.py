"""How long the device takes to build the work list of a batch, and whether the list is right.

    PYTHONPATH=.pkg python benchmarks/work_list.py [--most 16384] [--causal]

Batches of 64 sequences and up, 64 tokens each on average. For each of the lists (a forward's, that of a forward which
splits keys, and of one that packs sequences too, a backward's, with and without an order of additions) all builders
take a turn: one CTA, of up to 1024 sequences, with as many threads as a launch would give it and with 512; a cluster
of eight CTAs, with as many threads as a launch would give them and with 1024, and one of sixteen, which not every GPU
has. That which a launch would choose has a star. Offsets are new in every call, so that every call builds its list, and
the attention kernel runs in between.
Prints the median device time of the builder, as torch's profiler (CUPTI) saw it. With --carveout builders ask for as
much shared memory as attention kernels have.
Every list is compared with one that the host built, also where captured graphs build it for offsets that change
between replays.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from jagtile.generator import build, list_oracle
from jagtile.generator.render import Source
from jagtile.generator.tile import Variant
from jagtile.runtime import cuda
from jagtile.runtime.cuda import CudaBackwardKernel, CudaForwardKernel, driver, list_builder, work_list

CALLS = 21
HEADS, DIM = 4, 64
LISTS = {  # variants with tiles of 64 queries, or keys
    "persistent": "fwd_bf16_d64{}/persistent_m64_n64_s2_q1_c1",
    "split": "fwd_bf16_d64{}/split_m64_n64_s2_q1_c1",
    "packed sequences": "fwd_bf16_d64{}/split_m64_n48_s2_q1_c1_k1",
    "backward": "bwd_bf16_d64{}/keyblocks_m64_n64_s2_c1_dbulk_o0_k1_hnone_l0_e1",
}


class Builder(NamedTuple):
    """Who builds a list."""

    alone: bool
    fewest_threads: int = 0
    ctas: int = list_builder.CLUSTER_CTAS


BUILDERS = {
    "one CTA": Builder(True),
    "512 threads": Builder(True, fewest_threads=512),
    "8 CTAs": Builder(False),
    "1024 threads": Builder(False, fewest_threads=1024),
    "16 CTAs": Builder(False, ctas=16),
}

Offsets = torch.Tensor


class Case:
    """A kernel and a batch; calls build the list and run the attention behind it."""

    def __init__(self, kernels: dict[int, Any], lengths: torch.Tensor, causal: bool, in_order: bool) -> None:
        self.kernels, self.causal, self.in_order = kernels, causal, in_order
        self.kernel = kernels[list_builder.CLUSTER_CTAS]
        self.offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().cuda()
        self.x = torch.randn((int(lengths.sum()), HEADS, DIM), dtype=torch.bfloat16).cuda()
        self.lse = self.x.new_zeros((HEADS, len(self.x)), dtype=torch.float32)
        self.built: work_list.WorkList | None = None

    def call(self, offsets: Offsets) -> None:
        x, out = self.x, torch.empty_like(self.x)

        def allocate(*given: object, **more: object) -> work_list.WorkList:
            self.built = make(*given, **more)  # type: ignore[arg-type]
            return self.built

        make = work_list.allocate
        torch.use_deterministic_algorithms(self.in_order)
        torch.utils.deterministic.fill_uninitialized_memory = False
        with mock.patch.object(work_list, "allocate", allocate):
            if isinstance(self.kernel, CudaForwardKernel):
                self.kernel.forward(x, x, x, offsets, offsets, out, None, 0.125, False)
            else:
                grads = (torch.empty_like(x) for _ in range(3))
                self.kernel.backward(x, x, x, offsets, offsets, x, self.lse, x, None, *grads, 0.125, False)
        torch.use_deterministic_algorithms(False)

    def check(self, offsets: Offsets) -> None:
        """Compare the last list with the host's."""
        assert self.built is not None
        data, host = bytes(self.built.buffer.cpu().numpy()), offsets.cpu().numpy().astype(np.int64)
        launch = self.kernel.meta.launch
        if isinstance(self.kernel, CudaBackwardKernel):
            how = list_oracle.Blocking(launch["block_m"], launch["block_n"], self.causal)
            heads = list_oracle.Heads(HEADS, HEADS, self.in_order)
            list_oracle.assert_right_keys(data, self.built.max_items, len(self.x), host, host, how, heads)
            return
        packs = bool(launch.get("pack_sequences"))
        block = self.kernel._tilings[HEADS, HEADS].block
        how = list_oracle.Blocking(block, launch["block_n"], self.causal, packs=packs)
        extra_items = self.extra_items if launch.get("partial_bytes") else None
        list_oracle.assert_right_queries(list_oracle.read(data, self.built.max_items), host, host, how, extra_items)

    @property
    def extra_items(self) -> int:
        """Room for pieces of keys."""
        of_queries = isinstance(self.kernel, CudaForwardKernel)
        return self.kernel._tilings[HEADS, HEADS].packs.extra_items if of_queries else 0


def builder_time(case: Case) -> float:
    """Microseconds of a launch, the median of ``CALLS``; the list that the last one built is checked."""
    fresh = [case.offsets.clone() for _ in range(CALLS + 1)]
    case.call(fresh[-1])
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for offsets in fresh[:-1]:
            case.call(offsets)
        torch.cuda.synchronize()
    times = [event.device_time for event in profiled.events() if "work_list" in event.name]
    assert len(times) == CALLS, f"{len(times)} launches of the builder in {CALLS} calls"
    # The attention has counted tiles and rewound the list, or not run at all.
    case.check(fresh[0])
    return statistics.median(times)


def check_replays(case: Case) -> None:
    """Lists that a captured graph builds for offsets that change."""
    offsets = case.offsets.clone()
    case.call(offsets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.call(offsets)
    for seed in range(3):
        order = torch.randperm(len(offsets) - 1, generator=torch.Generator().manual_seed(seed)).cuda()
        lengths = case.offsets.diff()[order]
        offsets[1:] = lengths.cumsum(0)
        graph.replay()
        torch.cuda.synchronize()
        case.check(offsets)


def at_least(threads: int, bounds: tuple[int, int]) -> tuple[int, int]:
    """Other bounds of a CTA's threads."""
    return max(threads, bounds[0]), bounds[1]


@contextmanager
def built_by(case: Case, builder: Builder) -> Iterator[None]:
    """All lists of a case by one builder."""
    case.kernel = case.kernels[builder.ctas]
    with (
        mock.patch.object(list_builder, "MOST_ALONE", 1 << 30 if builder.alone else 0),
        mock.patch.object(list_builder, "ALONE_THREADS", at_least(builder.fewest_threads, list_builder.ALONE_THREADS)),
        mock.patch.object(
            list_builder, "CLUSTER_THREADS", at_least(builder.fewest_threads, list_builder.CLUSTER_THREADS)
        ),
        mock.patch.object(list_builder, "CLUSTER_CTAS", builder.ctas),
    ):
        yield


def load(variant: Variant, ctas: int, carveout: bool) -> Any:
    """A kernel whose longer lists are built by so many CTAs."""
    rendered = build.render

    def render(*given: Any) -> Source:
        source = rendered(*given)
        old, new = (f"constexpr int kClusterCtas = {n};" for n in (list_builder.CLUSTER_CTAS, ctas))
        assert sum(text.count(old) for _, text in source.headers) == 1
        return replace(source, headers=tuple((path, text.replace(old, new)) for path, text in source.headers))

    with mock.patch.object(build, "render", render):
        kernel = cuda.load(build.build_one(variant), torch.device("cuda", torch.cuda.current_device()))
    assert isinstance(kernel, (CudaForwardKernel, CudaBackwardKernel))
    attributes = driver.bindings().CUfunction_attribute
    cluster = kernel._builder._cluster
    driver.call("cuFuncSetAttribute", cluster, attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
    for function in (kernel._builder._alone, cluster) if carveout else ():
        driver.call("cuFuncSetAttribute", function, attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100)
    return kernel


def cases(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[torch.Tensor], Case]]]:
    """Each kind of list, and what makes a case of it for given lengths."""
    for name, text in LISTS.items():
        variant = Variant.parse("sm_90a/" + text.format("_causal" if options.causal else ""))
        kernels = {ctas: load(variant, ctas, options.carveout) for ctas in {one.ctas for one in BUILDERS.values()}}
        for in_order in (False, True) if name == "backward" else (False,):

            def case(lengths: torch.Tensor, kernels: dict[int, Any] = kernels, in_order: bool = in_order) -> Case:
                return Case(kernels, lengths, options.causal, in_order)

            yield f"{name}, in order" if in_order else name, case


def main() -> None:
    """Print a line a list and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=16384, help="sequences of the largest batch")
    parser.add_argument("--mean", type=int, default=64, help="tokens a sequence")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--carveout", action="store_true")
    options = parser.parse_args()
    for name, make in cases(options):
        batch = 64
        while batch <= options.most:
            lengths = torch.randint(0, 2 * options.mean + 1, (batch,), generator=torch.Generator().manual_seed(batch))
            case = make(lengths)
            times = {}
            for builder, how in BUILDERS.items():
                if how.alone and batch > list_builder.MOST_SEQUENCES_ALONE:
                    continue
                with built_by(case, how):
                    times[builder] = f"{builder_time(case):6.2f} us"
                    check_replays(case)
            assert case.built is not None
            few = case.built.max_items - case.extra_items <= list_builder.MOST_ALONE and "one CTA" in times
            times["one CTA" if few else "8 CTAs"] += " *"
            columns = "  ".join(f"{builder} {times.get(builder, '-'):11}" for builder in BUILDERS)
            print(f"{name:20} B {batch:6}  {columns}  lists right", flush=True)
            batch *= 4


if __name__ == "__main__":
    main()
