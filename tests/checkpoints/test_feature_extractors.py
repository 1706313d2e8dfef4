"""What the files beside `config.json` say of features: computed as they say, or refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from published import WHISPER, tensors_of, write_checkpoint

from slm_jax.audio.log_mel import log_mel
from slm_jax.checkpoints.conversion import open_source, plan_conversion
from slm_jax.checkpoints.families import gemma3n, w2v_bert, wav2vec2, whisper
from slm_jax.errors import UserError
from slm_jax.models import conformer
from slm_jax.models.wav2vec2 import Wav2Vec2Config

GEMMA = gemma3n.FAMILY.config_of(
    {
        "model_type": "gemma3n_audio", "hidden_size": 12, "conf_num_attention_heads": 3,
        "conf_num_hidden_layers": 1, "sscp_conv_channel_size": [4, 6],
    },
    {},
)  # fmt: skip
W2V_BERT = w2v_bert.FAMILY.config_of(
    {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 20}, {}
)
WAV2VEC2 = Wav2Vec2Config(layers=1, dim=16, heads=2, mlp_dim=20, published_as="wav2vec2")
# WHISPER has 20 positions of 320 samples, 0.4 s.
OF_WHISPER = {"feature_size": 16, "chunk_length": 0.4, "n_samples": 6400, "nb_max_frames": 40}
MODELS = {
    "whisper": (whisper.FAMILY, WHISPER),
    "wav2vec2": (wav2vec2.FAMILY, WAV2VEC2),
    "w2v_bert": (w2v_bert.FAMILY, W2V_BERT),
    "gemma3n": (gemma3n.FAMILY, GEMMA),
}


@pytest.fixture(params=["preprocessor_config.json", "processor_config.json"])
def config_for(request, tmp_path):
    """Our configuration for a model and what its extractor's file, either of the two, says."""

    def planned(name, fields):
        family, config = MODELS[name]
        theirs = family.hf_config(config)
        theirs.pop("do_normalize", None)
        write_checkpoint(tmp_path / name, tensors_of(family, config), theirs)
        inner = fields if request.param == "preprocessor_config.json" else {"feature_extractor": fields}
        (tmp_path / name / request.param).write_text(json.dumps(inner))
        return plan_conversion(open_source(tmp_path / name)).config

    return planned


@pytest.mark.parametrize(
    ("name", "extractor", "changes"),
    [
        ("whisper", transformers.WhisperFeatureExtractor(feature_size=16), OF_WHISPER),
        ("wav2vec2", transformers.Wav2Vec2FeatureExtractor(), {}),
        ("w2v_bert", transformers.SeamlessM4TFeatureExtractor(padding_value=1), {}),
        ("gemma3n", transformers.Gemma3nAudioFeatureExtractor(), {}),
    ],
)
def test_what_transformers_writes_by_default_changes_nothing(config_for, name, extractor, changes):
    fields = json.loads(extractor.to_json_string()) | changes
    assert config_for(name, fields) == config_for(name, {}) == MODELS[name][1]


def test_the_waveform_is_not_normalised_where_the_file_says_so(config_for):
    assert config_for("wav2vec2", {"do_normalize": True}).normalize
    assert not config_for("wav2vec2", {"do_normalize": False}).normalize


REFUSED = [
    ("whisper", {"hop_length": 320}, "hop_length 320, expected 160"),
    ("whisper", {"n_fft": 800}, "n_fft 800, expected 400"),
    ("whisper", {"sampling_rate": 8000}, "sampling_rate 8000, expected 16000"),
    ("whisper", {"chunk_length": 60}, "chunk_length 60, expected 0.4.*max_source_positions 20"),
    ("whisper", {"feature_size": 80}, "feature_size 80, expected 16"),
    ("whisper", {"dither": 1e-4}, "dither 0.0001, expected 0.0"),
    ("wav2vec2", {"sampling_rate": 8000}, "sampling_rate 8000, expected 16000"),
    ("wav2vec2", {"feature_size": 80}, "feature_size 80, expected 1"),
    ("wav2vec2", {"do_normalize": "no"}, "do_normalize 'no', expected true or false"),
    ("w2v_bert", {"num_mel_bins": 40}, "num_mel_bins 40, expected 80"),
    ("w2v_bert", {"num_mel_bins": 40, "stride": 4}, "expected 80"),
    ("w2v_bert", {"stride": 4}, "stride 4, expected 2"),
    ("w2v_bert", {"sampling_rate": 8000}, "sampling_rate 8000, expected 16000"),
    ("gemma3n", {"sampling_rate": 8000}, "sampling_rate 8000, expected 16000"),
    ("gemma3n", {"feature_size": 64}, "feature_size 64, expected 128"),
    ("gemma3n", {"frame_length": 400}, "frame_length 400, expected 512"),
    ("gemma3n", {"hop_length": 320}, "hop_length 320, expected 160"),
    ("gemma3n", {"fft_length": 512}, "fft_length 512, expected 1024"),
    ("gemma3n", {"frame_length_ms": 1e9}, "frame_length_ms 1e.09, expected one from 1"),
    ("gemma3n", {"hop_length_ms": 64}, "hop_length_ms 64, expected one from 1 to 32"),
    ("gemma3n", {"dither": 0.1}, "dither 0.1, expected 0.0"),
    ("gemma3n", {"preemphasis_htk_flavor": False}, "preemphasis_htk_flavor False, expected True"),
    ("gemma3n", {"mel_floor": 0.0}, "mel_floor 0.0, expected a number above 0"),
    ("gemma3n", {"mel_floor": float("nan")}, "mel_floor nan, expected a number above 0"),
    ("gemma3n", {"min_frequency": 7600.0}, "min_frequency 7600 and max_frequency 7600"),
    ("gemma3n", {"max_frequency": 9000}, "max_frequency 9000, expected .* at most 8000"),
    ("gemma3n", {"per_bin_mean": [0.0]}, "per_bin_mean .*, expected 128 numbers"),
    ("gemma3n", {"per_bin_stddev": [0.0] * 128}, "per_bin_stddev .*, expected numbers above 0"),
]


@pytest.mark.parametrize(("name", "fields", "says"), REFUSED)
def test_other_features_than_ours_are_refused(config_for, name, fields, says):
    with pytest.raises(UserError, match=f"preprocessor_config.json or processor_config.json.*{says}"):
        config_for(name, fields)


def test_gemma_with_other_features_computes_them(rng, config_for):
    extractor = transformers.Gemma3nAudioFeatureExtractor(
        min_frequency=80.0, max_frequency=7000.0, preemphasis=0.9, mel_floor=1e-3, input_scale_factor=2.0,
        fft_overdrive=False, per_bin_mean=rng.normal(size=128), per_bin_stddev=rng.uniform(0.5, 2.0, 128),
    )  # fmt: skip
    config = config_for("gemma3n", json.loads(extractor.to_json_string()))
    speech = rng.integers(-3000, 3000, 6400).astype(np.int16)
    theirs = extractor([speech.astype(np.float32) / 32768.0], return_tensors="np")
    ours, _ = log_mel(speech, jnp.asarray([[1, 0, speech.size]]), config.log_mel)
    frames = theirs["input_features"][0]
    np.testing.assert_allclose(ours[: len(frames)], frames, atol=2e-4)
    assert gemma3n.FAMILY.config_of(gemma3n.FAMILY.hf_config(config), {}) == config


def test_gemma_as_published_is_written_without_an_extractor():
    assert "feature_extractor" not in gemma3n.FAMILY.hf_config(conformer.preset("gemma3n"))


class TestBothFiles:
    @pytest.fixture
    def folder(self, tmp_path):
        theirs = wav2vec2.FAMILY.hf_config(WAV2VEC2)
        theirs.pop("do_normalize")
        return write_checkpoint(tmp_path / "hf", tensors_of(wav2vec2.FAMILY, WAV2VEC2), theirs)

    def write(self, folder, own, inner):
        (folder / "preprocessor_config.json").write_text(json.dumps(own))
        (folder / "processor_config.json").write_text(json.dumps({"feature_extractor": inner}))

    def test_they_add_up(self, folder):
        self.write(folder, {"feature_size": 1, "processor_class": "A"}, {"do_normalize": False})
        assert not plan_conversion(open_source(folder)).config.normalize

    def test_they_must_not_disagree(self, folder):
        self.write(folder, {"do_normalize": True}, {"do_normalize": False})
        says = "preprocessor_config.json has do_normalize True and .*processor_config.json has False"
        with pytest.raises(UserError, match=says):
            open_source(folder)

    def test_nor_with_the_config_that_we_write(self, folder):
        config = json.loads((folder / "config.json").read_text()) | {"do_normalize": False}
        (folder / "config.json").write_text(json.dumps(config))
        assert not plan_conversion(open_source(folder)).config.normalize
        self.write(folder, {"do_normalize": True}, {})
        with pytest.raises(UserError, match=r"do_normalize True, expected False: config\.json says so"):
            plan_conversion(open_source(folder))

    def test_an_extractor_that_is_no_object(self, folder):
        self.write(folder, {}, [])
        with pytest.raises(UserError, match=r"processor_config.json has feature_extractor \[\], expected"):
            open_source(folder)
        (folder / "processor_config.json").unlink()
        config = json.loads((folder / "config.json").read_text()) | {"feature_extractor": "x"}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=r"config\.json has feature_extractor 'x', expected an object"):
            plan_conversion(open_source(folder))
