"""The quickstart with rows of several examples against the quickstart as it is: steps, speed and scores.

    python benchmarks/packed_quickstart.py --to runs/packed_quickstart --seeds 0 1 2

Both ways train on as many examples of the same corpus, on frames that are encoded once for all runs, and are
not scored while they train. Speeds are measured apart, on frames and with the encoder in the step, the ways
taking turns; `--seeds` without any measures them alone. Prints a table as Markdown.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

RECIPE = "recipes/quickstart.gin"
SLM = Path(sys.executable).with_name("slm")
# Packed rows hold about four examples, so four rows are about the sixteen examples of a step of the recipe's.
WAYS = {
    "one example a row": {"BATCH_SIZE": 16},
    "packed": {
        "BATCH_SIZE": 4,
        "TASK_FEATURE_LENGTHS": {"speech": 184_320, "inputs": 36, "targets": 60, "layout": 104},
        "run.DataConfig.pack": True,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="folder for all that is made")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--preset", default="adapter", help="size of the corpus")
    parser.add_argument("--examples", type=int, default=48_000, help="to train on; 3,000 steps of 16")
    parser.add_argument("--live_steps", type=int, default=250, help="for the speed with the encoder")
    parser.add_argument("--steps", type=int, default=600, help="for the speed on frames")
    parser.add_argument("--repetitions", type=int, default=3, help="of the measurements of speed")
    args = parser.parse_args()
    folder = args.to.absolute()
    corpus = {"CORPUS_DIR": str(folder / "demo/corpus")}
    slm("demo", "--to", corpus["CORPUS_DIR"], "--preset", args.preset)
    frames = str(folder / "frames")
    longest = {"TASK_FEATURE_LENGTHS": {"speech": 112_640, "inputs": 32, "targets": 32}}
    live = {"run.DataConfig.encode_once": False}
    slm("data", "encode", *recipe(folder, corpus | longest | live), "--to", frames)

    found: dict[str, dict] = {}
    for way, bindings in WAYS.items():
        report = slm("data", "mixture", *recipe(folder, corpus | bindings), "--json", "--rows", "0")
        stage = json.loads(report)["stages"][0]
        examples = stage["examples_per_row"] * bindings["BATCH_SIZE"]
        references = sum(task["references"] for task in stage["tasks"])
        found[way] = {
            "examples": examples, "epoch": references / examples, "steps": round(args.examples / examples),
            "useful": stage["useful"], "seconds": [], "speed": [], "live": [], "scores": [],
        }  # fmt: skip
    on_frames = {"run.DataConfig.frames": frames}
    for _ in range(args.repetitions):
        for way, bindings in WAYS.items():
            settings = corpus | bindings | live
            found[way]["live"] += speeds(folder, settings, args.live_steps)
            found[way]["speed"] += speeds(folder, settings | on_frames, args.steps)
    for seed in args.seeds:
        for way, bindings in WAYS.items():
            run = folder / f"{way.replace(' ', '_')}_{seed}"
            steps = found[way]["steps"]
            more = {
                "TRAIN_STEPS": steps,
                "WARMUP_STEPS": min(40, steps - 1),
                "SEED": seed,
                "EVAL_PERIOD": 10**6,
            }
            settings = bindings | live | on_frames | more
            slm(
                "quickstart",
                "--demo_dir",
                str(folder / "demo"),
                "--run_dir",
                str(run),
                "--preset",
                args.preset,
                *gin(settings),
            )
            summary = json.loads((run / "summary.json").read_text())
            found[way]["seconds"].append(summary["seconds"]["adapter"])
            found[way]["scores"].append(summary["tasks"])
            print(f"{way}, seed {seed}: {summary['seconds']['adapter']} s", file=sys.stderr, flush=True)
    print(json.dumps(found), file=sys.stderr)
    print(table(found))


def slm(*words: str) -> str:
    """Runs a command of slm's and returns what it printed; its progress is not shown."""
    done = subprocess.run([SLM, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return done.stdout


def speeds(folder: Path, bindings: dict, steps: int) -> list[float]:
    """Returns the hours of audio a second of each twelfth of the steps but that which compiles."""
    shutil.rmtree(folder / "none", ignore_errors=True)
    periods = {"LOG_PERIOD": max(1, steps // 12), "CHECKPOINT_PERIOD": steps, "WARMUP_STEPS": 1}
    more = {"TRAIN_STEPS": steps, "EVALUATION": None, **periods}
    command = [SLM, "train", *recipe(folder, bindings | more)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return [float(number) for number in re.findall(r"([0-9.e-]+) audio-h/s", done.stdout)][1:]


def gin(bindings: dict) -> list[str]:
    """Returns the flags that bind these names."""
    return [f"--gin.{name}={value!r}" for name, value in bindings.items()]


def recipe(folder: Path, bindings: dict) -> list[str]:
    """Returns the flags of the recipe with these bindings."""
    return ["--gin_file", RECIPE, *gin({"MODEL_DIR": str(folder / "none"), **bindings})]


def table(found: dict[str, dict]) -> str:
    """Returns what was found, as Markdown."""

    def spread(values: list[float]) -> str:
        deviation = 2 * statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.1f} ± {deviation:.1f}"

    def scores(way: str, task: str, metric: str) -> list[float]:
        return [summary[task][metric]["after"] for summary in found[way]["scores"]]

    rows = {
        "examples a step": lambda way: f"{found[way]['examples']:.1f}",
        "steps an epoch": lambda way: f"{found[way]['epoch']:.0f}",
        "steps": lambda way: f"{found[way]['steps']:,}",
        "hours of audio a second, on frames": lambda way: f"{statistics.median(found[way]['speed']):.3f}",
        "hours of audio a second, encoder in the step": lambda way: (
            f"{statistics.median(found[way]['live']):.3f}"
        ),
        **{
            f"useful {part}": lambda way, part=part: f"{100 * found[way]['useful'][part]:.1f} %"
            for part in ("speech", "encoder", "decoder")
        },
    }
    if found["packed"]["scores"]:
        rows |= {
            "seconds of training": lambda way: f"{statistics.mean(found[way]['seconds']):.0f}",
            "WER": lambda way: spread(scores(way, "demo_asr", "wer")),
            "en-de BLEU": lambda way: spread(scores(way, "demo_ast_de", "bleu")),
            "en-es BLEU": lambda way: spread(scores(way, "demo_ast_es", "bleu")),
            "slot questions": lambda way: spread(scores(way, "demo_slots", "exact_match")),
        }
    lines = ["| | " + " | ".join(found) + " |", "|---" * (1 + len(found)) + "|"]
    lines += [f"| {name} | " + " | ".join(map(of, found)) + " |" for name, of in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
