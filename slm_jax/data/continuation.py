"""Speech that is cut: the first part is heard, and what follows is to be written."""

from __future__ import annotations

import functools

import numpy as np

from slm_jax.data import parts
from slm_jax.data.columnwise import Columns, check_fields, over_columns, texts, with_reason
from slm_jax.data.host_tensorflow import Dataset
from slm_jax.data.references import SAMPLE_RATE
from slm_jax.errors import BadExample


def cut_speech(dataset: Dataset, *, cut: str, words: str = "", text: str = "text") -> Dataset:
    """Leaves the first part of the speech of each example.

    Args:
      dataset: references with string fields.
      cut: field with the length of the first part in seconds.
      words: field with how many words of `text` are said in the first part; with it the fields
        `text_before` and `continuation` hold those words and the ones that follow.
      text: field with the transcript of the whole.

    Returns:
      Examples whose `part` and `samples` are those of the first part. One whose cut is not within its
      speech, or not between two words, has the reason `bad_cut`.

    Raises:
      UserError: there is no such field.
    """
    check_fields(dataset, [cut, *([words, text] if words else [])], "the cut of the speech")
    step = functools.partial(cut_speech_on_columns, cut=cut, words=words, text=text)
    return over_columns(
        dataset, step, strings=["part", "reject", *(["text_before", "continuation"] if words else [])]
    )


def cut_speech_on_columns(columns: Columns, *, cut: str, words: str = "", text: str = "text") -> Columns:
    """`cut_speech` on columns."""
    seconds = np.array([_number(value) for value in texts(columns, cut)])
    samples = np.asarray(columns["samples"], np.int64)
    whole = np.rint(np.nan_to_num(seconds, posinf=0.0) * SAMPLE_RATE)
    is_within = np.isfinite(seconds) & (whole >= 1) & (whole < samples)
    kept = np.where(is_within, whole, samples).astype(np.int32)
    first = [
        _first(part, count / SAMPLE_RATE) if cuts else part
        for part, count, cuts in zip(texts(columns, "part"), kept.tolist(), is_within, strict=True)
    ]
    made: Columns = {"part": np.array(first, object), "samples": kept}
    holds = ~is_within
    if words:
        before, after = _halves(texts(columns, text), texts(columns, words))
        made |= {"text_before": before, "continuation": after}
        holds |= (before == "") | (after == "")
    return columns | made | {"reject": with_reason(columns, holds, "bad_cut")}


def _first(part: str, length: float) -> str:
    """Returns the part that is the first seconds of a part."""
    try:
        start = parts.parse(part).start
    except BadExample:
        return part  # The loader counts it.
    others = [item for item in part.split("&") if item and not item.startswith("t=")]
    return "&".join([*others, parts.seconds(start, start + length)])


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return float("nan")


def _halves(whole: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first words of each text and the others; both empty where the count is no whole number."""
    halves: list[tuple[str, str]] = []
    for text, count in zip(whole, counts, strict=True):
        words = text.split()
        number = int(count) if count.isdecimal() else 0
        halves.append((" ".join(words[:number]), " ".join(words[number:])) if number else ("", ""))
    before, after = np.array(halves, object).reshape(-1, 2).T
    return before, after
