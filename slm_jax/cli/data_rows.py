"""`slm data rows`: names the examples of the rows that a host would read, on a mesh that is not here."""

import argparse
import contextlib
import json
import math

from slm_jax.cli.data_plan import add_plan_arguments, planned
from slm_jax.errors import UserError, check_whole, nearest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add_plan_arguments(parser)
    parser.add_argument(
        "--mesh", metavar="AXES", default="data=1",
        help="sizes of the mesh, such as data=4,fsdp=2,tensor=1; axes that are left out have size 1",
    )  # fmt: skip
    parser.add_argument(
        "--hosts", type=int, default=1, metavar="N", help="hosts that share the devices evenly"
    )
    parser.add_argument("--host", type=int, default=0, metavar="H", help="which of them, from 0")
    parser.add_argument("--start", type=int, default=0, metavar="STEP", help="first step")
    parser.add_argument("--count", type=int, default=1, metavar="K", help="steps")
    parser.add_argument("--json", action="store_true", help="one object: {step: {row of the plan: [ids]}}")


def main(args: argparse.Namespace) -> int:
    """Runs the command: the rows of each step on standard output."""
    sizes = mesh_sizes(args.mesh)
    devices = math.prod(sizes.values())
    check_whole("--hosts", args.hosts)
    check_whole("--host", args.host, 0)
    check_whole("--start", args.start, 0)
    check_whole("--count", args.count)
    if devices % args.hosts:
        raise UserError(
            f"--hosts is {args.hosts}, which does not divide the {devices} devices of {args.mesh}"
        )
    if args.host >= args.hosts:
        raise UserError(f"--host is {args.host}, expected less than the {args.hosts} of --hosts")
    # The same code as in a run, on devices that stand for those of the mesh.
    import jax

    jax.config.update("jax_platforms", "cpu")
    if devices > len(_cpu_devices(devices)):
        raise UserError(f"--mesh {args.mesh} has {devices} devices, which cannot be imitated here")
    wired = planned(args)

    from slm_jax.data.placement import rows_of_devices
    from slm_jax.partitioning.mesh import make_mesh
    from slm_jax.partitioning.sharding import batch_sharding

    plan, rows = wired.plan(), wired.run.data.batch_size
    slices = sizes.pop("slice")
    mesh = make_mesh(**sizes, slices=slices, devices=jax.devices()[:devices])
    each = devices // args.hosts
    own = set(jax.devices()[args.host * each : (args.host + 1) * each])
    local = rows_of_devices(batch_sharding(mesh, wired.run.mesh.rules), rows, own)
    steps: dict[str, dict[str, list[str]]] = {}
    for step in range(args.start, args.start + args.count):
        found = plan.rows(step * rows, rows, local)
        steps[str(step)] = {
            str(step * rows + row): [f"{p.reference.task}/{p.reference.id}" for p in found[row]]
            for row in local.tolist()
            if row < len(found)
        }
    if args.json:
        print(json.dumps(steps, ensure_ascii=False))
        return 0
    for step, content in steps.items():
        for row, ids in content.items():
            print(f"step {step} row {row}: {' '.join(ids)}")
    return 0


def mesh_sizes(text: str) -> dict[str, int]:
    """Returns the sizes that `data=4,fsdp=2` means; raises UserError where it means nothing."""
    from slm_jax.partitioning.mesh import MESH_AXES

    sizes: dict[str, int] = dict.fromkeys(MESH_AXES, 1)
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in MESH_AXES:
            raise UserError(f"--mesh {text}: there is no axis {name!r}{nearest(name, MESH_AXES)}")
        if not size.isdecimal() or int(size) < 1:
            raise UserError(f"--mesh {text}: {name} is {size!r}, expected a whole number of at least 1")
        sizes[name] = int(size)
    return sizes


def _cpu_devices(count: int) -> list:
    import jax

    # JAX may have its devices already; they may be enough.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    return jax.devices()
