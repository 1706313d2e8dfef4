"""Prompts in the language of the speech: templates by language, and the names of languages in each.

`name_languages` settles the language of the prompt and names that of the speech in it; `choose_prompts`
then writes the text before and after the speech, for `preprocessors.render_prompts` to join as
`PROMPT_TEMPLATE`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from slm_jax.data.columnwise import Columns, buckets, check_fields, over_columns, rendered, texts
from slm_jax.data.host_tensorflow import Dataset
from slm_jax.data.preprocessors import SPEECH_MARKER, anonymous_templates, template_fields
from slm_jax.errors import UserError

# What `render_prompts` makes of the fields that `choose_prompts` adds; the second where no prompt has speech.
PROMPT_TEMPLATE = "{prompt_head}{speech}{prompt_tail}"
TEXT_PROMPT_TEMPLATE = "{prompt_head}"


def name_languages(dataset: Dataset, *, names: Mapping[str, Mapping[str, str]]) -> Dataset:
    """Adds `prompt_language`, and `language_name`, the name of `language` in it.

    Args:
      dataset: references with the field `language`.
      names: language of the prompt -> code -> name. The prompt is in the language of the speech, or in the
        first of these where that is none of them. A code without a name stands for itself; of `pt-BR`,
        `pt` counts where the whole has no name.
    """
    step = functools.partial(name_languages_on_columns, names=names)
    return over_columns(dataset, step, strings=["prompt_language", "language_name"])


def name_languages_on_columns(columns: Columns, *, names: Mapping[str, Mapping[str, str]]) -> Columns:
    """`name_languages` on columns."""
    spoken = texts(columns, "language")
    first = next(iter(names))
    asked = {code: code if code in names else base_code(code) for code in set(spoken)}
    prompts = {code: found if found in names else first for code, found in asked.items()}
    named = {code: language_name(code, names[prompts[code]]) for code in prompts}
    return columns | {
        "prompt_language": np.array([prompts[code] for code in spoken], object),
        "language_name": np.array([named[code] for code in spoken], object),
    }


def base_code(code: str) -> str:
    """Returns the language of a code with a region or script: `pt` of `pt-BR` or `pt_br`."""
    return code.replace("_", "-").partition("-")[0].lower()


def language_name(code: str, names: Mapping[str, str]) -> str:
    """Returns the name of a language; a code without one stands for itself."""
    return names.get(code) or names.get(base_code(code)) or code


def choose_prompts(dataset: Dataset, *, templates: Mapping[str, Sequence[str]], salt: str) -> Dataset:
    """Adds `prompt_head` and `prompt_tail`, the text before and after the speech.

    Args:
      dataset: references with string fields, `prompt_language` among them.
      templates: language of the prompt -> templates; one of them is chosen by a hash of `salt` and the
        example's id. Where `language_name` is empty, it is one without that field, if there is any.
      salt: makes the choice differ between tasks; the task's name.

    Raises:
      UserError: a template is malformed, names a field that the references lack, or some have a place for
        speech and some have none.
    """
    every = [template for some in templates.values() for template in some]
    has_speech(every, f"task {salt!r}")
    for template in every:
        fields = [field for field in template_fields(template) if field != "speech"]
        check_fields(dataset, fields, f"prompt template {template!r}")
    step = functools.partial(choose_prompts_on_columns, templates=templates, salt=salt)
    return over_columns(dataset, step, strings=["prompt_head", "prompt_tail"])


def choose_prompts_on_columns(
    columns: Columns, *, templates: Mapping[str, Sequence[str]], salt: str
) -> Columns:
    """`choose_prompts` on columns."""
    heads, tails = (np.full(len(columns["id"]), "", object) for _ in range(2))
    for language, some in templates.items():
        (here,) = np.nonzero(columns["prompt_language"] == language)
        # A reference of unknown language has none of the prompts that name it, where there are others.
        anonymous = [some[number] for number in anonymous_templates(some)] or some
        nameless = texts(columns, "language_name")[here] == ""
        for rows_here, choice in ((here[~nameless], some), (here[nameless], anonymous)):
            chosen = buckets(salt, columns["id"][rows_here], len(choice))
            for number, template in enumerate(choice):
                rows = rows_here[chosen == number]
                head, _, tail = template.partition(SPEECH_MARKER)
                heads[rows], tails[rows] = rendered(head, columns, rows), rendered(tail, columns, rows)
    return columns | {"prompt_head": heads, "prompt_tail": tails}


def has_speech(templates: Sequence[str], where: str) -> bool:
    """Returns whether the templates have a place for speech; raises UserError where only some do."""
    marked = {SPEECH_MARKER in template: template for template in templates}
    if len(marked) > 1:
        raise UserError(
            f"{where}: prompt template {marked[False]!r} has no {SPEECH_MARKER} and {marked[True]!r} has, "
            "expected all or none where the prompt follows the language of the speech"
        )
    return True in marked
