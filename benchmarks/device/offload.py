"""accelerate's offload on the same machine: a module's weights come over the link when it is called, all experts'."""

import statistics
import time
from typing import Any

import torch
from accelerate import cpu_offload

from benchmarks.device.synthetic import DEVIATION, Shape

LAYERS = 6  # measured; time is linear in layers, and the rest of the model is small beside its experts
RUNS = 3


def tpot_s(shape: Shape, device: torch.device) -> float:
    """Seconds per token of all of ``shape``'s layers, from a model with ``LAYERS`` of them."""
    config = shape.config(layers=LAYERS)
    with torch.device("meta"):
        empty: Any = shape.model_class(config)
    model = empty.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    for parameter in model.parameters():
        parameter.copy_(torch.empty(parameter.shape, dtype=parameter.dtype, device=device).normal_(0.0, DEVIATION))
    cpu_offload(model, execution_device=device)
    ids = torch.tensor([[1]], device=device)
    taken = []
    with torch.inference_mode():
        for _ in range(RUNS):
            start = time.perf_counter()
            model(ids, use_cache=False)
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return statistics.median(taken) * shape.layers / LAYERS
