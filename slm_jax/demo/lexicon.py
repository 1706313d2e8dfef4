"""The words of the demonstration corpus: slot values in English, German and Spanish, with their inflections.

A German or Spanish value has its plain form under "" and inflected forms under names such as `acc` or `in`.
Everything is in lower case without punctuation.
"""

import dataclasses
from collections.abc import Mapping

_NOMINATIVE = {"m": "der", "f": "die", "n": "das"}
_ACCUSATIVE = {"m": "den", "f": "die", "n": "das"}
_DATIVE = {"m": "dem", "f": "der", "n": "dem"}


@dataclasses.dataclass(frozen=True)
class Value:
    """One word that can fill a slot.

    Attributes:
      en: its English form.
      de, es: its forms in German and Spanish by name; "" is the plain form.
    """

    en: str
    de: Mapping[str, str]
    es: Mapping[str, str]


def name(en: str, de: str = "", es: str = "") -> Value:
    """A word without inflection, by default the same in all languages (a person, an invented name)."""
    return Value(en, {"": de or en}, {"": es or en})


def _rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]


def _names(text: str) -> tuple[Value, ...]:
    return tuple(name(*row) for row in _rows(text))


def _nouns(text: str) -> tuple[Value, ...]:
    """Rows `english | gender german | gender spanish`."""
    return tuple(_noun(*row) for row in _rows(text))


def _noun(en: str, german: str, spanish: str) -> Value:
    gender, _, de = german.partition(" ")
    article, _, es = spanish.partition(" ")
    masculine = article == "m"
    return Value(
        en,
        {
            "": de,
            "nom": f"{_NOMINATIVE[gender]} {de}",
            "acc": f"{_ACCUSATIVE[gender]} {de}",
            "dat": f"{_DATIVE[gender]} {de}",
            "in": f"in der {de}" if gender == "f" else f"im {de}",
            "into": {"m": "in den", "f": "in die", "n": "ins"}[gender] + f" {de}",
            "to": f"zur {de}" if gender == "f" else f"zum {de}",
        },
        {
            "": es,
            "the": f"{'el' if masculine else 'la'} {es}",
            "of": f"{'del' if masculine else 'de la'} {es}",
            "to": f"{'al' if masculine else 'a la'} {es}",
            "in": f"en {'el' if masculine else 'la'} {es}",
        },
    )


def _relative(en: str, german: str, es: str) -> Value:
    gender, _, de = german.partition(" ")
    ending = "e" if gender == "f" else ""
    dative = "er" if gender == "f" else "em"
    return Value(en, {"": de, "nom": f"mein{ending} {de}", "dat": f"mein{dative} {de}"}, {"": es})


def _time(hour: Value, minutes: Value | None) -> Value:
    en, de, es = hour.en, f"{hour.de['']} uhr", hour.es[""]
    if minutes:
        en, de, es = f"{en} {minutes.en}", f"{de} {minutes.de['']}", f"{es} y {minutes.es['']}"
    article = "la" if hour.en == "one" else "las"
    return Value(en, {"": de}, {"": es, "at": f"a {article} {es}", "the": f"{article} {es}"})


_HOURS = _names("""
    one | ein | una
    two | zwei | dos
    three | drei | tres
    four | vier | cuatro
    five | fünf | cinco
    six | sechs | seis
    seven | sieben | siete
    eight | acht | ocho
    nine | neun | nueve
    ten | zehn | diez
    eleven | elf | once
    twelve | zwölf | doce
""")
_MINUTES = (
    None,
    *_names("""
    fifteen | fünfzehn | quince
    thirty | dreißig | treinta
    forty five | fünfundvierzig | cuarenta y cinco
"""),
)

LEXICON: Mapping[str, tuple[Value, ...]] = {
    "city": _names("""
        berlin | berlin | berlín
        madrid
        london | london | londres
        paris | paris | parís
        rome | rom | roma
        vienna | wien | viena
        lisbon | lissabon | lisboa
        hamburg | hamburg | hamburgo
        munich | münchen | múnich
        cologne | köln | colonia
        zurich | zürich | zúrich
        geneva | genf | ginebra
        milan | mailand | milán
        venice | venedig | venecia
        naples | neapel | nápoles
        florence | florenz | florencia
        prague | prag | praga
        warsaw | warschau | varsovia
        athens | athen | atenas
        dublin | dublin | dublín
        brussels | brüssel | bruselas
        copenhagen | kopenhagen | copenhague
        stockholm | stockholm | estocolmo
        oslo
        seville | sevilla | sevilla
        barcelona
        valencia
        boston
        chicago
        toronto
    """),
    "person": _names("""
        anna
        peter
        sofia
        thomas
        laura
        david
        julia
        martin
        sarah
        daniel
        emma
        robert
        nina
        victor
        clara
        oscar
        lucy
        simon
        helen
        paul
    """),
    "relative": tuple(
        _relative(*row)
        for row in _rows("""
        mother | f mutter | madre
        father | m vater | padre
        brother | m bruder | hermano
        sister | f schwester | hermana
        uncle | m onkel | tío
        aunt | f tante | tía
        grandmother | f großmutter | abuela
        grandfather | m großvater | abuelo
        son | m sohn | hijo
        daughter | f tochter | hija
        husband | m mann | marido
        wife | f frau | esposa
    """)
    ),
    "time": tuple(_time(hour, minutes) for minutes in _MINUTES for hour in _HOURS),
    "day": tuple(
        Value(en, {"": de}, {"": es, "every": every})
        for en, de, es, every in _rows("""
        monday | montag | lunes | lunes
        tuesday | dienstag | martes | martes
        wednesday | mittwoch | miércoles | miércoles
        thursday | donnerstag | jueves | jueves
        friday | freitag | viernes | viernes
        saturday | samstag | sábado | sábados
        sunday | sonntag | domingo | domingos
    """)
    ),
    "month": _names("""
        january | januar | enero
        february | februar | febrero
        march | märz | marzo
        april | april | abril
        may | mai | mayo
        june | juni | junio
        july | juli | julio
        august | august | agosto
        september | september | septiembre
        october | oktober | octubre
        november | november | noviembre
        december | dezember | diciembre
    """),
    "number": (
        *_HOURS[1:],
        *_names("""
        thirteen | dreizehn | trece
        fourteen | vierzehn | catorce
        fifteen | fünfzehn | quince
        sixteen | sechzehn | dieciséis
        seventeen | siebzehn | diecisiete
        eighteen | achtzehn | dieciocho
        nineteen | neunzehn | diecinueve
        twenty | zwanzig | veinte
        thirty | dreißig | treinta
        forty | vierzig | cuarenta
        fifty | fünfzig | cincuenta
        sixty | sechzig | sesenta
        seventy | siebzig | setenta
        eighty | achtzig | ochenta
        ninety | neunzig | noventa
    """),
    ),
    "things": _names("""
        eggs | eier | huevos
        apples | äpfel | manzanas
        oranges | orangen | naranjas
        bananas | bananen | plátanos
        potatoes | kartoffeln | patatas
        tomatoes | tomaten | tomates
        lemons | zitronen | limones
        onions | zwiebeln | cebollas
        chairs | stühle | sillas
        plates | teller | platos
        cups | tassen | tazas
        bottles | flaschen | botellas
        candles | kerzen | velas
        flowers | blumen | flores
        pictures | bilder | cuadros
        towels | handtücher | toallas
        boxes | kisten | cajas
        letters | briefe | cartas
    """),
    "food": _names("""
        coffee | kaffee | café
        tea | tee | té
        milk | milch | leche
        water | wasser | agua
        soup | suppe | sopa
        bread | brot | pan
        cheese | käse | queso
        rice | reis | arroz
        fish | fisch | pescado
        salad | salat | ensalada
        cake | kuchen | tarta
        juice | saft | zumo
        chicken | hähnchen | pollo
        butter | butter | mantequilla
        honey | honig | miel
        sugar | zucker | azúcar
        wine | wein | vino
        beer | bier | cerveza
        meat | fleisch | carne
        chocolate | schokolade | chocolate
        fruit | obst | fruta
        salt | salz | sal
    """),
    "weather": _names("""
        sunny | sonnig | hace sol
        cold | kalt | hace frío
        hot | heiß | hace calor
        windy | windig | hace viento
        cloudy | bewölkt | está nublado
        foggy | neblig | hay niebla
        rainy | regnerisch | está lluvioso
        stormy | stürmisch | hay tormenta
    """),
    "color": _names("""
        red | rot | rojo
        blue | blau | azul
        green | grün | verde
        yellow | gelb | amarillo
        white | weiß | blanco
        black | schwarz | negro
        brown | braun | marrón
        gray | grau | gris
        orange | orange | naranja
        pink | rosa | rosa
        purple | lila | morado
    """),
    "object": _nouns("""
        lamp | f lampe | f lámpara
        radio | n radio | f radio
        heating | f heizung | f calefacción
        television | m fernseher | m televisor
        fan | m ventilator | m ventilador
        oven | m ofen | m horno
        computer | m computer | m ordenador
        printer | m drucker | f impresora
        washing machine | f waschmaschine | f lavadora
        coffee machine | f kaffeemaschine | f cafetera
        dishwasher | f spülmaschine | m lavavajillas
        toaster | m toaster | f tostadora
        projector | m projektor | m proyector
        speaker | m lautsprecher | m altavoz
    """),
    "room": _nouns("""
        kitchen | f küche | f cocina
        bathroom | n badezimmer | m baño
        bedroom | n schlafzimmer | m dormitorio
        living room | n wohnzimmer | m salón
        garage | f garage | m garaje
        garden | m garten | m jardín
        office | n büro | f oficina
        hallway | m flur | m pasillo
        cellar | m keller | m sótano
        dining room | n esszimmer | m comedor
        guest room | n gästezimmer | m cuarto de invitados
    """),
    "item": _nouns("""
        suitcase | m koffer | f maleta
        bag | f tasche | f bolsa
        passport | m pass | m pasaporte
        key | m schlüssel | f llave
        umbrella | m regenschirm | m paraguas
        phone | n telefon | m teléfono
        camera | f kamera | f cámara
        book | n buch | m libro
        jacket | f jacke | f chaqueta
        wallet | f brieftasche | f cartera
        ticket | f fahrkarte | m billete
        map | f landkarte | m mapa
        hat | m hut | m sombrero
        coat | m mantel | m abrigo
        watch | f uhr | m reloj
        guitar | f gitarre | f guitarra
        bicycle | n fahrrad | f bicicleta
        newspaper | f zeitung | m periódico
        chair | m stuhl | f silla
        table | m tisch | f mesa
        mirror | m spiegel | m espejo
        knife | n messer | m cuchillo
        cup | f tasse | f taza
        plate | m teller | m plato
        bottle | f flasche | f botella
        blanket | f decke | f manta
        pillow | n kissen | f almohada
    """),
    "place": _nouns("""
        station | m bahnhof | f estación
        airport | m flughafen | m aeropuerto
        hotel | n hotel | m hotel
        museum | n museum | m museo
        restaurant | n restaurant | m restaurante
        hospital | n krankenhaus | m hospital
        bank | f bank | m banco
        market | m markt | m mercado
        church | f kirche | f iglesia
        park | m park | m parque
        library | f bibliothek | f biblioteca
        theater | n theater | m teatro
        harbor | m hafen | m puerto
        bakery | f bäckerei | f panadería
        pharmacy | f apotheke | f farmacia
        school | f schule | f escuela
        castle | n schloss | m castillo
        cinema | n kino | m cine
        supermarket | m supermarkt | m supermercado
        zoo | m zoo | m zoológico
        stadium | n stadion | m estadio
        university | f universität | f universidad
    """),
    "vehicle": _nouns("""
        train | m zug | m tren
        bus | m bus | m autobús
        plane | n flugzeug | m avión
        ship | n schiff | m barco
        taxi | n taxi | m taxi
        ferry | f fähre | m transbordador
        tram | f straßenbahn | m tranvía
        car | n auto | m coche
    """),
}
