#!/usr/bin/env python3
"""Prints a JobSet that runs one command on all hosts of one or more TPU slices of a GKE cluster.

    python launch/gke_jobset.py --name mine --image europe-docker.pkg.dev/project/slm/slm_jax:1 \\
        --accelerator tpu-v5-lite-podslice --topology 4x4 \\
        -- slm train --gin_file mine.gin | kubectl apply -f -

The cluster needs JobSet's controller; one that XPK made has it. GKE tells every host its place among the
others. When a host fails, JobSet starts all of them again, `--max_restarts` times at most; status 2, a user's
mistake, ends the JobSet at once. `kubectl delete jobset NAME` has all hosts save.
Only Python's standard library is needed.
"""

import argparse
import json
import math
import re
import sys
from typing import Any

# The names that XPK gives, too.
REPLICATED_JOB, CONTAINER = "slice-job", "jax-tpu"
MISTAKE = 2

# With what a host runs, without secrets, is the head of its log; then the command itself is process 1, so
# that it gets Kubernetes' SIGTERM.
ENTRY = """echo "launch: $(hostname), restart ${RESTART_ATTEMPT:-0}, $(date -Is 2>/dev/null)"
env | grep -E '^(JAX|XLA|LIBTPU|TPU|MEGASCALE|JOB|SLM_|PYTHON|LD_|NPROC)' |
    sed -E 's/^([^=]*(TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH)[^=]*)=.*/\\1=(not written)/'
python3 -m pip --disable-pip-version-check freeze
exec "$@"
"""


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    print(json.dumps(jobset(args), indent=2))
    return 0


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--name", required=True, type=dns_label, help="of the JobSet")
    add("--namespace", default="default")
    add("--image", required=True, help="container image with slm_jax and its extras tpu and gcs")
    add(
        "--accelerator",
        required=True,
        help="label cloud.google.com/gke-tpu-accelerator, such as tpu-v6e-slice",
    )
    add(
        "--topology",
        required=True,
        type=topology,
        metavar="4x4",
        help="chips of a slice, as GKE's label has it",
    )
    add("--chips_per_host", type=int, help="4 by default, fewer where a slice has fewer")
    add("--slices", type=int, default=1, help="more than one: multislice (%(default)s)")
    add("--max_restarts", type=int, default=100, help="JobSet counts all restarts (%(default)s)")
    add("--save_limit", type=int, default=600, help="seconds to save before a host is killed (%(default)s)")
    add("--keep", type=int, default=7 * 24 * 3600, help="seconds that a finished JobSet stays (%(default)s)")
    add("--queue", help="Kueue's local queue; XPK's clusters have multislice-queue")
    add("--priority", help="name of a PriorityClass; XPK's clusters have very-low to very-high")
    add("--service_account", help="Kubernetes service account that may read and write the buckets")
    add("--spot", action="store_true", help="on spot nodes, which may be preempted")
    add("--env", action="append", default=[], type=variable, metavar="NAME=VALUE", help="may be repeated")
    add("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="what each host runs")
    args = parser.parse_args(argv)
    if args.command[:1] == ["--"]:
        del args.command[0]
    if not args.command:
        parser.error("a command is missing after --, such as: -- slm train --gin_file mine.gin")
    chips = math.prod(args.topology)
    args.chips_per_host = args.chips_per_host or min(4, chips)
    if args.chips_per_host < 1 or chips % args.chips_per_host:
        parser.error(f"--chips_per_host={args.chips_per_host} does not divide the {chips} chips of a slice")
    return args


def dns_label(text: str) -> str:
    # A host's name is NAME-slice-job-SLICE-HOST, of at most 63 letters.
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not made of at most 40 of a-z, 0-9 and -, a-z first")
    return text


def topology(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no topology such as 4x4 or 4x4x8")
    return [int(edge) for edge in text.split("x")]


def variable(text: str) -> dict[str, str]:
    name, sign, value = text.partition("=")
    if not name or not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return {"name": name, "value": value}


def jobset(args: argparse.Namespace) -> dict[str, Any]:
    labels = {"xpk.google.com/workload": args.name}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": args.name,
            "namespace": args.namespace,
            "labels": labels | ({"kueue.x-k8s.io/queue-name": args.queue} if args.queue else {}),
            # A slice is a node pool: each job of the set gets one to itself.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "ttlSecondsAfterFinished": args.keep,
            "failurePolicy": {
                "maxRestarts": args.max_restarts,
                # A job fails by its pod failure policy for a mistake alone; any other failure restarts all.
                "rules": [
                    {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
                ],
            },
            "replicatedJobs": [
                {"name": REPLICATED_JOB, "replicas": args.slices, "template": {"spec": job(args, labels)}}
            ],
        },
    }


def job(args: argparse.Namespace, labels: dict[str, str]) -> dict[str, Any]:
    hosts = math.prod(args.topology) // args.chips_per_host
    return {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        # One process alone cannot go on: a lost host is for the JobSet, which starts all of them.
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onPodConditions": [],
                    "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [MISTAKE]},
                }
            ]
        },
        "template": {"metadata": {"labels": labels}, "spec": pod(args)},
    }


def pod(args: argparse.Namespace) -> dict[str, Any]:
    selector = {
        "cloud.google.com/gke-tpu-accelerator": args.accelerator,
        "cloud.google.com/gke-tpu-topology": "x".join(str(edge) for edge in args.topology),
    }
    taints = ["google.com/tpu", *(["cloud.google.com/gke-spot"] if args.spot else [])]
    # JobSet says in an annotation which restart this is.
    restart = {
        "name": "RESTART_ATTEMPT",
        "valueFrom": {
            "fieldRef": {"fieldPath": "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']"}
        },
    }
    spec = {
        "restartPolicy": "Never",
        "nodeSelector": selector | ({"cloud.google.com/gke-spot": "true"} if args.spot else {}),
        "tolerations": [{"key": key, "operator": "Exists"} for key in taints],
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "terminationGracePeriodSeconds": args.save_limit,
        "containers": [
            {
                "name": CONTAINER,
                "image": args.image,
                # Kubernetes would take a $(NAME) for a variable of the container.
                "command": [
                    word.replace("$", "$$") for word in ("bash", "-c", ENTRY, "slm-host", *args.command)
                ],
                "env": [{"name": "PYTHONUNBUFFERED", "value": "1"}, restart, *args.env],
                "resources": {"limits": {"google.com/tpu": args.chips_per_host}},
                "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
            }
        ],
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }
    if args.priority:
        spec["priorityClassName"] = args.priority
    if args.service_account:
        spec["serviceAccountName"] = args.service_account
    return spec


if __name__ == "__main__":
    sys.exit(main())
