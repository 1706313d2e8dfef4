"""What a source or a task holds, from its index alone: hours, languages, lengths, texts, rejects."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from slm_jax.data.histograms import Spread, spread
from slm_jax.data.index_table import IndexTable
from slm_jax.data.prepare import read_rejects
from slm_jax.data.references import SAMPLE_RATE
from slm_jax.data.sources import Columns, ReferenceSource, ShardSource

_IDS = 100
_NO_TEXT = ("id", "audio", "part", "language", "samples")


@dataclass
class Description:
    """What a split holds.

    Attributes:
      name: of the task or source.
      split: of it.
      examples: how many can be used.
      hours: of their speech.
      languages: code -> (examples, hours), the most frequent first; the empty code where none is known.
      lengths: what (`speech`, `inputs`, `text`, ...) -> how its lengths are spread.
      characters: text field -> character -> how often it stands there, the most frequent first.
      rejected: reason -> how many references cannot be used.
      rejected_ids: reason -> ids of the first of them.
    """

    name: str
    split: str
    examples: int = 0
    hours: float = 0.0
    languages: dict[str, tuple[int, float]] = field(default_factory=dict)
    lengths: dict[str, Spread] = field(default_factory=dict)
    characters: dict[str, dict[str, int]] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    rejected_ids: dict[str, list[str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as JSON."""
        return {
            **vars(self),
            "languages": {
                code: {"examples": examples, "hours": hours}
                for code, (examples, hours) in self.languages.items()
            },
            "lengths": {name: found._asdict() for name, found in self.lengths.items()},
        }

    def lines(self, examples_of_rejects: int = 5) -> Iterator[str]:
        """Yields all of it as text.

        Args:
          examples_of_rejects: ids that are named for each reason.
        """
        yield f"{self.name}, split {self.split}: {self.examples:,} examples, {self.hours:,.2f} h of speech"
        if self.languages:
            wide = max(8, *(len(code) for code in self.languages))
            yield f"\n{'language':<{wide}} {'examples':>12} {'hours':>12}"
            for code, (examples, hours) in self.languages.items():
                yield f"{code or '(none)':<{wide}} {examples:>12,} {hours:>12,.2f}"
        for name, found in self.lengths.items():
            yield (
                f"\n{name}, {found.unit}: shortest {_brief(found.shortest)}, median {_brief(found.median)}, "
                f"95 % up to {_brief(found.p95)}, longest {_brief(found.longest)}, in all {found.total:,.0f}"
            )
            yield from (f"  {line}" for line in found.lines())
        for name, counts in self.characters.items():
            shown = "".join(character for character in counts if character.isprintable())
            more = " ..." if len(shown) > 100 else ""
            yield f"\n{name}: {len(counts)} characters, by frequency: {shown[:100]}{more}"
        for reason, count in self.rejected.items():
            ids = self.rejected_ids.get(reason, [])[:examples_of_rejects]
            named = f": {', '.join(ids)}{', ...' if count > len(ids) else ''}" if ids else ""
            yield f"\nrejected, {reason} {count:,}{named}"


def describe_table(table: IndexTable) -> Description:
    """Returns what the index table of a task holds."""
    languages = _Languages()
    start = 0
    for stretch in table.languages:
        languages.add(stretch, table.samples[start : start + len(stretch)])
        start += len(stretch)
    lengths = {
        "speech": _seconds(np.asarray(table.samples)),
        "inputs": spread(np.asarray(table.input_lengths), "tokens"),
        "targets": spread(np.asarray(table.target_lengths), "tokens"),
    }
    return Description(
        name=table.task,
        split=table.split,
        examples=len(table),
        hours=_hours(int(table.samples.sum(dtype=np.int64))),
        languages=languages.found(),
        lengths={name: found for name, found in lengths.items() if found},
        rejected=dict(sorted(table.report.rejected.items())),
        rejected_ids=table.report.examples,
    )


def describe_source(source: ReferenceSource, split: str) -> Description:
    """Returns what a split of a source holds.

    Of what is wrong with audio, a source knows lengths that are no positive number, and speech shards know
    what was left out when they were prepared.

    Raises:
      UserError: as the source's `chunks`, or the list of what shards left out is damaged.
    """
    languages, samples = _Languages(), [np.zeros(0, np.int32)]
    texts: dict[str, list[np.ndarray]] = defaultdict(list)
    characters: dict[str, Counter[str]] = defaultdict(Counter)
    described = Description(", ".join(source.list_shards(split)[:1]), split)
    for columns in source.chunks(split):
        columns = _usable(columns, described)
        described.examples += len(columns["id"])
        samples.append(columns["samples"])
        languages.add(columns.get("language", np.full(len(columns["id"]), "", object)), columns["samples"])
        for name in columns.keys() - set(_NO_TEXT):
            # An example without such a text has none of its length.
            found = [text for text in columns[name] if text]
            texts[name].append(np.array([len(text) for text in found], np.int32))
            characters[name].update("".join(found))
    every = np.concatenate(samples)
    described.hours = _hours(int(every.sum(dtype=np.int64)))
    described.languages = languages.found()
    lengths = {"speech": _seconds(every)} | {
        name: spread(np.concatenate(texts[name]), "characters") for name in sorted(texts)
    }
    described.lengths = {name: found for name, found in lengths.items() if found}
    described.characters = {
        name: dict(characters[name].most_common()) for name in sorted(characters) if characters[name]
    }
    if isinstance(source, ShardSource):
        _add_rejects(source, split, described)
    described.rejected = dict(sorted(described.rejected.items()))
    return described


class _Languages:
    """Examples and samples of each language."""

    def __init__(self):
        self._examples: Counter[str] = Counter()
        self._samples: Counter[str] = Counter()

    def add(self, languages: Any, samples: np.ndarray) -> None:
        coded = pa.array(languages, pa.large_string()).dictionary_encode()
        names, places = coded.dictionary.to_pylist(), coded.indices.to_numpy()
        examples = np.bincount(places, minlength=len(names))
        sums = np.bincount(places, np.asarray(samples, np.float64), minlength=len(names))
        for name, count, total in zip(names, examples.tolist(), sums.tolist(), strict=True):
            self._examples[name] += count
            self._samples[name] += int(total)

    def found(self) -> dict[str, tuple[int, float]]:
        by_count = sorted(self._examples.items(), key=lambda item: (-item[1], item[0]))
        return {name: (count, _hours(self._samples[name])) for name, count in by_count}


def _usable(columns: Columns, described: Description) -> Columns:
    """Returns those references of a chunk that have no audio or a length; the others are rejected."""
    bad = (columns["samples"] <= 0) & np.array([bool(audio) for audio in columns["audio"]], bool)
    if not bad.any():
        return columns
    reason = "non_positive_duration"
    described.rejected[reason] = described.rejected.get(reason, 0) + int(bad.sum())
    ids = described.rejected_ids.setdefault(reason, [])
    ids += columns["id"][bad].tolist()[: _IDS - len(ids)]
    return {name: values[~bad] for name, values in columns.items()}


def _add_rejects(source: ShardSource, split: str, described: Description) -> None:
    described.rejected |= source.entry(split).rejected
    for found in read_rejects(source.audio_root(split)):
        ids = described.rejected_ids.setdefault(found["reason"], [])
        if found["split"] == split and len(ids) < _IDS:
            ids.append(found["id"])


def _seconds(samples: np.ndarray) -> Spread | None:
    return spread(samples[samples > 0] / SAMPLE_RATE, "seconds")


def _hours(samples: int) -> float:
    return samples / SAMPLE_RATE / 3600


def _brief(length: float) -> str:
    return f"{length:,.0f}" if length == int(length) else f"{length:,.2f}"
