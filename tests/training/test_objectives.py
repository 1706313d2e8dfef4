"""The objectives against other implementations, brute force, and what must not matter."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from slm_jax.audio.log_mel import LogMelConfig
from slm_jax.audio.spec_augment import SpecAugmentConfig
from slm_jax.errors import UserError
from slm_jax.models import t5
from slm_jax.models.conformer import ConformerConfig, ConformerEncoder
from slm_jax.training.objectives import best_rq
from slm_jax.training.objectives.best_rq import BestRQConfig, BestRQObjective
from slm_jax.training.objectives.ctc import CTCObjective, frames_needed, greedy_labels
from slm_jax.training.objectives.slm import weighted_token_sums
from slm_jax.training.objectives.text import TextObjective, blurred, noisy

SAMPLES = 640 * 12
ENCODER = ConformerConfig(
    layers=1,
    dim=16,
    heads=2,
    ffn_multiplier=2,
    subsampling_channels=(4, 4),
    log_mel=LogMelConfig(mel_bins=16, fft_length=512, window_ms=25.0),
)


def speech_batch(rng, lengths, targets, vocab=8):
    """One utterance of each length in its own row; `targets` are lists of pieces without EOS."""
    rows, longest = len(lengths), max(len(target) for target in targets) + 1
    batch = {
        "speech": rng.integers(-9000, 9000, (rows, 1, SAMPLES)).astype(np.int16),
        "speech_segments": np.array([[[[int(n > 0), 0, n]]] for n in lengths], np.int32),
        "targets": np.zeros((rows, longest), np.int32),
        "target_segment_ids": np.zeros((rows, longest), np.int32),
        "target_positions": np.zeros((rows, longest), np.int32),
    }
    for row, target in enumerate(targets):
        pieces = [*target, 1] if target else []
        batch["targets"][row, : len(pieces)] = pieces
        batch["target_segment_ids"][row, : len(pieces)] = 1
        batch["target_positions"][row, : len(pieces)] = range(len(pieces))
    weights = (batch["target_segment_ids"] > 0).astype(np.float32)
    return {name: jnp.asarray(value) for name, value in {**batch, "loss_weights": weights}.items()}


def text_batch(rng, rows=4, inputs=7, targets=5, vocab=32):
    batch = {
        "inputs": np.zeros((rows, inputs), np.int32),
        "inputs_said": np.zeros((rows, inputs), bool),
        "layout": np.full((rows, inputs), -1, np.int32),
        "layout_segment_ids": np.zeros((rows, inputs), np.int32),
        "targets": np.zeros((rows, targets), np.int32),
        "target_segment_ids": np.zeros((rows, targets), np.int32),
        "target_positions": np.zeros((rows, targets), np.int32),
    }
    for row in range(rows):
        n, m = rng.integers(2, inputs + 1), rng.integers(1, targets + 1)
        batch["inputs"][row, :n] = rng.integers(2, vocab, n)
        # At least two: a blur over one alone changes nothing.
        batch["inputs_said"][row, rng.integers(n - 1) : n] = True
        batch["layout"][row, :n] = range(n)
        batch["layout_segment_ids"][row, :n] = 1
        batch["targets"][row, :m] = rng.integers(2, vocab, m)
        batch["target_segment_ids"][row, :m] = 1
        batch["target_positions"][row, :m] = range(m)
    weights = (batch["target_segment_ids"] > 0).astype(np.float32)
    return {name: jnp.asarray(value) for name, value in {**batch, "loss_weights": weights}.items()}


def initialise(objective, batch, seed=0):
    return jax.jit(lambda key, batch: nn.unbox(objective.init(key, batch)))(jax.random.key(seed), batch)


def sums_of(objective, variables, batch, seed=0):
    """The objective's sums; compiled, as running it operation by operation takes long."""
    loss = jax.jit(objective.loss)
    return loss(variables["params"], variables.get("frozen", {}), batch, jax.random.key(seed))


def gradients_of(objective, variables, batch, seed=0):
    def loss(params, batch):
        return objective.loss(params, variables.get("frozen", {}), batch, jax.random.key(seed))[0]

    # The batch is an argument: as a constant, fresh in every run, it would defeat the compilation cache.
    return jax.jit(jax.grad(loss))(variables["params"], batch)


# Tokens


def test_tokens_of_weight_0_count_nothing_whatever_their_loss(rng):
    losses = rng.uniform(size=(3, 5)).astype(np.float32)
    weights = rng.integers(0, 3, (3, 5)).astype(np.float32)
    correct = rng.integers(0, 2, (3, 5)).astype(bool)
    losses_with_nan = np.where(weights > 0, losses, np.nan)
    loss_sum, weight_sum, metrics = weighted_token_sums(
        *map(jnp.asarray, (losses_with_nan, correct, weights))
    )
    np.testing.assert_allclose(loss_sum, np.sum(losses * weights), rtol=1e-6)
    assert weight_sum == weights.sum()
    assert [float(value) for value in metrics["token_accuracy"]] == [(correct * weights).sum(), weights.sum()]


# Text

TEXT = t5.preset("tiny", vocab_size=32, emb_dim=16, mlp_dim=32, encoder_layers=1, decoder_layers=1)


def test_text_objective_is_plain_t5(rng):
    batch = text_batch(rng)
    objective = TextObjective(t5.T5(TEXT))
    variables = initialise(objective, batch)
    loss_sum, weight_sum, metrics = sums_of(objective, variables, batch)
    losses, correct = jax.jit(t5.T5(TEXT).apply)(
        variables,
        batch["inputs"],
        batch["layout_segment_ids"],
        batch["targets"],
        batch["target_segment_ids"],
    )
    np.testing.assert_allclose(loss_sum, jnp.sum(losses * batch["loss_weights"]), rtol=1e-5)
    assert weight_sum == batch["loss_weights"].sum()
    np.testing.assert_allclose(metrics["token_accuracy"][0], jnp.sum(correct * batch["loss_weights"]))
    grads = gradients_of(objective, variables, batch)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_embedding_noise_is_relative_to_each_embedding_and_each_row_has_its_level(rng):
    embeddings = rng.normal(size=(40, 5, 16_384)) * np.array([0.01, 1.0, 3.0, 50.0, 0.0])[:, None]
    spoilt = np.asarray(
        noisy(jnp.asarray(embeddings, jnp.float32), 1.5, jax.random.key(int(rng.integers(2**31))))
    )
    rms = np.sqrt(np.mean(np.square(embeddings), axis=-1))
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(spoilt), axis=-1)), rms, rtol=0.1)
    # What is left of the embedding tells the level: 1 / sqrt(1 + level ** 2).
    kept = np.mean(spoilt * embeddings, axis=-1)[:, :4] / np.square(rms[:, :4])
    levels = np.sqrt(np.maximum(kept**-2 - 1, 0))
    assert np.ptp(levels, axis=1).max() < 0.4
    assert levels.min() < 0.5 and 1.0 < levels.max() < 1.8


def gaussian_mean(row, ids, width):
    """A row's embeddings averaged over their segment in float64, each with the norm that it had."""
    distance = np.arange(len(ids))[:, None] - np.arange(len(ids))
    weights = np.exp(-0.5 * (distance / width) ** 2) * (ids[:, None] == ids)
    mixed = weights @ row.astype(np.float64)
    norms = np.linalg.norm(row, axis=-1) / np.linalg.norm(mixed, axis=-1)
    return np.where(ids[:, None] > 0, mixed * norms[:, None], row)


def test_blur_is_a_gaussian_mean_inside_the_segment_in_half_of_the_rows(rng):
    rows, length, dim, most = 64, 12, 16, 2.0
    segment_ids = np.sort(rng.integers(0, 4, (rows, length)))
    values = rng.normal(size=(rows, length, dim)).astype(np.float32) * rng.uniform(0.1, 9, (rows, length, 1))
    key = jax.random.key(int(rng.integers(2**31)))
    found = np.asarray(blurred(jnp.asarray(values), jnp.asarray(segment_ids), most, key))
    widths = []
    for row, ids, got in zip(values, segment_ids, found, strict=True):
        # The width is not told: the one that fits best has to fit exactly.
        grid = np.linspace(0.1, most, 400)
        errors = [np.abs(gaussian_mean(row, ids, width) - got).max() for width in grid]
        best = int(np.argmin(errors))
        fine = np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, 399)], 400)
        error = min(np.abs(gaussian_mean(row, ids, width) - got).max() for width in fine)
        assert error < 1e-3 * np.abs(row).max()
        widths.append(grid[best])
    blurry = np.array(widths) > 0.25
    assert 0.2 < blurry.mean() < 0.8 and np.ptp(np.array(widths)[blurry]) > 0.5


@pytest.mark.parametrize("name", ["embedding_noise", "embedding_blur"])
def test_spoilt_embeddings_depend_on_the_step_key_alone(rng, name):
    batch = text_batch(rng)
    quiet, loud = TextObjective(t5.T5(TEXT)), TextObjective(t5.T5(TEXT), **{name: 0.9})
    variables = initialise(quiet, batch)
    first, again, other = (float(sums_of(loud, variables, batch, seed)[0]) for seed in (1, 1, 2))
    assert first == again != other
    assert float(sums_of(quiet, variables, batch, 1)[0]) != first
    # An instruction stays exact: where nothing is said, nothing is spoilt.
    asked = batch | {"inputs_said": jnp.zeros_like(batch["inputs_said"])}
    exact = float(sums_of(quiet, variables, asked, 1)[0])
    assert float(sums_of(loud, variables, asked, 1)[0]) == pytest.approx(exact, rel=1e-6)
    with pytest.raises(UserError, match="has 'speech'"):
        quiet.init(jax.random.key(0), batch | {"speech_segments": jnp.zeros((4, 1, 1, 3), jnp.int32)})
    with pytest.raises(UserError, match=rf"{name} is -0.1"):
        TextObjective(t5.T5(TEXT), **{name: -0.1})


# CTC


def test_ctc_is_torchs_on_ragged_rows(rng):
    lengths = [int(n) for n in rng.integers(640 * 7, SAMPLES + 1, 4)]
    targets = [[int(piece) for piece in rng.integers(2, 8, rng.integers(1, 4))] for _ in lengths]
    batch = speech_batch(rng, lengths, targets)
    objective = CTCObjective(ConformerEncoder(ENCODER), vocab_size=8)
    variables = initialise(objective, batch)
    logits, speech = jax.jit(objective.model.apply)(variables, batch)
    np.testing.assert_array_equal(speech.sum(axis=1), [-(-n // 640) for n in lengths])
    expected = torch.nn.functional.ctc_loss(
        torch.log_softmax(torch.tensor(np.asarray(logits)), -1).transpose(0, 1),
        torch.tensor([piece for target in targets for piece in target]),
        torch.tensor(np.asarray(speech.sum(axis=1))),
        torch.tensor([len(target) for target in targets]),
        reduction="sum",
    )
    loss_sum, weight_sum, metrics = sums_of(objective, variables, batch)
    np.testing.assert_allclose(loss_sum, expected, rtol=1e-4)
    assert weight_sum == sum(len(target) for target in targets)
    assert [float(value) for value in metrics["unalignable"]] == [0, 4]


def test_a_probe_trains_the_head_alone_and_scores_as_the_whole_does(rng):
    batch = speech_batch(rng, [640 * 9, 640 * 12], [[2, 3], [4, 5, 6]])
    whole = CTCObjective(ConformerEncoder(ENCODER), vocab_size=8)
    probe = CTCObjective(ConformerEncoder(ENCODER), vocab_size=8, freeze_encoder=True)
    variables, frozen = initialise(whole, batch), initialise(probe, batch)
    assert frozen["params"].keys() == {"head"} and frozen["frozen"].keys() == {"encoder"}
    jax.tree.map(np.testing.assert_array_equal, {**frozen["params"], **frozen["frozen"]}, variables["params"])
    np.testing.assert_allclose(
        sums_of(probe, frozen, batch)[0], sums_of(whole, variables, batch)[0], rtol=1e-5
    )
    loud = CTCObjective(ConformerEncoder(dataclasses.replace(ENCODER, dropout=0.5)), 8, freeze_encoder=True)
    assert float(sums_of(loud, frozen, batch, 1)[0]) == float(sums_of(probe, frozen, batch, 2)[0])
    grads = gradients_of(probe, frozen, batch)
    assert grads.keys() == {"head"}
    found = probe.transcribe(frozen["params"], batch, frozen["frozen"])
    np.testing.assert_array_equal(found, whole.transcribe(variables["params"], batch))


def test_an_utterance_that_cannot_be_aligned_counts_nothing(rng):
    # Three frames hold three different pieces, but not two equal ones in a row with a third.
    fits, repeats, empty = [2, 3, 4], [2, 2, 3], []
    batch = speech_batch(rng, [640 * 3, 640 * 3, 0], [fits, repeats, empty])
    objective = CTCObjective(ConformerEncoder(ENCODER), vocab_size=8)
    variables = initialise(objective, batch)
    both = sums_of(objective, variables, batch)
    alone = sums_of(objective, variables, {name: array[:1] for name, array in batch.items()})
    np.testing.assert_allclose(both[0], alone[0], rtol=1e-5)
    assert float(both[1]) == 3
    assert [float(value) for value in both[2]["unalignable"]] == [1, 2]
    grads = gradients_of(objective, variables, batch)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_frames_needed_is_the_shortest_alignment(rng):
    labels = rng.integers(1, 3, (20, 5))
    counts = rng.integers(0, 6, 20)
    valid = np.arange(5) < counts[:, None]
    expected = [
        n + sum(a == b for a, b in itertools.pairwise(row[:n])) for row, n in zip(labels, counts, strict=True)
    ]
    np.testing.assert_array_equal(frames_needed(jnp.asarray(labels), jnp.asarray(valid)), expected)


def test_greedy_labels_collapse(rng):
    best = rng.integers(0, 4, (6, 15))
    lengths = rng.integers(0, 16, 6)
    speech = np.arange(15) < lengths[:, None]
    found = np.asarray(greedy_labels(jax.nn.one_hot(best, 4), jnp.asarray(speech)))
    for row, n, labels in zip(best, lengths, found, strict=True):
        expected = [piece for piece, _ in itertools.groupby(row[:n].tolist()) if piece]
        assert labels.tolist() == expected + [0] * (15 - len(expected))


def test_spec_augment_is_drawn_from_the_step_key(rng):
    batch = speech_batch(rng, [SAMPLES, SAMPLES], [[2], [3]])
    plain = CTCObjective(ConformerEncoder(ENCODER), vocab_size=8)
    augmented = CTCObjective(ConformerEncoder(ENCODER), 8, SpecAugmentConfig(mel_mask_bins=8))
    variables = initialise(plain, batch)
    first, again, other = (float(sums_of(augmented, variables, batch, seed)[0]) for seed in (1, 1, 2))
    assert first == again != other
    transcripts = [jax.jit(o.transcribe)(variables["params"], batch) for o in (plain, augmented)]
    np.testing.assert_array_equal(*transcripts)


# BEST-RQ

RQ = BestRQConfig(codebooks=3, codes=32, code_dim=8, mask_start=0.05, mask_frames=8)


def test_best_rq_learns_its_codes(rng):
    batch = speech_batch(rng, [SAMPLES, 640 * 9, 640 * 7 + 13], [[2]] * 3)
    objective = BestRQObjective(ConformerEncoder(ENCODER), RQ)
    variables = initialise(objective, batch)
    assert sorted(variables["params"]) == ["encoder", "heads"]
    assert sorted(variables["frozen"]) == ["codebook", "projection"]
    step = jax.jit(
        jax.value_and_grad(lambda p, frozen, batch, key: _mean(objective.loss(p, frozen, batch, key)))
    )
    params, losses = variables["params"], []
    for number in range(30):
        loss, grads = step(params, variables["frozen"], batch, jax.random.key(number))
        losses.append(float(loss))
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)
    assert abs(losses[0] - np.log(RQ.codes)) < 1.5
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3


def _mean(sums):
    return sums[0] / jnp.maximum(sums[1], 1.0)


def test_the_quantizer_knows_its_own_seed_alone(rng):
    batch = speech_batch(rng, [SAMPLES], [[2]])
    first, second = (
        initialise(BestRQObjective(ConformerEncoder(ENCODER), RQ), batch, seed) for seed in (1, 2)
    )
    jax.tree.map(np.testing.assert_array_equal, first["frozen"], second["frozen"])
    assert np.abs(first["params"]["heads"] - second["params"]["heads"]).max() > 0
    other = dataclasses.replace(RQ, quantizer_seed=1)
    third = initialise(BestRQObjective(ConformerEncoder(ENCODER), other), batch, 1)
    assert np.abs(first["frozen"]["codebook"] - third["frozen"]["codebook"]).max() > 0


def test_codes_are_nearest_by_cosine(rng):
    batch = speech_batch(rng, [SAMPLES], [[2]])
    objective = BestRQObjective(ConformerEncoder(ENCODER), RQ)
    frozen = initialise(objective, batch)["frozen"]
    stacked = rng.normal(size=(1, 1, 6, 4 * 16)).astype(np.float32)
    found = best_rq.nearest_codes(jnp.asarray(stacked), frozen["projection"], frozen["codebook"])
    for frame, book in itertools.product(range(6), range(RQ.codebooks)):
        vector = stacked[0, 0, frame] @ np.asarray(frozen["projection"][book])
        codes = np.asarray(frozen["codebook"][book])
        cosine = codes @ vector / np.linalg.norm(codes, axis=1) / np.linalg.norm(vector)
        assert found[0, 0, frame, book] == cosine.argmax()


def test_span_masks_start_at_the_rate_and_stay_inside_their_segment(rng):
    ids = np.repeat(rng.permutation([1, 2, 0, 3, 0]), rng.integers(1, 300, 5))[None, None]
    mask = np.asarray(best_rq.span_mask(jax.random.key(int(rng.integers(2**31))), jnp.asarray(ids), 0.05, 10))
    assert not mask[ids == 0].any()
    sure = np.asarray(best_rq.span_mask(jax.random.key(0), jnp.asarray(ids), 1.1, 10))
    np.testing.assert_array_equal(sure, ids > 0)
    long = jnp.ones((1, 1, 200_000), jnp.int32)
    share = float(jnp.mean(best_rq.span_mask(jax.random.key(int(rng.integers(2**31))), long, 0.01, 40)))
    assert share == pytest.approx(1 - 0.99**40, abs=0.02)
    # A lone start masks exactly its span.
    one = np.asarray(best_rq.span_mask(jax.random.key(3), jnp.ones((1, 1, 4000), jnp.int32), 0.0005, 40))[
        0, 0
    ]
    runs = [len(list(run)) for value, run in itertools.groupby(one[:-40].tolist()) if value]
    assert all(run >= 40 for run in runs)


def test_statistics_are_those_of_each_utterance(rng):
    mel = rng.normal(3.0, 2.0, (1, 1, 40, 5)).astype(np.float32)
    first, second = int(rng.integers(5, 15)), int(rng.integers(5, 15))
    segments = np.array([[[[1, 0, first * 160 - 3], [2, 20 * 160, second * 160], [0, 0, 0]]]], np.int32)
    mean, std = best_rq.segment_statistics(jnp.asarray(mel), jnp.asarray(segments), 160)
    for start, frames in ((0, first), (20, second)):
        part = mel[0, 0, start : start + frames]
        np.testing.assert_allclose(
            mean[0, 0, start : start + frames], [part.mean(axis=0)] * frames, rtol=1e-4
        )
        np.testing.assert_allclose(
            std[0, 0, start : start + frames], [np.sqrt(part.var(axis=0) + 1e-5)] * frames, rtol=1e-3
        )
    assert (np.asarray(mean)[0, 0, first:20] == 0).all()
