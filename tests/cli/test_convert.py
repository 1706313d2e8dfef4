"""`slm convert` against the libraries that publish: their files in, our networks, their files out."""

import json
import logging
import shutil
import tarfile
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from slm_jax.checkpoints.foundation import RECORD_FILE, config_of, load_foundation, read_foundation
from slm_jax.cli.main import main
from slm_jax.models.encoders import encoder_class
from slm_jax.models.t5 import T5

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nAudioEncoder
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
T5X = Path(__file__).parents[1] / "checkpoints" / "data" / "t5x"

# Family -> (configuration of transformers, class that is published, class that is written back).
PUBLISHED: dict[str, tuple[Any, Any, Any]] = {
    "t5": (
        transformers.T5Config(
            vocab_size=70, d_model=24, d_kv=5, d_ff=36, num_layers=3, num_decoder_layers=2, num_heads=3,
            feed_forward_proj="gated-gelu",
        ),
        transformers.T5ForConditionalGeneration,
        transformers.T5ForConditionalGeneration,
    ),
    "umt5": (
        transformers.UMT5Config(
            vocab_size=70, d_model=24, d_kv=5, d_ff=36, num_layers=3, num_decoder_layers=2, num_heads=3,
        ),
        transformers.UMT5ForConditionalGeneration,
        transformers.UMT5ForConditionalGeneration,
    ),
    "whisper": (
        transformers.WhisperConfig(
            d_model=24, encoder_layers=3, decoder_layers=1, encoder_attention_heads=3,
            decoder_attention_heads=3, encoder_ffn_dim=40, decoder_ffn_dim=40, num_mel_bins=80,
            max_source_positions=100, vocab_size=60,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        ),
        transformers.WhisperForConditionalGeneration,
        WhisperEncoder,
    ),
    "w2v_bert": (
        transformers.Wav2Vec2BertConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
            feature_projection_input_dim=160, conv_depthwise_kernel_size=7, left_max_position_embeddings=6,
            right_max_position_embeddings=2, vocab_size=30,
        ),
        transformers.Wav2Vec2BertForCTC,
        transformers.Wav2Vec2BertModel,
    ),
    "gemma3n": (
        transformers.Gemma3nAudioConfig(
            hidden_size=24, conf_num_hidden_layers=2, conf_num_attention_heads=3, input_feat_size=128,
            sscp_conv_channel_size=(8, 4), vocab_size=8,
        ),
        Gemma3nAudioEncoder,
        Gemma3nAudioEncoder,
    ),
    "hubert": (
        transformers.HubertConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
            conv_dim=(16,) * 7, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        ),
        transformers.HubertForCTC,
        transformers.HubertModel,
    ),
}  # fmt: skip


def random_model(family: str) -> Any:
    config, published, _ = PUBLISHED[family]
    torch.manual_seed(0)
    model = published(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def run(*words: Any) -> None:
    assert main(["convert", *map(str, words)]) == 0


@pytest.mark.parametrize("family", PUBLISHED)
def test_there_and_back_is_exact(family, tmp_path, capsys):
    model = random_model(family)
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    run("--from", tmp_path / "hf", "--to", tmp_path / "ours")
    out, err = capsys.readouterr()
    record = read_foundation(tmp_path / "ours")
    assert out.split() == [str(record.directory), record.kind, record.fingerprint]
    assert "0 s left" in err
    assert "peak memory" in err
    assert ("no sentencepiece model lies beside it" in err) is (record.kind == "t5")
    run("--from", tmp_path / "ours", "--to_hf", tmp_path / "back")
    assert f"loads it by {PUBLISHED[family][2].__name__}.from_pretrained" in capsys.readouterr().err
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back, loading = PUBLISHED[family][2].from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    theirs, ours = model.state_dict(), back.state_dict()
    for name, tensor in ours.items():
        (wanted,) = [value for other, value in theirs.items() if other == name or other.endswith(f".{name}")][
            :1
        ]
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=0)
    # Our network is built from the record alone.
    config = config_of(record)
    if record.kind != "t5":
        encoder = encoder_class(config)(config)
        speech = np.zeros((1, 1, 4 * encoder.samples_per_frame * 4), np.int16)
        segments = np.array([[[[1, 0, speech.shape[-1]]]]], np.int32)
        abstract = jax.eval_shape(encoder.init, jax.random.key(0), speech, segments)["params"]
        params = load_foundation(
            tmp_path / "ours", record.kind, jax.tree.map(lambda leaf: leaf, unboxed(abstract))
        )
        frames, _ = jax.jit(encoder.apply)({"params": params}, speech, segments)
        assert np.isfinite(np.asarray(frames)).all()


def unboxed(tree: Any) -> Any:
    import flax.linen as nn

    return nn.unbox(tree)


@pytest.mark.parametrize("name", ["t5_legacy", "scalable_scan_legacy", "t5_orbax"])
def test_from_t5x_to_transformers(name, tmp_path):
    """The chain T5X -> slm convert -> slm convert --to_hf -> transformers gives T5X's own logits."""
    with tarfile.open(T5X / f"{name}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    reference = np.load(T5X / f"{name.replace('t5_orbax', 't5_legacy')}_logits.npz")
    run("--from", tmp_path / name, "--to", tmp_path / "ours")
    run("--from", tmp_path / "ours", "--to-hf", tmp_path / "hf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf").eval()
    assert type(theirs).__name__.startswith("UMT5" if "scan" in name else ("T5", "MT5"))
    inputs, targets = reference["encoder_input_tokens"], reference["decoder_target_tokens"]
    with torch.no_grad():
        logits = theirs(
            input_ids=torch.tensor(inputs),
            attention_mask=torch.tensor(inputs > 0),
            decoder_input_ids=torch.tensor(reference["decoder_input_tokens"]),
        ).logits.numpy()
    real = targets > 0
    scaled = getattr(theirs.config, "model_type", "") == "umt5"
    # transformers 5 scales every umT5's logits by d_model ** -0.5; see checkpoints/families/t5.py.
    logits = logits * (theirs.config.d_model**0.5 if scaled else 1.0)
    np.testing.assert_allclose(logits[real], reference["logits"][real], atol=1e-5)


def test_our_t5_computes_what_transformers_does(tmp_path):
    model = random_model("t5")
    model.save_pretrained(tmp_path / "hf")
    run("--from", tmp_path / "hf", "--to", tmp_path / "ours")
    record = read_foundation(tmp_path / "ours")
    network = T5(config_of(record))
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(2, 70, (2, 9)).astype(np.int32), np.ones((2, 9), np.int32)
    mask[0, :3] = mask[1, 5:] = 0
    abstract = unboxed(jax.eval_shape(network.init, jax.random.key(0), tokens, mask, tokens, mask))["params"]
    params = load_foundation(record.directory, "t5", abstract)

    @jax.jit
    def logits(params, tokens, mask):
        bound = network.bind({"params": params})
        hidden = bound.decode(bound.encode(bound.embed(tokens), mask), mask, tokens, jnp.ones_like(mask))
        return bound.logits(hidden)

    with torch.no_grad():
        start = torch.cat([torch.zeros(2, 1, dtype=torch.long), torch.tensor(tokens[:, :-1]).long()], dim=1)
        wanted = model(
            input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(mask), decoder_input_ids=start
        ).logits.numpy()
    found = np.asarray(logits(params, tokens, mask))
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_what_lies_beside_the_weights_travels_with_them(tmp_path):
    random_model("t5").save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "spiece.model").write_bytes(b"pieces")
    (tmp_path / "hf" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "hf" / "training_args.bin").write_bytes(b"a pickle")
    run("--from", tmp_path / "hf", "--to", tmp_path / "ours")
    run("--from", tmp_path / "ours", "--to_hf", tmp_path / "back")
    for folder in ("ours", "back"):
        assert (tmp_path / folder / "spiece.model").read_bytes() == b"pieces"
        assert (tmp_path / folder / "tokenizer_config.json").is_file()
        assert not (tmp_path / folder / "training_args.bin").exists()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["decoder_start_token_id"] == 0


def spoil(folder: Path, name: str) -> None:
    """Makes of the T5 in `hf` what a user might name instead."""
    if name == "done":
        run("--from", folder / "hf", "--to", folder / name)
    elif name in ("pointer", "headless"):
        shutil.copytree(folder / "hf", folder / name)
    if name == "pointer":
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"
        (folder / name / "model.safetensors").write_text(pointer)
    elif name == "headless":
        # As AutoModel saves an untied T5.
        tensors = load_file(folder / name / "model.safetensors")
        tensors.pop("lm_head.weight", None)
        save_file(tensors, folder / name / "model.safetensors")
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | {"architectures": ["T5Model"]}))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--from"),
        (["--from", "hf"], "one of --to, --to_hf, --to_t5x, --to_run"),
        (["--from", "hf", "--to", "a", "--to_hf", "b"], "one of --to, --to_hf, --to_t5x, --to_run"),
        (["--from", "hf", "--to", "a", "--layout", "scann"], "did you mean 'scan'"),
        (["--from", "hf", "--to", "a", "--dtype", "bfloat"], "did you mean 'bfloat16'"),
        (["--from", "nowhere", "--to", "a"], "nowhere is no directory"),
        (["--from", "hf", "--to_hf", "a"], f"it has no {RECORD_FILE}"),
        (["--from", "hf", "--to", "hf"], "never overwritten"),
        (["--from", "done", "--to", "a"], "is a foundation model already"),
        (["--from", "pointer", "--to", "a"], "run git lfs pull"),
        (["--from", "headless", "--to", "a"], "save the model by AutoModelForSeq2SeqLM"),
        (["--from", "hf", "--to", "a", "--gin.X=1"], "reads no gin"),
    ],
)
def test_a_mistake_is_one_sentence(words, told, tmp_path, monkeypatch, capsys):
    random_model("t5").save_pretrained(tmp_path / "hf")
    spoil(tmp_path, words[1] if len(words) > 1 else "")
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["convert", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("slm: error: ")
    assert err.count("\n") == 1
    assert told in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
