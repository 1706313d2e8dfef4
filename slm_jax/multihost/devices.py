"""Which devices each process has, and whether all have the same."""

from collections import Counter
from typing import Any

import jax

from slm_jax.multihost.examination import Examination, Verdict, differing


def examine_devices(examination: Examination) -> bool:
    """Goes through the phase `devices`; returns whether all is well."""

    def look() -> dict[str, Any]:
        examination.at("JAX looks for devices")
        local = jax.local_devices()
        return {
            "platform": local[0].platform,
            "kinds": sorted(Counter(device.device_kind for device in local).items()),
            "local": len(local),
            "global": jax.device_count(),
            "processes": jax.process_count(),
        }

    return examination.examine("devices", look, lambda found: judge(examination, found)) is not None


def judge(examination: Examination, found: list[dict[str, Any]]) -> Verdict:
    """Compares the devices of all processes."""
    problems = []
    platforms = [one["platform"] for one in found]
    if others := {platform for platform in platforms if platform != "cpu"}:
        fallen = [index for index, platform in enumerate(platforms) if platform == "cpu"]
        if fallen:
            verb = "has" if len(fallen) == 1 else "have"
            problems.append(
                f"{examination.names(fallen)} {verb} nothing but CPUs where others have {'/'.join(others)}; "
                "expected the driver and JAX's plugin on every host"
            )
    kinds = [", ".join(f"{count} x {kind}" for kind, count in one["kinds"]) for one in found]
    if not problems and (different := differing("the devices of a process", kinds, examination.names)):
        problems.append(different)
    total = sum(one["local"] for one in found)
    for what, expected in (("global", total), ("processes", examination.processes.count)):
        wrong = [index for index, one in enumerate(found) if one[what] != expected]
        if wrong and not problems:
            things = "devices" if what == "global" else "processes"
            problems.append(
                f"JAX counts {found[wrong[0]][what]} {things} on {examination.names(wrong)}, expected "
                f"{expected}, the sum of all"
            )
    return Verdict(f"{total}, of each process {kinds[0]} ({platforms[0]})", problems)
