"""`slm plan`: whether a run fits devices that are not there, and how fast it would be."""

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slm_jax.cli.main import add_gin_arguments, search_paths
from slm_jax.cli.plan_search import POLICIES, candidates_for, print_ranking, search
from slm_jax.errors import UserError

if TYPE_CHECKING:
    from slm_jax.cli.run import Run
    from slm_jax.partitioning.topology import Topology
    from slm_jax.training.planning import StepPlan

_DEFAULTS = "runs/plan.gin"
# What says where a run reads and writes; a plan does neither.
_PLACES = {
    "MODEL_DIR": "'runs/plan'",
    "MIXTURE_OR_TASK_NAME": "'none'",
    "SPEECH_ENCODER_CHECKPOINT": "'none'",
    "LLM_CHECKPOINT": "'none'",
    "CORPUS_DIR": "'none'",
    "TRAIN_STEPS": "1000",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add_gin_arguments(parser)
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="such as v5e:4x4, v4:4x4x4 or gpu:h100x8"
    )
    parser.add_argument("--slices", type=int, metavar="N", help="of that topology (default: the run's)")
    parser.add_argument(
        "--search",
        nargs="*",
        choices=POLICIES,
        metavar="POLICY",
        help="find the largest batch per remat policy and mesh, and rank them "
        f"(default: all of {', '.join(POLICIES)})",
    )
    parser.add_argument(
        "--search_tensor",
        nargs="+",
        type=int,
        default=[1, 2, 4, 8],
        metavar="N",
        help="sizes of the mesh axis `tensor` that --search tries (default: 1 2 4 8)",
    )
    parser.add_argument("--sharding", action="store_true", help="print the sharding of every variable too")
    parser.add_argument("--json", action="store_true", help="print one object")


def main(args: argparse.Namespace) -> int:
    """Runs the command; a plan that does not fit is an answer, and the exit status 0."""
    # Before JAX starts: nothing here runs on an accelerator.
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_platforms", "cpu")
    from slm_jax.cli import gin_config
    from slm_jax.cli.model_changes import with_plain_attention
    from slm_jax.partitioning.topology import find_topology

    run = _build(args)
    topology = find_topology(args.topology, _slices(run) if args.slices is None else args.slices)
    if topology.stand_in:
        _say(
            f"{topology.stand_in}: compiled for virtual CPU devices, which know nothing of the memory that "
            f"{topology.kind}'s layouts and fusions take, of its compiler's collectives, nor whether it fits"
        )
    assumed = []
    if kernel := _kernel_of_stand_ins(run, topology):
        assumed = [f"plain attention, which a CPU compiles, in place of '{kernel}': memory is an upper bound"]
        _say(f"planned with {assumed[0]}")
        run = with_plain_attention(run, kernel)
    if args.search is not None:
        candidates = candidates_for(topology, args.search or POLICIES, args.search_tensor)
        ranking = search(run, topology, candidates, planned, _say)
        print(json.dumps(ranking)) if args.json else print_ranking(ranking)
        return 0
    found = planned(run, topology, assumed)
    if args.json:
        print(json.dumps({**found, "config": gin_config.resolved_config()}))
    else:
        _print(run, found, topology, args.sharding)
    return 0


def _build(args: argparse.Namespace) -> "Run":
    from slm_jax.cli import gin_config
    from slm_jax.cli.run import Run

    files, paths = list(args.gin_file), search_paths(args)
    gin_config.parse(files, (), paths)
    if gin_config.bound("run.Run.objective") is None:
        files.append(_DEFAULTS)
    gin_config.parse(files, args.gin_bindings, paths)
    places = [f"{name}={_PLACES[name]}" for name in gin_config.missing_required() if name in _PLACES]
    gin_config.parse(files, [*places, *args.gin_bindings], paths)
    return gin_config.build(Run)


def _slices(run: "Run") -> int:
    if run.mesh.slices == -1:
        raise UserError(
            "MeshConfig.slices is -1, and --topology is that of one slice; expected their number by --slices"
        )
    return run.mesh.slices


def _kernel_of_stand_ins(run: "Run", topology: "Topology") -> str | None:
    """The attention kernel in the run that virtual CPU devices lack, of the hardware that they stand for."""
    from slm_jax.cli.model_changes import configs

    kernel = "cudnn" if topology.kind.startswith("NVIDIA") else "pallas"
    chosen = any(getattr(config, "attention_kernel", None) == kernel for config in configs(run))
    return kernel if topology.stand_in and chosen else None


def planned(run: "Run", topology: "Topology", assumed: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the plan of a run as the object that `--json` prints; `assumed` is so besides."""
    from slm_jax.cli.wiring import frozen_as_loaded
    from slm_jax.training.planning import ASSUMPTIONS, audio_hours, granted_bytes, plan_step

    batches = _batches(run)
    program = _program(run, topology, batches[-1])
    frozen = frozen_as_loaded(run, program.shapes.frozen)
    plans = [plan_step(program, frozen, batch, topology) for batch in batches]
    largest = plans[-1]
    by_part = run.objective.flops(batches[-1])
    found = _json(largest, topology)
    hours = audio_hours(batches[-1], run.objective.samples_per_position)
    seconds = found["predicted_step_seconds"]
    return {
        "topology": topology.name,
        "slices": topology.slices,
        "devices": len(topology.devices),
        "device_kind": topology.kind,
        "mesh": dict(program.mesh.shape),
        "batch": {name: [*shape.shape] for name, shape in batches[-1].items()},
        "microbatches": run.loop.microbatches,
        "remat": _remat(run),
        "parameters": _parameters(program.shapes.boxed, program),
        "flops_per_step": sum(by_part.values()),
        "flops_by_part": by_part,
        "hardware_flops_per_step": largest.hardware_flops,
        "usable_bytes": granted_bytes(topology),
        **found,
        "audio_hours_per_second": hours / seconds if seconds else None,
        "mfu": _mfu(sum(by_part.values()), seconds, topology),
        "smaller_batches": [
            {"batch": {name: [*shape.shape] for name, shape in batch.items()}, **_json(plan, topology)}
            for batch, plan in zip(batches[:-1], plans[:-1], strict=True)
        ],
        "versions": _versions(),
        # The compiler reads its flags here, those of a plan as those of a run.
        "libtpu_init_args": os.environ.get("LIBTPU_INIT_ARGS", ""),
        "assumptions": [*ASSUMPTIONS, *assumed],
        "unknown": topology.stand_in,
    }


def _json(plan: "StepPlan", topology: "Topology") -> dict[str, Any]:
    from slm_jax.partitioning.device_kinds import DEVICE_KINDS

    return {
        "bytes_per_device": plan.bytes and plan.bytes._asdict(),
        "bytes_needed": plan.needed,
        "hbm_bytes": int(DEVICE_KINDS[topology.kind].hbm_bytes),
        "fits": plan.fits,
        "collectives": [{**one._asdict(), "axes": [*one.axes]} for one in plan.collectives],
        "predicted_step_seconds": plan.seconds and plan.seconds.step,
        "seconds_by_cause": plan.seconds and plan.seconds._asdict(),
        "compile_seconds": round(plan.compile_seconds, 1),
    }


def _versions() -> dict[str, str | None]:
    import importlib.metadata
    import importlib.util

    known = {name: importlib.util.find_spec(name) for name in ("jax", "libtpu")}
    return {name: importlib.metadata.version(name) if spec else None for name, spec in known.items()}


def _mfu(flops: int, seconds: float | None, topology: "Topology") -> float | None:
    from slm_jax.partitioning.device_kinds import DEVICE_KINDS

    peak = DEVICE_KINDS[topology.kind].flops * len(topology.devices)
    return flops / seconds / peak if flops and seconds else None


def _batches(run: "Run") -> list[dict[str, Any]]:
    from slm_jax.cli.wiring import Wiring

    return Wiring(run).compiled_batches()


def _program(run: "Run", topology: "Topology", batch: dict[str, Any]) -> Any:
    from slm_jax.partitioning.mesh import make_mesh
    from slm_jax.partitioning.sharding import check_batch_rows
    from slm_jax.training.program import make_train_program

    sizes = {"data": run.mesh.data, "fsdp": run.mesh.fsdp, "tensor": run.mesh.tensor}
    mesh = make_mesh(**sizes, slices=topology.slices, devices=topology.devices)
    check_batch_rows(run.data.batch_size, mesh, run.mesh.rules)
    return make_train_program(
        run.objective,
        run.optimizer,
        batch,
        seed=run.loop.seed,
        microbatches=run.loop.microbatches,
        mesh=mesh,
        rules=run.mesh.rules,
        spikes=run.loop.spikes,
        apart=run.carries_optimizer,
        # Virtual CPU devices know none of them.
        compiler_options={} if topology.stand_in else run.loop.compiler_options,
    )


def _remat(run: "Run") -> dict[str, str]:
    config = getattr(run.objective.model, "config", None)
    parts = {name: getattr(config, name, None) for name in ("speech_encoder", "adapter", "llm")}
    return {name: getattr(part, "remat") for name, part in parts.items() if hasattr(part, "remat")}  # noqa: B009


def _parameters(boxed: Mapping[str, Any], program: Any) -> dict[str, Any]:
    import flax.linen as nn
    import jax

    found = {}
    trees = {"params": program.shapes.state.params, "frozen": program.shapes.frozen}
    for collection in boxed:
        leaves = jax.tree.leaves(nn.unbox(boxed[collection]))
        parts = {
            part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
            for part, tree in trees.get(collection, {}).items()
        }
        found[collection] = {"total": sum(math.prod(leaf.shape) for leaf in leaves), **parts}
    return found


# ---- the table


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _number(value: float | None) -> str:
    return f"{value:.3g}" if value else "-"


def _print(run: "Run", found: dict[str, Any], topology: "Topology", sharding: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from slm_jax.cli import gin_config
    from slm_jax.partitioning.sharding import plan_text

    console = Console(width=None if sys.stdout.isatty() else 120)
    print(gin_config.resolved_config())
    if sharding:
        program = _program(run, topology, _batches(run)[-1])
        print(plan_text(program.shapes.boxed, program.mesh, run.mesh.rules))
    table = Table(show_header=False)
    size, causes = found["bytes_per_device"], found["seconds_by_cause"]
    fits = {True: "yes", False: "no", None: "unknown"}[found["fits"]]
    rows = [
        ("devices", f"{found['devices']} x {found['device_kind']}, {found['slices']} slice(s)"),
        ("mesh", " ".join(f"{axis}={ways}" for axis, ways in found["mesh"].items())),
        ("batch", ", ".join(f"{name} {shape}" for name, shape in found["batch"].items())),
        ("remat", ", ".join(f"{part} {policy}" for part, policy in found["remat"].items())),
    ]
    for collection, parts in found["parameters"].items():
        rows.append((collection, ", ".join(f"{part} {count:,}" for part, count in parts.items())))
    parts = ", ".join(f"{part} {flops / 1e12:,.4g}" for part, flops in found["flops_by_part"].items())
    rows.append(("TFLOP a step", f"{found['flops_per_step'] / 1e12:,.4g} ({parts})"))
    if found["hardware_flops_per_step"]:
        rows.append(("with recomputation", f"{found['hardware_flops_per_step'] / 1e12:,.4g}"))
    if size:
        text = ", ".join(f"{name} {count / 1e9:.2f} GB" for name, count in size.items())
        rows.append(
            ("a device's memory", f"{text} of {(found['usable_bytes'] or found['hbm_bytes']) / 1e9:.2f}")
        )
    if found["bytes_needed"]:
        rows.append(
            (
                "a device's memory",
                f"needs {found['bytes_needed'] / 1e9:.2f} GB of {found['usable_bytes'] / 1e9:.2f}",
            )
        )
    for one in found["collectives"][:8]:
        over = "*".join(one["axes"])
        rows.append(
            (one["kind"], f"{one['count']:,} over {over} ({one['group']}), {one['bytes'] / 1e9:.3f} GB")
        )
    if causes:
        text = ", ".join(f"{cause} {seconds:.3g}" for cause, seconds in causes.items())
        rows.append(("predicted seconds a step", f"{_number(found['predicted_step_seconds'])} ({text})"))
        rows.append(("audio hours a second", _number(found["audio_hours_per_second"])))
        rows.append(("MFU as predicted", f"{found['mfu']:.1%}" if found["mfu"] else "-"))
    for smaller in found["smaller_batches"]:
        peak = smaller["bytes_per_device"] and f"peak {smaller['bytes_per_device']['peak'] / 1e9:.2f} GB, "
        step = _number(smaller["predicted_step_seconds"])
        rows.append((f"slots of {smaller['batch']['speech'][-1]} samples", f"{peak or ''}step {step} s"))
    rows.append(("fits", fits))
    for name, text in rows:
        table.add_row(name, text)
    console.print(table)
    for assumption in found["assumptions"]:
        console.print(f"assumed: {assumption}")
