"""Builds the demonstration corpus: spoken sentences as FLAC, JSONL manifests, and text for the T5.

corpus.json                    the parameters, so that the same command reuses what is there
{train,dev,test}.jsonl         id, audio (relative), duration, language, text, translations, question,
                               answer, slots; some of train with invented names
names_{dev,test}.jsonl         the same and `phrases`, `heard`: each sentence with an invented name that train
                               lacks, a list of names with this one among them, and the sentence as heard
text_{train,dev}.jsonl         as {train,dev}.jsonl without audio: every spoken sentence, and more
text_names_{train,dev}.jsonl   as names_*.jsonl without audio
audio/<set>/<id>.flac          int16, 16 kHz
"""

import dataclasses
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from slm_jax.demo import espeak, names, sentences
from slm_jax.errors import UserError, nearest

STAMP = "corpus.json"
# Raised whenever the same parameters give other files.
_FORMAT = 4
_REPORT_SECONDS = 2.0
_MOST_WARP_OCTAVES = 0.25
# One sentence of so many in train has an invented name.
_NAMED_EVERY = 7
# Names that phrase lists of spoken sentences are filled up with.
_OTHERS = 500
# Lines of text with a phrase list, for each sentence of text. A T5 that reads fewer learns their names by
# heart, and copies none that it has not read.
_LISTED_TEXT = 2

# Espeak's voice variants by split, so that dev and test are spoken by voices never heard in training.
# Robots, whispers and variants that clip are left out.
VOICES = {
    "train": (
        "m1", "m2", "m4", "m5", "m6", "m8", "f1", "f2", "f4", "adam", "Alex", "Alicia", "Andy", "Annie",
        "Denis", "Diogo", "Gene", "Hugo", "Michael", "anika", "aunty", "belinda", "benjamin", "boris",
        "caleb", "grandma", "grandpa", "ian", "john", "linda", "max", "norbert", "quincy", "rob", "shelby",
        "steph", "steph2", "travis", "zac",
    ),
    "dev": ("m7", "f5", "david", "marcelo"),
    "test": ("m3", "f3", "edward", "victor", "Mario", "steph3"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """Sizes of the corpus, in utterances or sentences.

    Attributes:
      train, dev, test: spoken utterances of each split.
      names: spoken utterances with invented names and phrase lists, of dev and of test.
      text: sentences of the text manifest for training; at least the spoken ones.
      seed: of sentences, voices and noise.
    """

    train: int = 7200
    dev: int = 200
    test: int = 300
    names: int = 100
    text: int = 24_000
    seed: int = 0

    def __post_init__(self):
        for field in ("train", "dev", "test", "names", "text"):
            if getattr(self, field) < 1:
                raise UserError(f"corpus: {field} is {getattr(self, field)}, expected at least 1")
        if self.text < self.train:
            raise UserError(f"corpus: text is {self.text}, expected at least the {self.train} of train")


PRESETS = {
    "default": CorpusConfig(),
    "adapter": CorpusConfig(train=3600, test=200, text=3600),
    "tiny": CorpusConfig(train=24, dev=6, test=6, names=4, text=96),
}


@dataclasses.dataclass(frozen=True)
class Utterance:
    """All that decides one audio file.

    Attributes:
      path: the file to write.
      text: what is said.
      voice: by whom.
      warp: factor on all frequencies, so formants too: a longer or shorter throat. The tempo is kept.
      level_db: root mean square of the speech, in dB of full scale.
      snr_db: speech over noise, in dB.
      tilt: of the noise spectrum, 0 (white) to 1 (falling 6 dB per octave).
      silence: seconds before and after the speech.
      seed: of the noise.
    """

    path: str
    text: str
    voice: espeak.Voice
    warp: float
    level_db: float
    snr_db: float
    tilt: float
    silence: tuple[float, float]
    seed: int


def preset(name: str) -> CorpusConfig:
    """Returns the configuration of that name.

    Raises:
      UserError: there is none.
    """
    if name not in PRESETS:
        raise UserError(f"corpus: no preset {name!r}{nearest(name, PRESETS)}")
    return PRESETS[name]


def build_corpus(
    directory: str | os.PathLike,
    config: CorpusConfig = CorpusConfig(),
    *,
    processes: int | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Builds the corpus in `directory`, or leaves it as it is if it was built from the same parameters.

    It is made in a folder beside `directory` and renamed at the end; an interrupted build goes on.

    Args:
      directory: where it goes.
      config: sizes and seed; the same ones give the same bytes.
      processes: how many synthesize; by default one per core.
      report: takes a line of progress every two seconds.

    Returns:
      `directory` as a Path.

    Raises:
      UserError: `directory` holds something else, or the `demo` extra is missing.
    """
    directory = Path(directory)
    stamp = {"format": _FORMAT, **dataclasses.asdict(config)}
    if _is_built(directory, stamp):
        report(f"corpus: {directory} is complete")
        return directory
    building = directory.with_name(f"{directory.name}.building")
    if building.exists() and _read_stamp(building) != stamp:
        shutil.rmtree(building)
    building.mkdir(parents=True, exist_ok=True)
    _write_atomically(building / STAMP, json.dumps(stamp, indent=1) + "\n")
    _speak(building, config, processes or os.cpu_count() or 1, report)
    for split, count in (("train", config.text), ("dev", config.dev)):
        records = _text_records(draw(split, count, config.seed), config.seed)
        _write_jsonl(building / f"text_{split}.jsonl", records)
        listed = draw_named(split, _LISTED_TEXT * count, config.seed)
        # The names that are said, no others: none is known for being listed and not said.
        others = names.invented_names(split, max(names.LISTED, len(listed)))
        _write_jsonl(building / f"text_names_{split}.jsonl", _text_records(listed, config.seed, others))
    building.replace(directory)
    return directory


def _is_built(directory: Path, stamp: dict) -> bool:
    """Whether `directory` holds the corpus of `stamp`.

    Raises:
      UserError: it holds anything else.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    found = _read_stamp(directory)
    if found is None:
        raise UserError(f"corpus: {directory} exists and is no demonstration corpus; give another directory")
    different = [
        f"{key} {found.get(key)} (asked for {value})"
        for key, value in stamp.items()
        if found.get(key) != value
    ]
    if different:
        raise UserError(
            f"corpus: {directory} was built with {', '.join(different)}; remove it or give another directory"
        )
    return True


def _read_stamp(directory: Path) -> dict | None:
    try:
        return json.loads((directory / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def draw(split: str, count: int, seed: int) -> list[sentences.Sentence]:
    """Returns `count` sentences of `split`; in train, one of seven has an invented name as its person.

    A longer draw of the same seed starts with the same sentences.
    """
    if split != "train":
        return sentences.draw(split, count, seed)
    named = -(-count // _NAMED_EVERY)
    usual, invented = iter(sentences.draw(split, count, seed)), iter(draw_named(split, named, seed))
    return [next(usual if number % _NAMED_EVERY else invented) for number in range(count)]


def draw_named(split: str, count: int, seed: int) -> list[sentences.Sentence]:
    """Returns `count` sentences of `split`, each about a person with an invented name of its own.

    So a model can know none by heart and has to spell what it hears. No name is in two splits.
    """
    templates = [template for template in sentences.TEMPLATES if "person" in template.kinds]
    drawn = sentences.draw(split, count, seed, templates)
    named = zip(drawn, names.invented_names(split, count), strict=True)
    return [sentences.renamed(sentence, invented) for sentence, invented in named]


def _speak(building: Path, config: CorpusConfig, processes: int, report: Callable[[str], None]) -> None:
    """Speaks the sentences of all sets and writes their manifests."""
    drawn = {split: (split, draw(split, getattr(config, split), config.seed)) for split in sentences.SPLITS}
    for split in ("dev", "test"):
        drawn[f"names_{split}"] = split, draw_named(split, config.names, config.seed)
    others = {split: names.invented_names(split, _OTHERS) for split in ("dev", "test")}
    planned = []
    for folder, (split, said) in drawn.items():
        (building / "audio" / folder).mkdir(parents=True, exist_ok=True)
        for number, sentence in enumerate(said):
            name = f"{folder}-{number:05d}"
            path = building / "audio" / folder / f"{name}.flac"
            utterance = plan_utterance(path, split, sentence.text, f"{config.seed}/{name}")
            planned.append((folder, name, sentence, utterance))
    manifests = {folder: [] for folder in drawn}
    start = reported = time.monotonic()
    seconds = 0.0
    lengths = espeak.parallel_map(render_file, [utterance for *_, utterance in planned], processes)
    for done, ((folder, name, sentence, utterance), samples) in enumerate(
        zip(planned, lengths, strict=True), 1
    ):
        duration = samples / espeak.SAMPLE_RATE
        key = f"{config.seed}/{name}"
        split = drawn[folder][0]
        manifests[folder].append({
            "id": name,
            "audio": Path(utterance.path).relative_to(building).as_posix(),
            "duration": duration,
            **_texts(sentence, key),
            **(_phrase_list(sentence, others[split], key) if folder != split else {}),
        })  # fmt: skip
        seconds += duration
        now = time.monotonic()
        if now - reported > _REPORT_SECONDS or done == len(planned):
            reported = now
            report(
                f"corpus: {done}/{len(planned)} utterances, {seconds / 60:.1f} min of speech, "
                f"{seconds / max(now - start, 1e-9):.0f}x real time"
            )
    for folder, records in manifests.items():
        _write_jsonl(building / f"{folder}.jsonl", records)


def plan_utterance(path: str | os.PathLike, split: str, text: str, key: str) -> Utterance:
    """Draws voice, level and noise for a sentence; the same `key` draws the same."""
    rng = random.Random(f"utterance/{key}")
    # Espeak's variants share most of their formants: warped, a few dozen of them become as many voices as
    # there are utterances, and the encoder learns to hear one that it never heard.
    warp = 2 ** rng.uniform(-_MOST_WARP_OCTAVES, _MOST_WARP_OCTAVES) if split == "train" else 1.0
    voice = espeak.Voice(
        name=f"en+{rng.choice(VOICES[split])}",
        # Warped speech is sped up or slowed down by as much.
        speed=round(rng.randint(145, 195) / warp),
        pitch=rng.randint(25, 75),
        range=rng.randint(30, 70),
        volume=80,
    )
    return Utterance(
        path=os.fspath(path),
        text=text,
        voice=voice,
        warp=warp,
        level_db=rng.uniform(-32, -18),
        snr_db=rng.uniform(15, 40),
        tilt=rng.uniform(0, 1),
        silence=(rng.uniform(0.05, 0.25), rng.uniform(0.05, 0.25)),
        seed=rng.getrandbits(32),
    )


def render_file(utterance: Utterance) -> int:
    """Writes the utterance's file unless it is there; returns its length in samples at 16 kHz."""
    # Imported late: a file, not a manifest, needs it.
    import soundfile

    path = Path(utterance.path)
    if path.exists():
        return soundfile.info(path).frames
    samples = render(utterance)
    # Written under another name first, so that an interrupted build leaves no half file.
    unfinished = path.with_suffix(".unfinished")
    soundfile.write(unfinished, samples, espeak.SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    unfinished.replace(path)
    return len(samples)


def render(utterance: Utterance) -> np.ndarray:
    """Returns int16 [samples] at 16 kHz: speech at its level, silence around it, noise over all."""
    rng = np.random.Generator(np.random.PCG64(utterance.seed))
    speech = espeak.synthesize(utterance.text, utterance.voice, utterance.warp).astype(np.float64) / 32768
    before, after = (round(seconds * espeak.SAMPLE_RATE) for seconds in utterance.silence)
    gain = 10 ** (utterance.level_db / 20) / max(float(np.sqrt(np.mean(speech**2))), 1e-6)
    # Loud peaks are scaled with the whole, not clipped.
    gain = min(gain, 0.99 / max(float(np.abs(speech).max()), 1e-6))
    samples = np.pad(speech * gain, (before, after))
    noise_db = utterance.level_db - utterance.snr_db
    samples += _noise(len(samples), utterance.tilt, rng) * 10 ** (noise_db / 20)
    return np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16)


def _noise(samples: int, tilt: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise [samples] of root mean square 1; its amplitude falls as frequency**-tilt above 20 Hz."""
    # A power of two, as the transform of an odd length takes longer than the synthesis of the speech.
    size = 1 << (samples - 1).bit_length()
    spectrum = np.fft.rfft(rng.standard_normal(size))
    frequencies = np.fft.rfftfreq(size, 1 / espeak.SAMPLE_RATE)
    spectrum *= np.maximum(frequencies, 20) ** -tilt
    noise = np.fft.irfft(spectrum, size)[:samples]
    return noise / np.sqrt(np.mean(noise**2))


def _texts(sentence: sentences.Sentence, key: str) -> dict:
    question, answer = sentences.question(sentence, random.Random(f"question/{key}"))
    return {
        "language": "en",
        "text": sentence.text,
        "translations": dict(sentence.translations),
        "question": question,
        "answer": answer,
        "slots": "; ".join(f"{kind}: {value}" for kind, value in sentence.slots.items()),
    }


def _phrase_list(sentence: sentences.Sentence, others: Sequence[str], key: str) -> dict:
    """A list of the sentence's own name and of others, and the sentence as it may be heard."""
    rng = random.Random(f"names/{key}")
    said = sentence.slots["person"]
    phrases = names.listed(said, others, rng)
    words = [names.misheard(said, rng) if word == said else word for word in sentence.text.split()]
    return {"phrases": phrases, "heard": " ".join(words)}


def _text_records(
    drawn: Iterable[sentences.Sentence], seed: int, others: Sequence[str] = ()
) -> Iterable[dict]:
    """Records of sentences without audio, with phrase lists where there are other names to list."""
    for number, sentence in enumerate(drawn):
        name = f"text-{number:05d}"
        key = f"{seed}/{name}"
        more = _phrase_list(sentence, others, key) if others else {}
        yield {"id": name, **_texts(sentence, key), **more}


def _write_jsonl(path: Path, records: Iterable[dict]) -> None:
    _write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _write_atomically(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
