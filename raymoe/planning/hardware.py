"""A small table of known hardware, from public data sheets; ``raymoe probe`` measures what is really there.

Data sheets state peaks. What programs reach is less: the factors below turn one into the other, and are the first
thing to doubt. Host memory is what such a box is commonly sold with, less what its system takes. No torch.
"""

from dataclasses import dataclass

GB = 10**9
TERA = 10**12

MEMORY_REACHED = 0.8  # of a data sheet's memory bandwidth, by kernels that read weights once
LINK_REACHED = 0.8  # of a PCIe link's raw rate, by large copies from pinned memory: about 25 of 31.5 GB/s on 4.0 x16
FLOPS_REACHED = 0.5  # of peak operations, by products of a prompt's size
HOST_LEFT = 0.8  # of a box's memory, for experts: as a worker's default


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What can be expected of a device, after the factors above.

    Attributes:
        title: its name for people.
        memory_bytes: what it computes from.
        host_bytes: for its shard of experts.
        link_bytes_per_s: None: it computes straight from host memory.
        flops: operations per second, of bfloat16 or float16 products (float32 on a CPU).
        overhead_s: software per layer of a model that it runs: 1.4 ms was measured on a core of 2.5 GHz of a server
            (docs/benchmarks.md); others by the single-thread speed of their class, which is a guess.
        source: where the figures are published.
    """

    title: str
    memory_bytes: int
    host_bytes: int
    link_bytes_per_s: float | None
    flops: float
    memory_bytes_per_s: float
    overhead_s: float
    source: str


def _card(title: str, memory_gb: int, pcie_gb_per_s: float, tera: float, gb_per_s: float, source: str) -> Hardware:
    """A graphics card in a desktop with 64 GB."""
    return Hardware(
        title=title,
        memory_bytes=memory_gb * GB,
        host_bytes=round(HOST_LEFT * 64 * GB),
        link_bytes_per_s=LINK_REACHED * pcie_gb_per_s * GB,
        flops=FLOPS_REACHED * tera * TERA,
        memory_bytes_per_s=MEMORY_REACHED * gb_per_s * GB,
        overhead_s=0.6e-3,
        source=source,
    )


def _board(title: str, memory_gb: int, tera: float, gb_per_s: float, overhead_s: float, source: str) -> Hardware:
    """A machine whose processor, or graphics on the same memory, computes from where the experts lie."""
    return Hardware(
        title=title,
        memory_bytes=round(HOST_LEFT * memory_gb * GB),
        host_bytes=round(HOST_LEFT * memory_gb * GB),
        link_bytes_per_s=None,
        flops=FLOPS_REACHED * tera * TERA,
        memory_bytes_per_s=MEMORY_REACHED * gb_per_s * GB,
        overhead_s=overhead_s,
        source=source,
    )


PCIE_4_X16 = 31.5  # GB/s in one direction, raw, after line coding; 3.0 has half of it, 5.0 twice

# Tensor TFLOPS are dense figures in float16 with float32 accumulation.
HARDWARE: dict[str, Hardware] = {
    "rtx-3060": _card(
        "GeForce RTX 3060 12 GB",
        12,
        PCIE_4_X16,
        25,
        360,
        "https://www.techpowerup.com/gpu-specs/geforce-rtx-3060.c3682",
    ),
    # NVIDIA, "Ampere GA102 GPU architecture" (whitepaper), table 2: 760 GB/s, 59.5 TFLOPS
    "rtx-3080": _card(
        "GeForce RTX 3080 10 GB",
        10,
        PCIE_4_X16,
        59.5,
        760,
        "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf",
    ),
    # the same, table 2: 936 GB/s, 71 TFLOPS
    "rtx-3090": _card(
        "GeForce RTX 3090 24 GB",
        24,
        PCIE_4_X16,
        71,
        936,
        "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf",
    ),
    # NVIDIA, "Ada GPU architecture" (whitepaper), appendix A: 1,008 GB/s, 165.2 TFLOPS
    "rtx-4090": _card(
        "GeForce RTX 4090 24 GB",
        24,
        PCIE_4_X16,
        165.2,
        1008,
        "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    ),
    # data sheet: 48 GB, 768 GB/s, 154.8 TFLOPS without sparsity
    "rtx-a6000": _card(
        "RTX A6000 48 GB",
        48,
        PCIE_4_X16,
        154.8,
        768,
        "https://www.nvidia.com/en-us/design-visualization/rtx-a6000/",
    ),
    # data sheet of the module: 8 GB at 68 GB/s; 40 TOPS sparse int8, a quarter of that as float16
    "jetson-orin-nano": _board(
        "Jetson Orin Nano 8 GB", 8, 10, 68, 2.5e-3, "https://developer.nvidia.com/embedded/jetson-modules"
    ),
    # data sheet of the module: 64 GB at 204.8 GB/s; its cores do 170 TOPS in sparse int8, a quarter of that as float16
    "jetson-agx-orin": _board(
        "Jetson AGX Orin 64 GB", 64, 42.5, 204.8, 2.0e-3, "https://developer.nvidia.com/embedded/jetson-modules"
    ),
    # four Gracemont cores with AVX2 at up to 3.4 GHz; one channel of DDR5-4800 is 38.4 GB/s
    "n100": _board(
        "Mini PC, Intel N100, 16 GB",
        16,
        0.2,
        38.4,
        2.0e-3,
        "https://www.intel.com/content/www/us/en/products/sku/231803/intel-processor-n100-6m-cache-up-to-3-40-ghz/"
        "specifications.html",
    ),
    # four Cortex-A76 at 2.4 GHz; 32 bits of LPDDR4X-4267 are 17 GB/s
    "raspberry-pi-5": _board(
        "Raspberry Pi 5, 8 GB", 8, 0.15, 17, 4.0e-3, "https://www.raspberrypi.com/products/raspberry-pi-5/"
    ),
    # eight Zen 4 cores with AVX-512; two channels of DDR5-5600 are 89.6 GB/s
    "ryzen-mini-pc": _board(
        "Mini PC, Ryzen 7 7840HS, 64 GB",
        64,
        1.9,
        89.6,
        0.7e-3,
        "https://www.amd.com/en/products/processors/laptop/ryzen/7000-series/amd-ryzen-7-7840hs.html",
    ),
}
