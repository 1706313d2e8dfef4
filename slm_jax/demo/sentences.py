"""Parallel template sentences about travel and home, with slots that questions can ask for.

A sentence is in the normal form of `normalize`. Whether it belongs to train, dev or test is decided by a hash
of its slot values alone, so no combination of values is shared between splits, in whatever template.
"""

import dataclasses
import functools
import hashlib
import math
import random
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

from slm_jax.demo.lexicon import LEXICON, Value

LANGUAGES = ("en", "de", "es")
SPLITS = ("train", "dev", "test")
NO_ANSWER = "none"

# Rare, so that a model does not learn to say "none" when in doubt.
_NO_ANSWER_SHARE = 0.03
_SLOT = re.compile(r"\{(\w+)(?:\.(\w+))?\}")
# Tenths of all combinations of slot values, and of all invented names.
_TENTHS = {"test": (0,), "dev": (1,), "train": tuple(range(2, 10))}


@dataclasses.dataclass(frozen=True)
class Template:
    """A sentence with slots in three languages: `{city}` is the plain form, `{room.in}` another one."""

    en: str
    de: str
    es: str

    @property
    def kinds(self) -> tuple[str, ...]:
        """The slots in the order of the English sentence."""
        return tuple(match.group(1) for match in _SLOT.finditer(self.en))


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A filled template.

    Attributes:
      text: English.
      translations: German under `de`, Spanish under `es`.
      slots: kind -> the English value, in the order of the sentence.
    """

    text: str
    translations: Mapping[str, str]
    slots: Mapping[str, str]


# English, German, Spanish; a blank line between templates.
_TEMPLATE_TEXT = """
    the {vehicle} from {city} arrives at {time}
    {vehicle.nom} aus {city} kommt um {time} an
    {vehicle.the} de {city} llega {time.at}

    the {vehicle} leaves {city} at {time}
    {vehicle.nom} verlässt {city} um {time}
    {vehicle.the} sale de {city} {time.at}

    book {number} tickets to {city} for {day}
    buche {number} fahrkarten nach {city} für {day}
    reserva {number} billetes a {city} para el {day}

    {person} travels to {city} by {vehicle}
    {person} reist mit {vehicle.dat} nach {city}
    {person} viaja a {city} en {vehicle}

    on {day} it is {weather} in {city}
    am {day} ist es {weather} in {city}
    el {day} {weather} en {city}

    in {month} it is {weather} in {city}
    im {month} ist es {weather} in {city}
    en {month} {weather} en {city}

    please turn on the {object} in the {room}
    bitte schalte {object.acc} {room.in} ein
    por favor enciende {object.the} {room.of}

    turn off the {object} at {time}
    schalte {object.acc} um {time} aus
    apaga {object.the} {time.at}

    {person} forgot the {item} in the {room}
    {person} hat {item.acc} {room.in} vergessen
    {person} olvidó {item.the} {room.in}

    {person} paints the wall in the {room} {color}
    {person} streicht die wand {room.in} {color}
    {person} pinta la pared {room.of} de {color}

    {person} lives in {city} with my {relative}
    {person} wohnt mit {relative.dat} in {city}
    {person} vive en {city} con mi {relative}

    we meet {person} in front of the {place} at {time}
    wir treffen {person} um {time} vor {place.dat}
    encontramos a {person} delante {place.of} {time.at}

    {person} goes to the {place} on {day}
    {person} geht am {day} {place.to}
    {person} va {place.to} el {day}

    the {place} in {city} opens at {time}
    {place.nom} in {city} öffnet um {time}
    {place.the} de {city} abre {time.at}

    the {place} closes on {day} at {time}
    {place.nom} schließt am {day} um {time}
    {place.the} cierra el {day} {time.at}

    does the {place} in {city} open on {day}
    öffnet {place.nom} in {city} am {day}
    abre {place.the} de {city} el {day}

    {person} brings {food} on {day}
    {person} bringt am {day} {food} mit
    {person} trae {food} el {day}

    my {relative} would like {food} at {time}
    {relative.nom} möchte um {time} {food}
    mi {relative} quiere {food} {time.at}

    please bring {food} to the {room}
    bitte bring {food} {room.into}
    por favor lleva {food} {room.to}

    buy {number} {things} and {food}
    kaufe {number} {things} und {food}
    compra {number} {things} y {food}

    {person} needs {number} {things} on {day}
    {person} braucht am {day} {number} {things}
    {person} necesita {number} {things} el {day}

    the {item} costs {number} euros in {city}
    {item.nom} kostet in {city} {number} euro
    {item.the} cuesta {number} euros en {city}

    my {relative} bought the {item} in {city}
    {relative.nom} hat {item.acc} in {city} gekauft
    mi {relative} compró {item.the} en {city}

    the {item} in the {room} is {color}
    {item.nom} {room.in} ist {color}
    {item.the} {room.of} es de color {color}

    remind me to call {person} on {day} at {time}
    erinnere mich daran {person} am {day} um {time} anzurufen
    recuérdame llamar a {person} el {day} {time.at}

    wake me up on {day} at {time}
    wecke mich am {day} um {time}
    despiértame el {day} {time.at}

    set the heating in the {room} to {number} degrees
    stelle die heizung {room.in} auf {number} grad
    pon la calefacción {room.of} a {number} grados

    {person} was born in {city} in {month}
    {person} ist im {month} in {city} geboren
    {person} nació en {city} en {month}

    my {relative} flies to {city} in {month}
    {relative.nom} fliegt im {month} nach {city}
    mi {relative} vuela a {city} en {month}

    we stay in {city} for {number} days
    wir bleiben {number} tage in {city}
    nos quedamos {number} días en {city}

    we need {number} rooms in {city} from {day}
    wir brauchen ab {day} {number} zimmer in {city}
    necesitamos {number} habitaciones en {city} desde el {day}

    the {vehicle} to {city} is {number} minutes late
    {vehicle.nom} nach {city} hat {number} minuten verspätung
    {vehicle.the} a {city} lleva {number} minutos de retraso

    take the {vehicle} to the {place} at {time}
    nimm um {time} {vehicle.acc} {place.to}
    toma {vehicle.the} {place.to} {time.at}

    {person} cleans the {room} every {day}
    {person} putzt jeden {day} {room.acc}
    {person} limpia {room.the} todos los {day.every}

    my {relative} is waiting for {person} in the {room}
    {relative.nom} wartet {room.in} auf {person}
    mi {relative} espera a {person} {room.in}

    the {item} belongs to my {relative} from {city}
    {item.nom} gehört {relative.dat} aus {city}
    {item.the} es de mi {relative} de {city}

    put {number} {things} in the {room}
    stelle {number} {things} {room.into}
    pon {number} {things} {room.in}

    play music in the {room} until {time}
    spiele {room.in} bis {time} musik
    pon música {room.in} hasta {time.the}

    open the window in the {room} at {time}
    öffne um {time} das fenster {room.in}
    abre la ventana {room.of} {time.at}

    does the {object} in the {room} still work
    funktioniert {object.nom} {room.in} noch
    todavía funciona {object.the} {room.of}

    {person} repairs the {object} on {day}
    {person} repariert am {day} {object.acc}
    {person} repara {object.the} el {day}

    my {relative} sold the {object} for {number} euros
    {relative.nom} hat {object.acc} für {number} euro verkauft
    mi {relative} vendió {object.the} por {number} euros

    send the {item} to {person} in {city}
    schicke {item.acc} an {person} in {city}
    envía {item.the} a {person} en {city}

    the meeting with {person} is on {day} at {time}
    das treffen mit {person} ist am {day} um {time}
    la reunión con {person} es el {day} {time.at}

    {person} visits the {place} in {city}
    {person} besucht {place.acc} in {city}
    {person} visita {place.the} de {city}

    my {relative} serves {food} in the {room}
    {relative.nom} serviert {food} {room.in}
    mi {relative} sirve {food} {room.in}

    the trip with {person} to {city} begins in {month}
    die reise mit {person} nach {city} beginnt im {month}
    el viaje con {person} a {city} empieza en {month}
"""

TEMPLATES: tuple[Template, ...] = tuple(
    Template(*(line.strip() for line in block.strip().splitlines())) for block in _TEMPLATE_TEXT.split("\n\n")
)

QUESTIONS: Mapping[str, str] = {
    "city": "Which city is named?",
    "person": "Which person is named?",
    "relative": "Which relative is named?",
    "time": "Which time is named?",
    "day": "Which day is named?",
    "month": "Which month is named?",
    "number": "Which number is named?",
    "things": "Which things are named?",
    "food": "Which food is named?",
    "weather": "Which weather is named?",
    "color": "Which color is named?",
    "object": "Which device is named?",
    "room": "Which room is named?",
    "item": "Which object is named?",
    "place": "Which place is named?",
    "vehicle": "Which vehicle is named?",
}


def normalize(text: str) -> str:
    """Returns `text` in the corpus's normal form: NFC, lower case, letters, digits and single spaces only."""
    text = unicodedata.normalize("NFC", text).lower()
    return " ".join("".join(c if c.isalnum() else " " for c in text if c not in "'’").split())


def fill(template: Template, values: Mapping[str, Value]) -> Sentence:
    """Returns `template` with `values` (kind -> value) in its slots."""

    def form(match: re.Match, language: str) -> str:
        value = values[match.group(1)]
        return value.en if language == "en" else getattr(value, language)[match.group(2) or ""]

    text, de, es = (
        _SLOT.sub(lambda match, language=language: form(match, language), getattr(template, language))
        for language in LANGUAGES
    )
    return Sentence(text, {"de": de, "es": es}, {kind: values[kind].en for kind in template.kinds})


def renamed(sentence: Sentence, person: str) -> Sentence:
    """Returns the sentence about another person, whose name is the same in all languages."""
    old = sentence.slots["person"]

    def rename(text: str) -> str:
        return " ".join(person if word == old else word for word in text.split())

    return Sentence(
        rename(sentence.text),
        {language: rename(text) for language, text in sentence.translations.items()},
        {**sentence.slots, "person": person},
    )


@functools.cache
def words() -> frozenset[str]:
    """Returns every English word of the templates and the lexicon."""
    texts = [_SLOT.sub(" ", template.en) for template in TEMPLATES]
    texts += [value.en for values in LEXICON.values() for value in values]
    return frozenset(word for text in texts for word in text.split())


def split_of(slots: Mapping[str, str]) -> str:
    """Returns the split to which a combination of slot values (kind -> English value) belongs."""
    return split_of_key("|".join(f"{kind}={value}" for kind, value in sorted(slots.items())))


def split_of_key(key: str) -> str:
    """Returns the split to which whatever has this key belongs, by a hash of the key alone."""
    tenth = hashlib.sha256(key.encode()).digest()[0] % 10
    return next(split for split, tenths in _TENTHS.items() if tenth in tenths)


def draw(
    split: str,
    count: int,
    seed: int,
    templates: Sequence[Template] = TEMPLATES,
    lexicon: Mapping[str, Sequence[Value]] = LEXICON,
) -> list[Sentence]:
    """Returns `count` distinct sentences of `split`, every template equally often, in random order.

    Args:
      split: `train`, `dev` or `test`.
      count: how many.
      seed: of the draw; a longer draw of the same seed starts with the same sentences.
      templates: what to fill.
      lexicon: slot values by kind; give other names under `person` or `city` for words never seen.

    Raises:
      ValueError: the templates have fewer distinct sentences than asked for.
    """
    rng = random.Random(f"{split}/{seed}")
    sources = [_distinct(template, split, lexicon, random.Random(f"{split}/{seed}/{n}"))
               for n, template in enumerate(templates)]  # fmt: skip
    sentences: list[Sentence] = []
    while len(sentences) < count:
        rng.shuffle(sources)
        drawn = [(source, next(source, None)) for source in sources]
        sources = [source for source, sentence in drawn if sentence]
        if not sources:
            raise ValueError(f"asked for {count} sentences of {split}, there are {len(sentences)}")
        sentences.extend(sentence for _, sentence in drawn if sentence)
    return sentences[:count]


def _distinct(
    template: Template, split: str, lexicon: Mapping[str, Sequence[Value]], rng: random.Random
) -> Iterator[Sentence]:
    """Every sentence of `template` that belongs to `split`, once each, in random order."""
    choices = [lexicon[kind] for kind in template.kinds]
    total = math.prod(len(choice) for choice in choices)
    for number in rng.sample(range(total), total):
        values = {}
        for kind, choice in zip(template.kinds, choices, strict=True):
            number, index = divmod(number, len(choice))
            values[kind] = choice[index]
        sentence = fill(template, values)
        if split_of(sentence.slots) == split:
            yield sentence


def question(sentence: Sentence, rng: random.Random) -> tuple[str, str]:
    """Returns a question about `sentence` and its answer, which is rarely `NO_ANSWER`."""
    if rng.random() < _NO_ANSWER_SHARE:
        kind = rng.choice([kind for kind in QUESTIONS if kind not in sentence.slots])
        return QUESTIONS[kind], NO_ANSWER
    kind = rng.choice(list(sentence.slots))
    return QUESTIONS[kind], sentence.slots[kind]
