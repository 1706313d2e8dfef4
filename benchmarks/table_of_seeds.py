"""The quickstart's table over several seeds, as Markdown: means, and twice the deviation of what was trained.

    python benchmarks/table_of_seeds.py runs/quickstart runs/seed_1 runs/seed_2

Each folder is a run of `slm quickstart --run_dir FOLDER --gin.SEED=N`.
"""

import json
import sys
from pathlib import Path
from statistics import mean, stdev


def main(folders: list[str]) -> None:
    summaries = [json.loads((Path(folder) / "summary.json").read_text()) for folder in folders]
    print(f"| task | metric | before | after, mean of {len(folders)} seeds | ± | each | topline | cascade |")
    print("|---|---|---|---|---|---|---|---|")
    for task, metrics in summaries[0]["tasks"].items():
        for metric in metrics:
            columns = {
                # A summary has null for what was not finite.
                name: [float("nan") if value is None else value for value in values]
                for name in ("before", "after", "topline", "cascade")
                for values in [[summary["tasks"][task][metric][name] for summary in summaries]]
            }
            spread = 2 * stdev(columns["after"]) if len(folders) > 1 else 0.0
            each = ", ".join(f"{value:.1f}" for value in columns["after"])
            print(
                f"| {task} | {metric} | {mean(columns['before']):.1f} | {mean(columns['after']):.1f} | "
                f"{spread:.1f} | {each} | {mean(columns['topline']):.1f} | {mean(columns['cascade']):.1f} |"
            )
    print()
    for stage in summaries[0]["seconds"]:
        seconds = [summary["seconds"][stage] for summary in summaries]
        print(f"{stage}: {mean(seconds):.0f} s ({min(seconds):.0f} to {max(seconds):.0f})")


if __name__ == "__main__":
    main(sys.argv[1:])
