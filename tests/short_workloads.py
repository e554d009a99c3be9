"""Batches of short sequences for the GPU tests of the kernels that pack sequences into a tile."""

from __future__ import annotations

import random

from jagtile.generator.spec import KernelSpec
from jagtile.generator.workloads import Workload, random_workload

# Empty, of one token, around the 64 and 128 rows of a tile, and longer than one.
EDGES = (0, 1, 63, 64, 65, 0, 129, 300, 1, 127, 128, 577)


def short_workloads(spec: KernelSpec, rng: random.Random) -> list[Workload]:
    """Return batches of `spec`, none without a token: edge lengths, thousands of tiny sequences, hundreds of short
    ones, keys of other lengths than the queries, and three drawn ones."""
    kind = (spec.head_dim, spec.head_dim_v, spec.causal)
    one_token = tuple(rng.choices((0, 1, 2, 3, 4), k=3000))
    recsys = tuple(rng.randrange(257) for _ in range(200))
    workloads = [
        Workload("edges", EDGES, EDGES, 4, 2, *kind),
        Workload("edges, cross", EDGES, EDGES[::-1], 2, 2, *kind, causal_alignment="bottom_right"),
        Workload("one token", one_token, one_token, 8, 8, *kind),
        Workload("short", recsys, recsys, 4, 4, *kind),
        Workload("short, cross", recsys, recsys[::-1], 8, 1, *kind, causal_alignment="bottom_right"),
        *(
            random_workload(
                rng,
                head_dim=spec.head_dim,
                head_dim_v=spec.head_dim_v,
                is_causal=spec.causal,
                max_seqlen=300,
                max_batch=40,
            )
            for _ in range(3)
        ),
    ]
    return [w for w in workloads if w.total_q and w.total_k]
