"""What accelerators can do at most, by the makers' own figures; for MFU, and to predict steps."""

from typing import NamedTuple


class DeviceKind(NamedTuple):
    """Limits of one device as JAX counts devices.

    Attributes:
      flops: dense bfloat16 products a second, in FLOP/s.
      hbm_bytes: of its memory.
      hbm_bandwidth: of that memory, in bytes/s.
      link_bandwidth: of one link to a neighbour in a torus, or to the switch that joins all of a host's
        devices; one way, in bytes/s.
      network_bandwidth: a device's share of its host's data-centre network, one way, in bytes/s; None where
        its maker does not say.
    """

    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float | None


# By `jax.Device.device_kind`. TPU figures are per chip, which is one device: of v4 and v5p in the "megacore"
# form, in which JAX joins the two cores of a chip. Cloud TPU's pages give a chip's interconnect both ways
# over all of its ports; half of it over the ports is one link, one way.
DEVICE_KINDS: dict[str, DeviceKind] = {
    # cloud.google.com/tpu/docs/v4: 275 TFLOP/s, 32 GiB at 1,200 GB/s, a 3D torus. Links of 50 GB/s one way:
    # arXiv 2304.01433, table 4.
    "TPU v4": DeviceKind(275e12, 32 * 2**30, 1200e9, 50e9, None),
    # cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB at 819 GB/s, interconnect 400 GB/s over 4 ports;
    # network of a pod of 256 chips 6.4 Tbit/s.
    "TPU v5 lite": DeviceKind(197e12, 16 * 2**30, 819e9, 50e9, 3.125e9),
    # cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GiB at 2,765 GB/s, interconnect 1,200 GB/s on a 3D torus;
    # network 50 Gbit/s a chip.
    "TPU v5": DeviceKind(459e12, 95 * 2**30, 2765e9, 100e9, 6.25e9),
    # cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB at 1,638 GB/s, interconnect 800 GB/s over 4 ports;
    # network of a host of 8 chips 4 x 200 Gbit/s.
    "TPU v6 lite": DeviceKind(918e12, 32 * 2**30, 1638e9, 100e9, 12.5e9),
    # NVIDIA A100 data sheet (SXM): 312 TFLOP/s, NVLink 600 GB/s both ways; DGX A100: 200 Gbit/s a GPU.
    "NVIDIA A100-SXM4-40GB": DeviceKind(312e12, 40e9, 1555e9, 300e9, 25e9),
    "NVIDIA A100-SXM4-80GB": DeviceKind(312e12, 80e9, 2039e9, 300e9, 25e9),
    # NVIDIA H100 data sheet (SXM): 1,979 TFLOP/s with sparsity, twice the dense rate; 3.35 TB/s; NVLink
    # 900 GB/s both ways. DGX H100 and H200: 400 Gbit/s a GPU.
    "NVIDIA H100 80GB HBM3": DeviceKind(989e12, 80e9, 3350e9, 450e9, 50e9),
    # NVIDIA H200 data sheet (SXM): the H100's rates, 141 GB at 4.8 TB/s.
    "NVIDIA H200": DeviceKind(989e12, 141e9, 4800e9, 450e9, 50e9),
    # NVIDIA DGX B200 data sheet, an eighth of it: 36 PFLOP/s with sparsity, 1,440 GB at 64 TB/s, NVLink
    # 14.4 TB/s both ways, 400 Gbit/s a GPU.
    "NVIDIA B200": DeviceKind(2250e12, 180e9, 8000e9, 900e9, 50e9),
    # NVIDIA L4 data sheet: 242 TFLOP/s with sparsity, 24 GB at 300 GB/s, PCIe 4.0 x16 64 GB/s both ways.
    "NVIDIA L4": DeviceKind(121e12, 24e9, 300e9, 32e9, None),
}
