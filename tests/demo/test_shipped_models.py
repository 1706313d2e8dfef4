"""The shipped foundation models: small, whole, names and vocabularies frozen, and a T5 that is any good."""

import functools
import json
import random
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from slm_jax.checkpoints.fingerprints import fingerprint
from slm_jax.checkpoints.foundation import load_foundation, read_foundation
from slm_jax.cli.wiring import architecture
from slm_jax.decoding.greedy import greedy_decode_encoded
from slm_jax.demo import corpus, foundation, names, prompts, vocabulary
from slm_jax.models import conformer, t5

FOLDER = Path(foundation.directory())
KINDS = {"speech_encoder": ("conformer", conformer.preset("tiny")), "llm": ("t5", t5.preset("tiny"))}


def abstract(part: str):
    """Names and shapes as the code has them now."""
    if part == "llm":
        model = t5.T5(KINDS[part][1])
        tokens = jnp.ones((1, 4), jnp.int32)
        init = functools.partial(model.init, jax.random.key(0), tokens, tokens, tokens, tokens)
    else:
        encoder = conformer.ConformerEncoder(KINDS[part][1])
        segments = jnp.array([[[[1, 0, 6400]]]])
        init = functools.partial(
            encoder.init, jax.random.key(0), jnp.zeros((1, 1, 6400), jnp.int16), segments
        )
    return nn.unbox(jax.eval_shape(init))["params"]


@pytest.mark.parametrize("part", KINDS)
def test_each_is_whole_and_fits_its_preset(part):
    kind, config = KINDS[part]
    known, defaults = architecture(config), architecture(type(config)())
    params = load_foundation(FOLDER / part, kind, abstract(part), config=known, defaults=defaults)
    assert fingerprint(params) == read_foundation(FOLDER / part).fingerprint
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert jax.tree.structure(params) == jax.tree.structure(abstract(part))


def test_all_of_it_is_at_most_8_mb():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 8_000_000


@pytest.mark.parametrize("part", KINDS)
def test_provenance_says_by_what_it_was_made_and_no_place_of_a_machine(part):
    provenance = read_foundation(FOLDER / part).provenance
    assert {"jax", "flax", "optax"} <= provenance["packages"].keys()
    assert "TRAIN_STEPS" in provenance["config"] and "demo_" in provenance["config"]
    assert not re.search(r"['\"](/|[A-Z]:\\)", json.dumps(provenance))


def test_the_shipped_vocabularies_are_those_of_the_default_corpus_byte_for_byte(tmp_path):
    said = corpus.draw("train", corpus.preset("default").text, corpus.preset("default").seed)
    built = vocabulary.build_vocabularies(tmp_path, said)
    shipped = vocabulary.shipped()
    assert built.text.read_bytes() == shipped.text.read_bytes()
    assert built.ctc.read_bytes() == shipped.ctc.read_bytes()


def answers_of_the_t5(asked: list[str]) -> list[str]:
    """What the shipped T5 answers, greedily."""
    model = t5.T5(t5.preset("tiny"))
    params = load_foundation(FOLDER / "llm", "t5", abstract("llm"), dtype="float32")
    pieces: Any = sentencepiece.SentencePieceProcessor()
    pieces.LoadFromFile(str(vocabulary.shipped().text))
    tokens = np.zeros((len(asked), 48), np.int32)
    for row, text in enumerate(asked):
        ids = [*pieces.encode(text), vocabulary.EOS_ID]
        tokens[row, : len(ids)] = ids

    @jax.jit
    def answer(params, tokens, segments):
        encoded: Any = model.apply(
            {"params": params}, tokens, segments, method=lambda m, t, s: m.encode(m.embed(t), s)
        )
        return greedy_decode_encoded(model, {"params": params}, encoded, segments, max_tokens=32)

    answered = answer(params, tokens, (tokens > 0).astype(np.int32))
    return [pieces.decode([int(token) for token in row if token > vocabulary.EOS_ID]) for row in answered]


def test_the_t5_repeats_and_translates_what_it_never_read():
    """Unseen sentences, dev's: nine of ten come back word for word, in each language."""
    asked, expected = [], []
    for sentence in corpus.draw("dev", 40, 0):
        for prompt, target in (
            (prompts.ASR[0], sentence.text),
            (prompts.AST[0].replace("{target_language}", "German"), sentence.translations["de"]),
            (prompts.AST[0].replace("{target_language}", "Spanish"), sentence.translations["es"]),
        ):
            asked.append(prompt.replace("{speech}", sentence.text))
            expected.append(target)
    right = np.array([a == b for a, b in zip(answers_of_the_t5(asked), expected, strict=True)])
    assert (right.reshape(-1, 3).mean(axis=0) >= 0.9).all(), right.reshape(-1, 3).mean(axis=0)


def test_the_t5_spells_names_that_it_never_read():
    """Invented names of dev, each in a list of three: six of ten are written as they are."""
    others = names.invented_names("dev", 80)
    said = corpus.draw_named("dev", 80, 0)
    asked = [
        prompts.NAMES[number % 2]
        .replace("{phrases}", names.listed(sentence.slots["person"], others, random.Random(number)))
        .replace("{speech}", sentence.text)
        for number, sentence in enumerate(said)
    ]
    answers = answers_of_the_t5(asked)
    right = [s.slots["person"] in answer.split() for s, answer in zip(said, answers, strict=True)]
    assert np.mean(right) >= 0.6, np.mean(right)
