"""Make a worker for a configured device."""

import torch

from raymoe.checkpoint.architectures import experts_modules
from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.config import DeviceConfig, SchedulingConfig
from raymoe.errors import ConfigError
from raymoe.experts.host_memory import MemoryGuard
from raymoe.experts.link import EmulatedLink
from raymoe.experts.worker import ExpertWorker
from raymoe.kernels.native import load_native


def make_worker(
    checkpoint: Checkpoint, device: DeviceConfig, scheduling: SchedulingConfig | None = None
) -> ExpertWorker:
    """A worker without experts yet. Raises ConfigError where the device is not there."""
    place = torch_device(device.kind, device.name)
    link = device.link
    return ExpertWorker(
        name=device.name,
        layers=checkpoint.layers,
        modules=[module for _, module in experts_modules(checkpoint.skeleton)],
        read_expert=checkpoint.read_expert,
        dtype=checkpoint.dtype,
        device=place,
        slot_budget_bytes=device.slot_memory,
        link=EmulatedLink(link.bytes_per_s, link.latency_s, link.host_s) if link is not None else None,
        scheduling=scheduling,
        guard=None if checkpoint.maps_weights else memory_guard(checkpoint, device),
        kernels=load_native(device.threads or default_threads(device)) if place.type == "cpu" else None,
    )


def memory_guard(checkpoint: Checkpoint, device: DeviceConfig) -> MemoryGuard:
    """Looks after host memory. Mapped experts need none: their pages are the kernel's to take back."""
    return MemoryGuard(device.name, device.host_memory, [size.expert_bytes for size in checkpoint.sizes()])


def default_threads(device: DeviceConfig) -> int:
    """Threads of a worker's arithmetic: one for a process of its own, all cores inside the engine."""
    return 1 if device.transport == "zmq" else torch.get_num_threads()


def torch_device(kind: str, name: str) -> torch.device:
    """The torch device of a configured kind. Raises ConfigError where this machine lacks it."""
    place = torch.device(kind)
    if place.type == "cuda" and (not torch.cuda.is_available() or place.index >= torch.cuda.device_count()):
        raise ConfigError(
            f'"{name}" wants {kind}, but this machine has {torch.cuda.device_count()} CUDA devices that torch '
            f"{torch.__version__} can use; check the driver, or use kind cpu"
        )
    return place
