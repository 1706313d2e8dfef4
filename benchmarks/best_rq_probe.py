"""When does BEST-RQ help? A frozen-encoder probe over its steps, and training with few transcripts.

    python benchmarks/best_rq_probe.py --corpus runs/demo/corpus --work runs/best_rq

Pretrains the demo's encoder on speech alone, then trains (1) a linear CTC head on the frozen encoder of every
checkpoint, (2) the whole encoder with few transcripts, from nothing and from the last checkpoint. Writes
`results.json` and `probe.png` to the work folder; what is done is not done again.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of slm demo")
    parser.add_argument("--work", type=Path, required=True, help="all runs go here")
    parser.add_argument("--steps", type=int, default=4000, help="of BEST-RQ")
    parser.add_argument("--checkpoints", type=int, default=4, help="that are probed, evenly spaced")
    parser.add_argument("--probe_steps", type=int, default=600)
    parser.add_argument("--few", type=int, nargs="+", default=[360, 1440], help="transcripts to train with")
    parser.add_argument("--few_steps", type=int, default=1200)
    parser.add_argument("--score", type=Path, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--extract", type=int, nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.score:
        print(json.dumps([score(run, args.corpus) for run in args.score]))
    elif args.extract:
        extract(args.work / "best_rq", args.work / "encoders", args.extract)
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Runs everything, each training in a process of its own."""
    work, corpus = args.work.absolute(), args.corpus.absolute()
    results_file = work / "results.json"
    work.mkdir(parents=True, exist_ok=True)
    results = json.loads(results_file.read_text()) if results_file.is_file() else {}
    best_rq = work / "best_rq"
    period, rest = divmod(args.steps, args.checkpoints)
    if rest:
        sys.exit(f"--checkpoints {args.checkpoints} does not divide --steps {args.steps}")
    asked = {name: getattr(args, name) for name in ("steps", "probe_steps", "few_steps")}
    if results.setdefault("asked", asked) != asked:
        sys.exit(f"{results_file} was measured with {results['asked']}, not {asked}; name another --work")
    train(
        "recipes/demo_best_rq.gin", best_rq, corpus, args.steps,
        SPEECH_ENCODER_OUTPUT=work / "encoder", CHECKPOINT_PERIOD=period,
        **{"loop.LoopConfig.keep_last": args.checkpoints + 1},
    )  # fmt: skip

    encoders, probed = work / "encoders", range(0, args.steps + 1, period)
    if left := [step for step in probed if not (encoders / str(step)).exists()]:
        python("--corpus", corpus, "--work", work, "--extract", *left)
    runs: dict[str, Path] = {}

    def trained(name: str, source: Path, steps: int, **bindings: object) -> None:
        if name not in results:
            runs[name] = work / name.replace("/", "_")
            train("recipes/demo_encoder.gin", runs[name], source, steps, SAVE_FOUNDATIONS={}, **bindings)

    for step in probed:
        trained(
            f"probe/{step}", corpus, args.probe_steps,
            FOUNDATIONS={"speech_encoder": str(encoders / str(step))}, FREEZE_ENCODER=True,
            **{"run.Run.frozen_dtype": None, "spec_augment.SpecAugmentConfig.time_masks": 0,
               "spec_augment.SpecAugmentConfig.mel_masks": 0},
        )  # fmt: skip
    for count in args.few:
        few = subset(corpus, work / f"corpus_{count}", count)
        trained(f"few/{count}/nothing", few, args.few_steps)
        trained(
            f"few/{count}/best_rq", few, args.few_steps,
            FOUNDATIONS={"speech_encoder": str(encoders / str(args.steps))},
        )  # fmt: skip
    if runs:
        scores = python("--corpus", corpus, "--work", work, "--score", *runs.values()).splitlines()[-1]
        results |= zip(runs, json.loads(scores), strict=True)
        results_file.write_text(json.dumps(results, indent=1) + "\n")
    for name in sorted(results.keys() - {"asked"}):
        print(name, results[name])
    draw(results, args.few, work / "probe.png")


def train(recipe: str, run: Path, corpus: Path, steps: int, **bindings: object) -> None:
    """Runs `slm train` to its end, which is nothing where it has ended."""
    places = {"CORPUS_DIR": str(corpus), "MODEL_DIR": str(run)}
    places |= {"TRAIN_STEPS": steps, "WARMUP_STEPS": max(1, steps // 30)}
    values = {name: str(value) if isinstance(value, Path) else value for name, value in bindings.items()}
    flags = [f"--gin.{name}={value!r}" for name, value in {**places, **values}.items()]
    slm = Path(sys.executable).with_name("slm")
    if status := subprocess.run([slm, "train", "--gin_file", recipe, *flags], check=False).returncode:
        sys.exit(status)


def python(*words: object) -> str:
    command = [sys.executable, __file__, *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def extract(run: Path, encoders: Path, steps: list[int]) -> None:
    """Saves the encoders of checkpoints as foundation models; step 0 is before the first."""
    from slm_jax.checkpoints.foundation import save_foundation
    from slm_jax.cli.run import load_run
    from slm_jax.cli.wiring import Wiring, architecture, subtree

    wired = Wiring(load_run(run))
    part = wired.run.objective.parts["speech_encoder"]
    for step in steps:
        variables = wired.trained_variables(step) if step else wired.fresh_variables()
        params = subtree(variables["params"], part.path)
        save_foundation(encoders / str(step), params, kind=part.kind, config=architecture(part.config))


def score(run: Path, corpus: Path) -> dict[str, float]:
    """Returns the error rates of the likeliest path on dev, in percent."""
    import jax
    import sentencepiece

    from slm_jax.cli.run import load_run
    from slm_jax.cli.wiring import Wiring
    from slm_jax.data.audio_files import load_audio
    from slm_jax.demo.vocabulary import vocabularies
    from slm_jax.evaluation.metrics import cer, wer

    # Runs on a part of the corpus have its vocabularies too; one process registers the tasks of one corpus.
    wired = Wiring(load_run(run, [f"CORPUS_DIR={str(corpus)!r}"]))
    objective, rows, samples = wired.run.objective, 20, 71_680
    variables = wired.trained_variables()
    transcribe = jax.jit(lambda v, batch: objective.transcribe(v["params"], batch, v.get("frozen")))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocabularies(corpus).ctc))
    records = [json.loads(line) for line in (corpus / "dev.jsonl").read_text().splitlines()]
    said = []
    for start in range(0, len(records), rows):
        speech, segments = np.zeros((rows, 1, samples), np.int16), np.zeros((rows, 1, 1, 3), np.int32)
        for row, record in enumerate(records[start : start + rows]):
            sound = load_audio(str(corpus / record["audio"]), samples)
            speech[row, 0, : len(sound)] = sound
            segments[row, 0, 0] = (1, 0, len(sound))
        tokens = np.asarray(transcribe(variables, {"speech": speech, "speech_segments": segments}))
        said += [pieces.decode([int(token) for token in row if token]) for row in tokens]
    texts = [record["text"] for record in records]
    return wer(texts, said[: len(texts)]) | cer(texts, said[: len(texts)])


def subset(corpus: Path, folder: Path, count: int) -> Path:
    """A corpus with the first `count` utterances of train, and all else of the whole one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in corpus.iterdir():
        if path.name != "train.jsonl":
            (folder / path.name).symlink_to(path)
    lines = (corpus / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:count]))
    return folder


def draw(results: dict[str, dict[str, float]], few: list[int], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    probes = {int(name.split("/")[1]): found for name, found in results.items() if name.startswith("probe")}
    steps = sorted(probes)
    for metric in ("wer", "cer"):
        left.plot(steps, [probes[step][metric] for step in steps], "o-", label=metric.upper())
    left.set(xlabel="steps of BEST-RQ", title="linear CTC head on the frozen encoder, dev, %", ylim=(0, None))
    for number, start in enumerate(("nothing", "best_rq")):
        values = [results[f"few/{count}/{start}"]["wer"] for count in few]
        places = np.arange(len(few)) + 0.36 * number - 0.18
        bars = right.bar(places, values, 0.34, label=f"from {start.replace('best_rq', 'BEST-RQ')}")
        right.bar_label(bars, fmt="%.1f")
    right.set_xticks(range(len(few)), [f"{count} transcripts" for count in few])
    right.set(title="all of the encoder trained with CTC, dev WER, %")
    for axis in (left, right):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
