"""Augmentation: what is drawn decides all, lengths are those of the plan, and files are looked at before."""

import dataclasses
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.data import audio_files, effects
from slm_jax.data.augmentation import (
    AugmentationConfig,
    Augmenter,
    CodecConfig,
    GainConfig,
    NoiseConfig,
    RoomConfig,
    SpeedConfig,
    samples_at,
    samples_of_file,
)
from slm_jax.data.references import Reference
from slm_jax.errors import BadExample, UserError

KALDI = (0.9, 1.0, 1.1)


def write(path: Path, wave: np.ndarray, rate: int = 16_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate, subtype="PCM_16")
    return path


@pytest.fixture
def sounds(rng, tmp_path: Path) -> Path:
    """A folder with noises and impulse responses, of several rates, lengths and channels."""
    for i, (rate, seconds) in enumerate([(16_000, 3.0), (44_100, 0.2), (8_000, 1.0), (16_000, 0.05)]):
        count = int(rate * seconds)
        write(tmp_path / f"noise/deep/n{i}.flac", rng.uniform(-0.3, 0.3, (count, 1 + i % 2)), rate)
    for i, rate in enumerate((16_000, 48_000)):
        decay = np.exp(-np.arange(rate // 5) / (0.03 * rate)) * rng.uniform(-0.5, 0.5, rate // 5)
        decay[20] = 0.9
        write(tmp_path / f"rooms/r{i}.wav", decay, rate)
    return tmp_path


@pytest.fixture
def everything() -> AugmentationConfig:
    return AugmentationConfig(
        speed=SpeedConfig(KALDI),
        room=RoomConfig(["rooms"], probability=0.7),
        noise=NoiseConfig(["noise"], ["white", "pink"], probability=0.7),
        gain=GainConfig(),
        codec=CodecConfig(probability=0.5),
    )


@pytest.fixture
def speech(rng) -> np.ndarray:
    return rng.integers(-9000, 9000, int(rng.integers(5_000, 20_000))).astype(np.int16)


def test_all_bits_of_a_draw_count(speech):
    """Neighbours among large draws, which a float cannot tell apart, draw their own."""
    augmenter = Augmenter(AugmentationConfig(gain=GainConfig((-20, -1))))
    assert len(set(heard(augmenter, speech, np.uint64(2**64 - 1) - np.arange(9, dtype=np.uint64)))) == 9


def draws_of(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(1, 2**64, count, np.uint64)


def reference_of(audio: Path, samples: int, **fields: Any) -> Reference:
    return Reference(
        "u", str(audio), samples, np.zeros(0, np.int32), np.zeros(0, np.int32), "t", "en", **fields
    )


def heard(augmenter: Augmenter, speech: np.ndarray, draws: np.ndarray) -> list[bytes]:
    return [augmenter.augmented(speech, draw)[0].tobytes() for draw in draws.tolist()]


# --- draws ------------------------------------------------------------------------------------------


def test_a_draw_decides_all_in_any_thread_and_process(rng, sounds, everything, speech):
    augmenter, draws = Augmenter(everything, sounds), draws_of(rng, 24)
    expected = heard(augmenter, speech, draws)
    assert len(set(expected)) == len(expected)
    assert heard(Augmenter(everything, sounds), speech, draws) == expected
    assert heard(pickle.loads(pickle.dumps(augmenter)), speech, draws) == expected
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda draw: heard(augmenter, speech, draw[None])[0], draws[::-1]))
    assert parts[::-1] == expected


def test_no_draw_changes_nothing(sounds, everything, speech):
    samples, clipped = Augmenter(everything, sounds).augmented(speech, 0)
    np.testing.assert_array_equal(samples, speech)
    assert clipped == 0


def test_an_effect_leaves_what_others_draw(rng, sounds, speech):
    """A gain of 0 dB, and rooms and codecs that are never drawn, leave the noise as it was, bit for bit."""
    noise, draws = NoiseConfig(["noise"], ["pink"]), draws_of(rng, 20)
    alone = heard(Augmenter(AugmentationConfig(noise=noise), sounds), speech, draws)
    others = AugmentationConfig(
        speed=SpeedConfig(KALDI),
        noise=noise,
        room=RoomConfig(["rooms"], probability=0.0),
        gain=GainConfig((0.0, 0.0)),
        codec=CodecConfig(probability=0.0),
    )
    assert heard(Augmenter(others, sounds), speech, draws) == alone
    unchanged = sum(samples == speech.tobytes() for samples in alone)
    assert 0 < unchanged < len(alone)


def test_effects_come_as_often_and_as_strong_as_asked(rng, speech):
    """500 draws: a share has a deviation of 0.022."""
    speech = speech // 8
    augmenter = Augmenter(AugmentationConfig(gain=GainConfig((-12.0, 3.0), probability=0.3)))
    gains = []
    for draw in draws_of(rng, 500).tolist():
        samples, _ = augmenter.augmented(speech, draw)
        gains.append(10 * np.log10(np.mean(samples.astype(float) ** 2) / np.mean(speech.astype(float) ** 2)))
    changed = [gain for gain in gains if gain]
    assert abs(len(changed) / 500 - 0.3) < 0.1
    assert min(changed) > -12.1 and max(changed) < 3.1
    assert abs(np.mean(changed) + 4.5) < 1.5 and np.ptp(changed) > 11


def test_full_scale_is_kept_and_counted(rng):
    loud = rng.integers(-32768, 32768, 4000).astype(np.int16)
    augmenter = Augmenter(AugmentationConfig(gain=GainConfig((6.0, 6.0))))
    samples, clipped = augmenter.augmented(loud, 5)
    scaled = np.rint(loud * 10**0.3)
    assert clipped == np.count_nonzero((scaled > 32767) | (scaled < -32768)) > 1000
    np.testing.assert_allclose(samples, np.clip(scaled, -32768, 32767), atol=1)
    through = Augmenter(
        AugmentationConfig(gain=GainConfig((6.0, 6.0)), codec=CodecConfig(["mu_law"], probability=1))
    )
    assert through.augmented(loud, 5)[1] >= clipped


@settings(deadline=None)
@given(
    samples=st.integers(1, 3000), draw=st.integers(1, 2**64 - 1), loud=st.integers(0, 32767),
)  # fmt: skip
def test_lengths_stay(samples: int, draw: int, loud: int):
    speech = np.random.default_rng(samples).integers(-loud, loud + 1, samples).astype(np.int16)
    config = AugmentationConfig(
        noise=NoiseConfig(generated=["white", "pink"], snr_db=(-20, 60), probability=1.0),
        gain=GainConfig((-30, 30)),
        codec=CodecConfig(tuple(effects.CODECS), (0, effects.SMALLEST), 1.0),
    )
    found, _ = Augmenter(config).augmented(speech, draw)
    assert found.dtype == np.int16 and found.shape == speech.shape


# --- speed ------------------------------------------------------------------------------------------


def test_speeds_are_uniform_and_apart_from_effects(rng):
    draws = draws_of(rng, 9000)
    found = SpeedConfig(KALDI).speeds(draws)
    values, counts = np.unique(found, return_counts=True)
    assert values.tolist() == list(KALDI)
    np.testing.assert_allclose(counts / 9000, 1 / 3, atol=0.03)
    assert (SpeedConfig(KALDI).speeds(np.zeros(3, np.uint64)) == 1).all()
    # One seed, two questions: a third of the slow ones are as loud as a third of all.
    augmenter = Augmenter(AugmentationConfig(gain=GainConfig((-6, 6), probability=0.5)))
    tone = np.full(4, 1000, np.int16)
    slow = draws[found == 0.9][:600]
    changed = np.mean([augmenter.augmented(tone, draw)[0][0] != 1000 for draw in slow.tolist()])
    assert abs(changed - 0.5) < 0.12


@given(st.integers(1, 2**31), st.integers(500, 2000))
def test_lengths_of_files_come_back(samples: int, per_mille: int):
    speed = per_mille / 1000
    length = samples_at(samples, speed)
    assert length >= 1 and abs(length - samples / speed) <= 0.5
    assert samples_at(samples, np.float32(speed)) == length
    assert SpeedConfig((speed,)).samples_at(np.array([samples, 1]), np.array([speed, 1.0])).tolist() == [
        length,
        1,
    ]
    file = samples_of_file(length, speed)
    assert samples_at(file, speed) == length and samples_at(file + 1, speed) > length
    assert samples <= file <= samples + speed


@pytest.mark.parametrize("speed", [0.9, 1.0, 1.1, 1.337])
def test_utterances_have_the_planned_samples(rng, tmp_path, speed: float):
    """Of the file's rules: at most 10 ms longer is trimmed, more is refused, much shorter too."""
    count = int(rng.integers(20_000, 40_000))
    wave = rng.integers(-9000, 9000, count + 400).astype(np.int16)
    augmenter = Augmenter(AugmentationConfig(speed=SpeedConfig(KALDI)))
    planned = int(samples_at(count, speed))
    for extra in (0, 1, 150):
        audio = write(tmp_path / "u.wav", wave[: count + extra])
        found = augmenter(reference_of(audio, planned, speed=speed, draw=3))
        assert found.length == planned and abs(found.trimmed - extra) <= 1
        if speed == 1:
            np.testing.assert_array_equal(found.samples, wave[:count])
    with pytest.raises(BadExample, match="longer_than_reference"):
        augmenter(reference_of(write(tmp_path / "u.wav", wave[: count + 170]), planned, speed=speed, draw=3))
    short = augmenter(
        reference_of(write(tmp_path / "u.wav", wave[: count - 3000]), planned, speed=speed, draw=3)
    )
    assert short.length == samples_at(count - 3000, speed)
    with pytest.raises(BadExample, match="shorter_than_reference"):
        augmenter(reference_of(write(tmp_path / "u.wav", wave[: count - 4100]), planned, speed=speed, draw=3))


def test_overshoot_of_another_speed_is_counted(tmp_path):
    square = np.repeat(np.array([32767, -32768], np.int16), 50)
    audio = write(tmp_path / "u.wav", np.tile(square, 100))
    augmenter = Augmenter(AugmentationConfig(speed=SpeedConfig(KALDI)))
    length = int(samples_at(10_000, 1.1))
    assert augmenter(reference_of(audio, length, speed=1.1, draw=1)).clipped > 100
    plain = audio_files.load_utterance(reference_of(audio, 10_000))
    np.testing.assert_array_equal(augmenter(reference_of(audio, 10_000)).samples, plain.samples)


# --- files ------------------------------------------------------------------------------------------


def test_files_are_named_in_every_way(rng, sounds, speech):
    deep = sounds / "noise/deep"
    (sounds / "list.txt").write_text("noise/deep/n0.flac\n\nnoise/deep/n1.flac\n")
    lines = [{"audio": "noise/deep/n2.flac", "duration": 1}, {"audio": str(deep / "n3.flac")}]
    (sounds / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    folder = AugmentationConfig(noise=NoiseConfig(["noise"]))
    listed = AugmentationConfig(noise=NoiseConfig(["list.txt", "list.jsonl"]))
    single = AugmentationConfig(noise=NoiseConfig([str(deep / f"n{i}.flac") for i in range(4)]))
    augmenters = [Augmenter(config, sounds) for config in (folder, listed, single)]
    draws = draws_of(rng, 12)
    first, *others = (heard(augmenter, speech, draws) for augmenter in augmenters)
    assert all(other == first for other in others)
    assert len({augmenter.fingerprint for augmenter in augmenters}) == 1
    (deep / "n2.flac").unlink()
    assert Augmenter(folder, sounds).fingerprint != augmenters[0].fingerprint


def test_noise_is_a_part_of_its_file(rng, sounds, speech):
    """The added part lies in the file: nowhere else does it correlate."""
    config = AugmentationConfig(noise=NoiseConfig(["noise/deep/n0.flac"], snr_db=(0, 0), probability=1.0))
    noise, _ = soundfile.read(sounds / "noise/deep/n0.flac")
    places = set()
    for draw in draws_of(rng, 5).tolist():
        samples, _ = Augmenter(config, sounds).augmented(speech, draw)
        added = samples.astype(float) - speech
        scores = np.correlate(noise, added[:1000], "valid")
        place = int(np.argmax(scores))
        part = noise[place : place + len(added)]
        assert np.corrcoef(added, part)[0, 1] > 0.999
        places.add(place)
    assert len(places) > 1


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["noise/deep/n9.flac"], r"NoiseConfig\.files: .*n9\.flac does not exist; did you mean 'n\d\.flac'"),
        (["empty"], r"NoiseConfig\.files: .*empty holds no audio"),
        (["text.wav"], r"NoiseConfig\.files: .*text\.wav cannot be read"),
        (["bad.jsonl"], r"bad\.jsonl line 2 is no object with \"audio\""),
        (["none.txt"], r"NoiseConfig\.files: .*gone\.wav cannot be read"),
        (["cut.flac"], r"NoiseConfig\.files: .*cut\.flac"),
        (["zero.wav"], r"NoiseConfig\.files: .*zero\.wav has 0 samples"),
    ],
)
def test_bad_noise_is_told_at_the_start(rng, sounds, files, says):
    (sounds / "empty").mkdir()
    (sounds / "text.wav").write_text("no audio")
    (sounds / "bad.jsonl").write_text('{"audio": "noise/deep/n0.flac"}\n[]\n')
    (sounds / "none.txt").write_text("gone.wav\n")
    write(sounds / "zero.wav", np.zeros(0))
    whole = write(sounds / "whole.flac", rng.uniform(-1, 1, 160_000)).read_bytes()
    (sounds / "cut.flac").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=says):
        Augmenter(AugmentationConfig(noise=NoiseConfig(files)), sounds)


def test_a_silent_room_is_told_at_the_start(tmp_path):
    write(tmp_path / "silent.wav", np.zeros(900))
    with pytest.raises(UserError, match=r"RoomConfig\.files: .*silent\.wav is silent"):
        Augmenter(AugmentationConfig(room=RoomConfig(["silent.wav"])), tmp_path)


def test_noise_that_goes_missing_later_is_a_bad_example(sounds, speech):
    config = AugmentationConfig(noise=NoiseConfig(["noise/deep/n0.flac"], probability=1.0))
    augmenter = Augmenter(config, sounds)
    (sounds / "noise/deep/n0.flac").unlink()
    with pytest.raises(BadExample, match="unreadable_augmentation"):
        augmenter.augmented(speech, 7)


# --- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: AugmentationConfig(), "has no effect"),
        (lambda: SpeedConfig((0.9, 3)), r"SpeedConfig\.factors has 3, expected factors from 0\.5 to 2"),
        (lambda: SpeedConfig((0.9001,)), "whole thousandths"),
        (lambda: SpeedConfig(()), "SpeedConfig.factors is empty"),
        (lambda: GainConfig((3, -3)), r"GainConfig\.db is \(3, -3\), expected a pair"),
        (lambda: GainConfig(cast(Any, 4.0)), r"GainConfig\.db is 4\.0, expected a pair"),
        (lambda: GainConfig(probability=1.5), r"GainConfig\.probability is 1\.5, expected a number"),
        (lambda: NoiseConfig(), "neither files nor generated"),
        (lambda: NoiseConfig(generated="pinc"), "did you mean 'pink'"),
        (lambda: CodecConfig(["mulaw"]), "did you mean 'mu_law'"),
        (lambda: CodecConfig(level=(0, 1)), r"level is \(0, 1\), expected a pair .* 0 and 0\.99"),
        (lambda: RoomConfig(), "RoomConfig.files is empty"),
        (lambda: SpeedConfig(cast(Any, 0.9)), r"factors is 0\.9, expected a list, such as \[0\.9, 1\.0"),
        (lambda: RoomConfig(cast(Any, None)), "RoomConfig.files is None, expected a list"),
        (lambda: CodecConfig(cast(Any, None)), "CodecConfig.codecs is None, expected a list"),
        (lambda: CodecConfig(cast(Any, [["mp3"]])), r"CodecConfig\.codecs has \['mp3'\]; did you mean 'mp3'"),
    ],
)  # fmt: skip
def test_mistakes_are_told(make, says: str):
    with pytest.raises(UserError, match=says):
        make()


@pytest.mark.parametrize(("format", "subtype"), [("WAV", "MPEG_LAYER_III"), ("FLAC", "ULAW")])
def test_a_codec_that_libsndfile_lacks_is_told(monkeypatch, format: str, subtype: str):
    monkeypatch.setitem(effects.CODECS, "mp3", effects.Codec(format, subtype, 16_000))
    with pytest.raises(UserError, match=r"CodecConfig\.codecs has 'mp3', which this machine's libsndfile"):
        Augmenter(AugmentationConfig(codec=CodecConfig(["mp3"])))


def test_fields_of_lists_become_tuples():
    config = CodecConfig(["gsm"], cast(Any, [0.1, 0.2]))
    assert hash(config) == hash(dataclasses.replace(config)) and config.level == (0.1, 0.2)
    assert SpeedConfig(list(KALDI)) == SpeedConfig(KALDI)
