"""SeqIO preprocessors: from the fields of a manifest to token ids.

Prompts are data: templates such as `"Transcribe the {language_name} speech: {speech}"`, where `{field}`
is a field of the reference and the literal `{speech}` is the place of the speech. Random numbers come
from SeqIO's map seeds alone, so that the same seed gives the same tokens on every machine.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seqio

from slm_jax.data.host_tensorflow import Dataset, Tensor, tf
from slm_jax.data.references import SPEECH
from slm_jax.errors import UserError, nearest

Example = dict[str, Tensor]
Features = Mapping[str, Any]  # of seqio.Feature

SPEECH_MARKER = "{speech}"

LANGUAGE_NAMES = {
    "af": "Afrikaans", "am": "Amharic", "ar": "Arabic", "as": "Assamese", "ast": "Asturian",
    "az": "Azerbaijani", "ba": "Bashkir", "be": "Belarusian", "bg": "Bulgarian", "bn": "Bengali",
    "br": "Breton", "bs": "Bosnian", "ca": "Catalan", "ceb": "Cebuano", "ckb": "Central Kurdish",
    "cs": "Czech", "cv": "Chuvash", "cy": "Welsh", "da": "Danish", "de": "German", "dv": "Dhivehi",
    "el": "Greek", "en": "English", "eo": "Esperanto", "es": "Spanish", "et": "Estonian", "eu": "Basque",
    "fa": "Persian", "ff": "Fula", "fi": "Finnish", "fil": "Filipino", "fr": "French", "fy": "Frisian",
    "ga": "Irish", "gl": "Galician", "gu": "Gujarati", "ha": "Hausa", "he": "Hebrew", "hi": "Hindi",
    "hr": "Croatian", "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian", "ig": "Igbo",
    "is": "Icelandic", "it": "Italian", "ja": "Japanese", "jv": "Javanese", "ka": "Georgian",
    "kab": "Kabyle", "kam": "Kamba", "kea": "Kabuverdianu", "kk": "Kazakh", "km": "Khmer",
    "kn": "Kannada", "ko": "Korean", "ky": "Kyrgyz", "la": "Latin", "lb": "Luxembourgish",
    "lg": "Luganda", "ln": "Lingala", "lo": "Lao", "lt": "Lithuanian", "luo": "Luo", "lv": "Latvian",
    "mi": "Maori", "mk": "Macedonian", "ml": "Malayalam", "mn": "Mongolian", "mr": "Marathi",
    "ms": "Malay", "mt": "Maltese", "my": "Burmese", "nb": "Norwegian Bokmål", "ne": "Nepali",
    "nl": "Dutch", "nn": "Norwegian Nynorsk", "no": "Norwegian", "nso": "Northern Sotho", "ny": "Nyanja",
    "oc": "Occitan", "om": "Oromo", "or": "Odia", "pa": "Punjabi", "pl": "Polish", "ps": "Pashto",
    "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "rw": "Kinyarwanda", "sd": "Sindhi",
    "si": "Sinhala", "sk": "Slovak", "sl": "Slovenian", "sn": "Shona", "so": "Somali", "sq": "Albanian",
    "sr": "Serbian", "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "tg": "Tajik",
    "th": "Thai", "tk": "Turkmen", "tr": "Turkish", "tt": "Tatar", "ug": "Uyghur", "uk": "Ukrainian",
    "umb": "Umbundu", "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese", "wo": "Wolof", "xh": "Xhosa",
    "yo": "Yoruba", "yue": "Cantonese", "zh": "Chinese", "zu": "Zulu",
}  # fmt: skip


def templates_fingerprint(templates: Sequence[str]) -> str:
    """Returns the SHA-256 of prompt templates, in their order."""
    return hashlib.sha256(json.dumps(list(templates), ensure_ascii=False).encode()).hexdigest()


def template_fields(template: str) -> list[str]:
    """Returns the fields that a template reads, in their order; `speech` is the marker.

    Raises:
      UserError: the braces do not match, a field is not named, or `{speech}` stands twice.
    """
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise UserError(f"prompt template {template!r}: {error}") from None
    if "" in fields:
        raise UserError(f"prompt template {template!r}: braces are empty, expected a field such as {{text}}")
    if fields.count("speech") > 1:
        raise UserError(f"prompt template {template!r}: {SPEECH_MARKER} stands twice, expected once at most")
    return fields


def _check_templates(templates: Sequence[str], dataset: Dataset) -> None:
    # Here and not in a mapped function, from which TensorFlow would return the error as pages of text.
    known = {name for name, spec in dataset.element_spec.items() if spec.dtype == tf.string} | {"speech"}
    for template in templates:
        for field in template_fields(template):
            if field not in known:
                raise UserError(f"prompt template {template!r} reads field {field!r}{nearest(field, known)}")


def _pick(id_: Tensor, count: int, salt: str) -> Tensor:
    # FarmHash Fingerprint64: the same on every platform and in every version of TensorFlow.
    return tf.strings.to_hash_bucket_fast(tf.strings.join([salt, id_], "\n"), count)


def _render(template: str, example: Mapping[str, Tensor]) -> Tensor:
    parts: list[Tensor] = []
    for literal, field, _, _ in string.Formatter().parse(template):
        parts.append(tf.constant(literal))
        if field is not None:
            if field not in example:
                raise UserError(
                    f"prompt template {template!r} reads field {field!r}{nearest(field, example)}"
                )
            parts.append(example[field])
    return tf.strings.join(parts) if parts else tf.constant("")


def add_language_names(dataset: Dataset) -> Dataset:
    """Adds `language_name`, the English name of `language`; an unlisted code stands for itself."""
    table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(list(LANGUAGE_NAMES), list(LANGUAGE_NAMES.values())), ""
    )

    def add(example: Example) -> Example:
        name = table.lookup(example["language"])
        return example | {"language_name": tf.where(name == "", example["language"], name)}

    return dataset.map(add, num_parallel_calls=tf.data.AUTOTUNE)


def reject_languages(dataset: Dataset, *, languages: Sequence[str]) -> Dataset:
    """Marks examples of other languages with the reason `unknown_language`; the index counts them.

    A reason that an example has already, from its source, stays.
    """
    known = tf.constant(list(languages))

    def check(example: Example) -> Example:
        reason = tf.where(tf.reduce_any(example["language"] == known), "", "unknown_language")
        earlier = example.get("reject", tf.constant(""))
        return example | {"reject": tf.where(earlier == "", reason, earlier)}

    return dataset.map(check, num_parallel_calls=tf.data.AUTOTUNE)


def repeat(dataset: Dataset, *, times: int) -> Dataset:
    """Repeats each example `times` times under the ids `<id>#0`, `<id>#1`, ..., so that noise differs."""

    def variants(example: Example) -> Dataset:
        def variant(index: Tensor) -> Example:
            return example | {"id": tf.strings.join([example["id"], tf.strings.as_string(index)], "#")}

        return tf.data.Dataset.range(times).map(variant)

    return dataset.flat_map(variants)


def anonymous_templates(templates: Sequence[str]) -> list[int]:
    """Returns which templates a reference of unknown language can have, where others name its language."""
    anonymous = [
        number for number, some in enumerate(templates) if "language_name" not in template_fields(some)
    ]
    return anonymous if len(anonymous) < len(templates) else []


def check_prompts(templates: Sequence[str], target: str, salt: str, speech: str) -> None:
    """Raises UserError unless there are templates, and `{speech}` stands in no text; as `render_prompts`."""
    if not templates:
        raise UserError(f"task {salt!r} has no prompt templates, expected at least one")
    for template in (target, speech) if speech != SPEECH_MARKER else (target,):
        if "speech" in template_fields(template):
            raise UserError(
                f"task {salt!r}: template {template!r} holds {SPEECH_MARKER}, expected text alone"
            )


def render_prompts(
    dataset: Dataset,
    *,
    templates: Sequence[str],
    target: str,
    salt: str,
    speech: str = SPEECH_MARKER,
) -> Dataset:
    """Renders prompt and target as text.

    Args:
      dataset: references with string fields.
      templates: one of them is chosen by a hash of `salt` and the example's id; where `language_name` is
        empty, one without that field, if there is any.
      target: template of the target, such as `{text}`.
      salt: makes the choice differ between tasks; the task's name.
      speech: what stands at the marker: the speech itself (`{speech}`), or, for a text-only task, a
        template such as `{text}`.

    Returns:
      Examples with `prompt_before`, `prompt_speech` and `prompt_after`, a bool `prompt_has_speech`,
      and the whole `inputs_pretokenized` and `targets_pretokenized`.

    Raises:
      UserError: a template is malformed or names a field that the manifest does not have.
    """
    check_prompts(templates, target, salt, speech)
    text_only = speech != SPEECH_MARKER
    _check_templates((*templates, target, speech), dataset)
    halves = [template.partition(SPEECH_MARKER) for template in templates]
    markers = [bool(marker) for _, marker, _ in halves]
    anonymous = anonymous_templates(templates)

    def render(example: Example) -> Example:
        choice = _pick(example["id"], len(templates), salt)
        if anonymous:
            other = tf.constant(anonymous, choice.dtype)[_pick(example["id"], len(anonymous), salt)]
            choice = tf.where(example["language_name"] == "", other, choice)
        before = tf.stack([_render(half[0], example) for half in halves])[choice]
        after = tf.stack([_render(half[2], example) for half in halves])[choice]
        marked = tf.constant(markers)[choice]
        said = tf.where(marked, _render(speech, example) if text_only else SPEECH_MARKER, "")
        return example | {
            "prompt_before": before,
            "prompt_speech": said,
            "prompt_after": after,
            "prompt_has_speech": tf.logical_and(marked, not text_only),
            "inputs_pretokenized": tf.strings.join([before, said, after]),
            "targets_pretokenized": tf.strings.strip(_render(target, example)),
        }

    return dataset.map(render, num_parallel_calls=tf.data.AUTOTUNE)


def tokenize_prompts(
    dataset: Dataset,
    output_features: Features,
    *,
    targets_eos: bool = True,
) -> Dataset:
    """Tokenises what `render_prompts` wrote.

    Text before and after the speech is tokenised apart, as at inference. Adds `inputs` (int32; `SPEECH`
    at the marker; EOS at the end), `targets` (int32, with EOS; empty where there is no text), and
    `inputs_speech`, a bool for each input token that says whether it stands for what was spoken.
    """
    vocabulary = output_features["inputs"].vocabulary
    target_vocabulary = output_features["targets"].vocabulary

    def tokenize(example: Example) -> Example:
        example = dict(example)
        before, written, after = (
            vocabulary.encode_tf(example.pop(f"prompt_{part}")) for part in ("before", "speech", "after")
        )
        said = tf.cond(example.pop("prompt_has_speech"), lambda: tf.constant([SPEECH]), lambda: written)
        targets = target_vocabulary.encode_tf(example["targets_pretokenized"])
        if targets_eos:
            eos = tf.fill([tf.cast(tf.size(targets) > 0, tf.int32)], target_vocabulary.eos_id)
            targets = tf.concat([targets, eos], 0)
        is_speech = [tf.zeros_like(before), tf.ones_like(said), tf.zeros_like(after), [0]]
        example["inputs"] = tf.concat([before, said, after, [vocabulary.eos_id]], 0)
        example["inputs_speech"] = tf.cast(tf.concat(is_speech, 0), tf.bool)
        example["targets"] = targets
        return example

    return dataset.map(tokenize, num_parallel_calls=tf.data.AUTOTUNE)


def prompt_tokens(vocabulary: seqio.Vocabulary, prompt: str) -> np.ndarray:
    """Returns the `inputs` of a prompt typed by a user: int32 [n] with `SPEECH` at the marker, and EOS.

    Args:
      vocabulary: of the LLM's encoder.
      prompt: text; without `{speech}` the speech follows it.

    Raises:
      UserError: `{speech}` stands more than once.
    """
    if prompt.count(SPEECH_MARKER) > 1:
        raise UserError(f"prompt {prompt!r}: {SPEECH_MARKER} stands more than once, expected once at most")
    before, _, after = prompt.partition(SPEECH_MARKER)
    tokens = [*vocabulary.encode(before), SPEECH, *vocabulary.encode(after), vocabulary.eos_id]
    return np.array(tokens, np.int32)


def token_noise(
    dataset: Dataset,
    output_features: Features,
    *,
    drop: float = 0.0,
    double: float = 0.0,
    unknown: float = 0.0,
    replace: float = 0.0,
) -> Dataset:
    """Makes the transcript in `inputs` as unreliable as an adapter's output.

    Args:
      dataset: tokenised examples; where they hold `inputs_speech`, only tokens that stand for what was
        spoken are touched. The marker, EOS and sentinels never are.
      output_features: SeqIO's.
      drop: share of tokens left out.
      double: share of tokens written twice.
      unknown: share of tokens replaced by the unknown token.
      replace: share of tokens replaced by any piece of the vocabulary.

    Raises:
      UserError: the shares are negative or add up to more than 1.
    """
    rates = np.array([drop, double, unknown, replace])
    if (rates < 0).any() or rates.sum() > 1:
        raise UserError(f"token noise rates {rates.tolist()} must not be negative nor add up to more than 1")
    ends = np.cumsum(rates).tolist()
    vocabulary = output_features["inputs"].vocabulary
    protected = tf.constant([SPEECH, vocabulary.eos_id, *sentinel_ids(vocabulary, required=False)])
    # Pieces that a transcript may hold: the specials before them are padding, EOS and unknown.
    lowest = max(vocabulary.eos_id, vocabulary.unk_id, vocabulary.pad_id) + 1

    @seqio.map_over_dataset(num_seeds=2)
    def noise(example: Example, seeds: Sequence[Tensor]) -> Example:
        tokens = example["inputs"]
        kept = tf.reduce_any(tokens[:, None] == protected, -1)
        speech = example.get("inputs_speech")
        if speech is not None:
            kept |= ~speech
        draw = tf.random.stateless_uniform(tf.shape(tokens), seeds[0])
        draw = tf.where(kept, 1.0, draw)
        other = tf.random.stateless_uniform(
            tf.shape(tokens), seeds[1], lowest, vocabulary.vocab_size - vocabulary.extra_ids, dtype=tf.int32
        )
        is_unknown = (draw >= ends[1]) & (draw < ends[2])
        is_other = (draw >= ends[2]) & (draw < ends[3])
        tokens = tf.where(is_unknown, vocabulary.unk_id, tf.where(is_other, other, tokens))
        times = tf.where(draw < ends[0], 0, tf.where(draw < ends[1], 2, 1))
        noisy = example | {"inputs": tf.repeat(tokens, times)}
        if speech is not None:
            noisy["inputs_speech"] = tf.repeat(speech, times)
        return noisy

    return noise(dataset)  # pyright: ignore[reportCallIssue]  # SeqIO fills in the seeds


def sentinel_ids(vocabulary: seqio.Vocabulary, required: bool = True) -> list[int]:
    """Returns the ids of the sentinels `<extra_id_0>`, `<extra_id_1>`, ... in their order.

    They are SeqIO's extra ids where the vocabulary has them, otherwise pieces of those names.

    Raises:
      UserError: there are fewer than two, and they are required.
    """
    ids: list[int] = []
    if vocabulary.extra_ids:
        ids = [vocabulary.vocab_size - 1 - i for i in range(vocabulary.extra_ids)]
    else:
        tokenizer = vocabulary.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        while (found := tokenizer.piece_to_id(f"<extra_id_{len(ids)}>")) != vocabulary.unk_id:
            ids.append(found)
    if required and len(ids) < 2:
        raise UserError(
            f"span corruption: the vocabulary has {len(ids)} sentinels <extra_id_0>, <extra_id_1>, ..., "
            "expected at least 2; set extra_ids"
        )
    return ids


def span_corruption(
    dataset: Dataset,
    output_features: Features,
    *,
    text: str = "{text}",
    noise_density: float = 0.15,
    mean_span_length: float = 3.0,
) -> Dataset:
    """T5's span corruption (Raffel et al. 2020): spans become sentinels, the target names what they were.

    Args:
      dataset: references with string fields.
      output_features: SeqIO's.
      text: template of the text to corrupt.
      noise_density: share of tokens that are corrupted, at least one.
      mean_span_length: mean length of a corrupted span in tokens.

    Returns:
      Examples with `inputs` and `targets`, int32 with EOS; both empty where there are fewer than 2 tokens.

    Raises:
      UserError: the vocabulary has no sentinels.
    """
    vocabulary = output_features["inputs"].vocabulary
    sentinels = tf.constant(sentinel_ids(vocabulary), tf.int32)
    _check_templates([text], dataset)

    @seqio.map_over_dataset(num_seeds=3)
    def corrupt(example: Example, seeds: Sequence[Tensor]) -> Example:
        rendered = tf.strings.strip(_render(text, example))
        tokens = vocabulary.encode_tf(rendered)
        noisy = _noise_mask(tf.size(tokens), noise_density, mean_span_length, tf.size(sentinels), seeds)
        usable = tf.size(tokens) >= 2
        eos = tf.fill([tf.cast(usable, tf.int32)], vocabulary.eos_id)
        tokens = tokens[: tf.where(usable, tf.size(tokens), 0)]
        noisy = noisy[: tf.size(tokens)]
        inputs, targets = _spans_to_sentinels(tokens, noisy, sentinels)
        return example | {
            "inputs_pretokenized": rendered,
            "targets_pretokenized": rendered,
            "inputs": tf.concat([inputs, eos], 0),
            "targets": tf.concat([targets, eos], 0),
        }

    return corrupt(dataset)  # pyright: ignore[reportCallIssue]  # SeqIO fills in the seeds


def _noise_mask(
    length: Tensor,
    density: float,
    mean_span: float,
    most_spans: Tensor,
    seeds: Sequence[Tensor],
) -> Tensor:
    """Returns a bool for each token; spans of kept and corrupted tokens alternate.

    The mask is rolled by a random offset: a short text has one span, which would always be its end.
    """
    length = tf.maximum(length, 2)
    noise = tf.cast(tf.round(tf.cast(length, tf.float32) * density), tf.int32)
    noise = tf.clip_by_value(noise, 1, length - 1)
    kept = length - noise
    spans = tf.cast(tf.round(tf.cast(noise, tf.float32) / mean_span), tf.int32)
    # Each span needs a corrupted token, a kept one and a sentinel; rolling may cut one span in two.
    spans = tf.maximum(1, tf.minimum(tf.minimum(spans, most_spans - 1), tf.minimum(noise, kept)))
    lengths = tf.stack([_segment(kept, spans, seeds[0]), _segment(noise, spans, seeds[1])], 1)
    starts_noise = tf.tile([False, True], [spans])
    mask = tf.repeat(starts_noise, tf.reshape(lengths, [-1]))
    return tf.roll(mask, tf.random.stateless_uniform([], seeds[2], 0, length, dtype=tf.int32), 0)


def _segment(total: Tensor, parts: Tensor, seed: Tensor) -> Tensor:
    """Splits `total` into `parts` positive lengths, each way equally likely."""
    order = tf.argsort(tf.random.stateless_uniform([total - 1], seed))
    cuts = tf.sort(order[: parts - 1]) + 1
    edges = tf.concat([[0], cuts, [total]], 0)
    return edges[1:] - edges[:-1]


def _spans_to_sentinels(tokens: Tensor, noisy: Tensor, sentinels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns inputs, where each noisy run is one sentinel, and targets, where its tokens follow it."""
    before = tf.concat([[False], noisy[:-1]], 0)[: tf.size(noisy)]
    starts = noisy & ~before
    number = tf.maximum(tf.cumsum(tf.cast(starts, tf.int32)) - 1, 0)
    named = tf.gather(sentinels, number)
    inputs = tf.boolean_mask(tf.where(starts, named, tokens), starts | ~noisy)
    targets = tf.boolean_mask(tf.stack([named, tokens], 1), tf.stack([starts, noisy], 1))
    return inputs, targets
