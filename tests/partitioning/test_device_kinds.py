"""The table of devices, against what the makers give for whole pods and boards."""

import pytest

from slm_jax.partitioning.device_kinds import DEVICE_KINDS

# cloud.google.com/tpu/docs: interconnect of a chip, both ways over all of its ports, and how many these are;
# FLOP/s of a pod with its chips.
CHIPS = {
    "TPU v5 lite": (400e9, 4, 50.63e15, 256),
    "TPU v5": (1200e9, 6, None, None),
    "TPU v6 lite": (800e9, 4, 234.9e15, 256),
    "TPU v4": (None, None, 1.1e18, 4096),
}


@pytest.mark.parametrize("kind", CHIPS)
def test_chips_add_up_to_the_makers_pods(kind):
    both_ways, ports, pod_flops, chips = CHIPS[kind]
    if both_ways:
        assert 2 * ports * DEVICE_KINDS[kind].link_bandwidth == pytest.approx(both_ways)
    if pod_flops:
        assert DEVICE_KINDS[kind].flops * chips == pytest.approx(pod_flops, rel=0.03)


def test_every_device_computes_more_than_it_reads_and_reads_more_than_it_sends():
    for kind in DEVICE_KINDS.values():
        assert kind.flops > kind.hbm_bandwidth > kind.link_bandwidth > (kind.network_bandwidth or 0)
        assert kind.hbm_bytes > 10e9
