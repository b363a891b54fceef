"""Devices as plain data: what the vendor promises, and the share of it that kernels reach.

Peaks are dense (no 2:4 sparsity), of one device, with 32-bit accumulation. A data sheet's "GB" of
memory is 2**30 bytes, as the drivers count it. Idle power is our choice throughout: a tenth of the
peak (data sheets do not name it).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kvarn.core.errors import ConfigError, nearest
from kvarn.cost.link import LINKS, Link

GIB = 1 << 30


@dataclass(slots=True, frozen=True)
class Device:
    """One accelerator, or a CPU with its memory.

    `mfu`, `attention_mfu` and `mbu` are shares of the peaks that good kernels reach: a matrix
    product at 0.72 was measured on an H100 (docs/results.md); 0.85 of the bandwidth lies between
    AIConfigurator's 0.8 and the ceiling of reading measured there. Other devices take the same
    shares (our choice).
    """

    name: str
    flops: Mapping[str, float]  #: peak by format: fp32, bf16, fp16, fp8, int8 [operations/s]
    bandwidth: float  #: of its memory [bytes/s]
    memory: float  #: [bytes]
    peak_watts: float
    host: Link  #: to the host's memory
    peer: Link  #: to a device of the same instance
    source: str  #: of the peaks, the memory and the power
    mfu: float = 0.72  #: of large matrix products
    attention_mfu: float = 0.60  #: of causal prefill attention
    mbu: float = 0.85  #: of reading weights and KV
    #: what a kernel takes besides its work, in a replayed graph: AIConfigurator's constant [s]
    launch: float = 3e-6
    idle_share: float = 0.1  #: of the peak power (our choice)

    @property
    def idle_watts(self) -> float:
        """Power while nothing runs [W]."""
        return self.idle_share * self.peak_watts


def _tensor(bf16: float, fp32: float, *, int8: float, fp8: float = 0.0) -> dict[str, float]:
    """Peaks in units of 10**12; fp16 goes at the rate of bf16."""
    peaks = {"fp32": fp32, "bf16": bf16, "fp16": bf16, "int8": int8}
    return {form: rate * 1e12 for form, rate in (peaks | ({"fp8": fp8} if fp8 else {})).items()}


DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device(
            "h100", _tensor(989, 67, int8=1978, fp8=1978), 3.35e12, 80 * GIB, 700,
            LINKS["pcie5"], LINKS["nvlink4"],
            "NVIDIA H100 data sheet, SXM; AIConfigurator h100_sxm.yaml",
        ),
        Device(
            "h200", _tensor(989, 67, int8=1978, fp8=1978), 4.8e12, 141 * GIB, 700,
            LINKS["pcie5"], LINKS["nvlink4"],
            "NVIDIA H200 data sheet, SXM; AIConfigurator h200_sxm.yaml",
        ),
        Device(
            "a100-80g", _tensor(312, 19.5, int8=624), 2.039e12, 80 * GIB, 400,
            LINKS["pcie4"], LINKS["nvlink3"], "NVIDIA A100 data sheet, 80GB SXM",
        ),
        Device(
            "a100-40g", _tensor(312, 19.5, int8=624), 1.555e12, 40 * GIB, 400,
            LINKS["pcie4"], LINKS["nvlink3"], "NVIDIA A100 data sheet, 40GB SXM",
        ),
        Device(
            "b200", _tensor(2250, 75, int8=4500, fp8=4500), 8e12, 180 * GIB, 1000,
            LINKS["pcie5"], LINKS["nvlink5"], "NVIDIA HGX B200 data sheet, an eighth of the board",
        ),
        Device(
            "l40s", _tensor(362, 91.6, int8=733, fp8=733), 864e9, 48 * GIB, 350,
            LINKS["pcie4"], LINKS["pcie4"], "NVIDIA L40S data sheet; no NVLink",
        ),
        Device(
            "l4", _tensor(121, 30.3, int8=242, fp8=242), 300e9, 24 * GIB, 72,
            LINKS["pcie4"], LINKS["pcie4"], "NVIDIA L4 data sheet, halved: it counts sparsity",
        ),
        Device(
            "t4", {"fp32": 8.1e12, "fp16": 65e12, "int8": 130e12}, 320e9, 16 * GIB, 70,
            LINKS["pcie3"], LINKS["pcie3"], "NVIDIA T4 data sheet; no bf16",
        ),
        Device(
            "a10g", _tensor(70, 31.5, int8=140), 600e9, 24 * GIB, 300,
            LINKS["pcie4"], LINKS["pcie4"], "NVIDIA A10G data sheet (AWS G5), without sparsity",
        ),
        Device(
            "rtx4090", _tensor(165.2, 82.6, int8=660.6, fp8=330.3), 1.008e12, 24 * GIB, 450,
            LINKS["pcie4"], LINKS["pcie4"], "NVIDIA Ada GPU architecture white paper, appendix A",
        ),
        Device(
            "rtxpro6000", _tensor(503.8, 126, int8=1007.6, fp8=1007.6), 1.792e12, 96 * GIB, 600,
            LINKS["pcie5"], LINKS["pcie5"],
            "NVIDIA RTX Blackwell PRO architecture white paper, workstation edition",
        ),
        # Two Zen 4 cores at 3.7 GHz: 32 fp32, 64 bf16 (AVX512-BF16), 128 int8 (VNNI) operations a
        # cycle each, and one channel of DDR5-4800; power is their part of a 96-core EPYC 9654
        # (AMD: 360 W). Our choice of machine: `kvarn bench offline --ceiling` measures yours.
        Device(
            "cpu", {"fp32": 237e9, "bf16": 474e9, "fp16": 237e9, "int8": 947e9}, 38.4e9, 16 * GIB,
            7.5, LINKS["shm"], LINKS["shm"],
            "AMD EPYC 9004 data sheet and Zen 4 optimisation guide, two cores' part",
            mfu=0.7, attention_mfu=0.35, mbu=0.8, launch=5e-6, idle_share=0.3,
        ),
    )
}  # fmt: skip


def find_device(name: str) -> Device:
    """The device of that name, whatever its case; an unknown one is an error with the nearest."""
    key = name.lower().replace("_", "-")
    if key not in DEVICES:
        raise ConfigError(f"unknown device {name!r}{nearest(key, DEVICES)}")
    return DEVICES[key]
