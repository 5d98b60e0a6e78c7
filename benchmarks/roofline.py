"""How near a decode benchmark comes to what its hardware allows: floors of what the benchmark itself measured.

``raymoe.planning.bounds`` plans a floor before anything runs. Here both of its sides come from the same run: the path
that never waits for an expert, and the bytes that crossed the links.
"""

import math

from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.types import Routing

MEMORY_FLOOR = "floor: what a pass reads, at memory's rate"


def floor_s(
    *,
    resident_s: float,
    moved_bytes: float = 0.0,
    link_bytes_per_s: float = math.inf,
    tokens_per_pass: float = 1.0,
) -> float:
    """Seconds per token that nothing on this hardware goes below; over the measured ones it is ``roofline_fraction``.

    A fraction above 1 can't happen where the floor is right: a policy computes all that the resident path computes,
    and no byte crosses a link sooner than the link's rate lets it. So it means that the floor is wrong, beyond the few
    percent by which answers of one kind differ: a resident path slowed by what the policy escaped (hence the fastest
    of the run), bytes of other steps than those timed, weights that stayed in the processor's caches where the floor
    is memory's, or a link faster than its rate. The resident path's own fraction, which is no more than 1, says how
    much its answers differed.

    Args:
        resident_s: of a pass of one position with every expert at hand: the fastest measured in the same run, since
            other work on the machine only makes it slower. Drafts make a pass longer, never shorter.
        moved_bytes: that had to cross the links for a pass.
        link_bytes_per_s: of all links together.
        tokens_per_pass: 1 without drafts.
    """
    return max(resident_s, moved_bytes / link_bytes_per_s) / tokens_per_pass


def needed_bytes(routing: Routing, expert_bytes: int) -> int:
    """Bytes that had to cross links for these steps.

    With a cache what was loaded; without one what was asked for. The lesser of the two is right for both: a load that
    was foretold wrongly need not have been, and what a cache held was not loaded.
    """
    return min(routing.bytes_loaded, (routing.hits + routing.misses) * expert_bytes)


def active_bytes(checkpoint: Checkpoint, experts: float | None = None) -> int:
    """Weights that a pass reads: the trunk without its embedding table, and so many experts in each layer.

    Args:
        experts: distinct ones; None: top-k of each layer, as one token needs.
    """
    routed = sum(
        (layer.top_k if experts is None else experts) * layer.expert_bytes(checkpoint.dtype)
        for layer in checkpoint.layers
    )
    tied = checkpoint.config.get_text_config().tie_word_embeddings
    table = sum(checkpoint.info(name).nbytes for name in checkpoint.trunk_tensors if "embed_tokens" in name)
    stored = checkpoint.info(checkpoint.trunk_tensors[0]).dtype.itemsize
    table = table // stored * checkpoint.dtype.itemsize
    return round(routed) + checkpoint.trunk_bytes - (0 if tied else table)
