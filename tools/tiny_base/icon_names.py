"""From the names in an icon set to concepts: which icons to keep, and what they are called in a caption.

A concept is the icon's name in lower case with spaces for hyphens; no word is lost ("hot-beverage" is "hot beverage").
The sets name the same picture a little differently, so every name is looked up in the noto set:

1. by its letters and digits alone, which is how fxemoji's "hotbeverage" meets "hot-beverage";
2. through the aliases that both sets carry ("bear-face" is noto's "bear");
3. through RENAMED, a short table made by hand, and RENAMED_IN for names that mean something else in one set only
   (fxemoji's "dog" is the face of a dog).

A name that noto does not know stays as it is.
"""

import re
from collections.abc import Iterable, Mapping

_SKIN = re.compile(r"-(light|medium-light|medium|medium-dark|dark)-skin-tone|-tone[1-5]\b|^(light|medium|dark).*skin-tone$")
_SHORT_SKIN = re.compile(r"-(light|medium-light|medium|medium-dark|dark)$")
_HAIR = re.compile(r"^(person|man|woman)-.*(hair|haired|bald|beard)$|^(red|curly|white|blond)-hair(ed)?$|^bald$|^curly-haired$")
_CLOCK = re.compile(r"-oclock$|-thirty$|^clock\d+(oclock|thirty)$")
_LETTERS = re.compile(
    r"^(keycap|letter-|input-|circled-|squared|negativesquared|regionalindicator|cjk|circledideograph|inputsymbol)"
    r"|^regional-indicator|^digit-|^\w$|^asterisk$|^japanese-.*-button$|button-blood-type$"
    r"|^(a|ab|b|o|cl|cool|free|id|new|ng|ok|p|sos|up|vs|up-text|up-exclamation)-button$"
    r"|^(back|end|on|soon|top|on-exclamation)-arrow$|^(copyright|registered|trade-mark|information|atm-sign)$"
    r"|^(inputsymbols|informationsource|silhouetteohjapan|markschaptersymbol)"
)
_GENDERED = re.compile(r"^(man|men|woman|women)-(.+)$")
_FAMILY = re.compile(r"^(family|kiss|couple-with-heart|couple)-.+")
_FLAG_NAMES_KEPT = {"flag-in-hole", "flaginhole"}
_KEPT_CLOCKS = {"three-oclock", "clock3oclock"}
_TURNED = re.compile(r"-facing-right$")

RENAMED: dict[str, str] = {
    "dizzy-face": "face-with-crossed-out-eyes",
    "knocked-out-face": "face-with-crossed-out-eyes",
    "person-deaf": "deaf-person",
    "person-elf": "elf",
    "person-fairy": "fairy",
    "person-genie": "genie",
    "person-mage": "mage",
    "person-merpeople": "merperson",
    "person-superhero": "superhero",
    "person-supervillain": "supervillain",
    "person-vampire": "vampire",
    "person-zombie": "zombie",
    "person-with-bunny-ears": "people-with-bunny-ears",
    "person-wrestling": "people-wrestling",
    "phoenix-bird": "phoenix",
    "piata": "pinata",
    "red-triangle": "red-triangle-pointed-up",
    "flag-for-black-flag": "black-flag",
    "flag-for-white-flag": "white-flag",
    "flag-for-chequered-flag": "chequered-flag",
    "flag-for-crossed-flags": "crossed-flags",
    "flag-for-triangular-flag": "triangular-flag",
    "flag-for-rainbow-flag": "rainbow-flag",
}
RENAMED_IN: dict[str, dict[str, str]] = {}


def letters(name: str) -> str:
    """The letters and digits of a name, the form in which names of different sets are compared."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def vocabulary(names: Iterable[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """letters(name) -> name for the names and aliases of the reference set; a real name wins over an alias."""
    table = {letters(alias): parent for alias, parent in aliases.items()}
    table.update({letters(name): name for name in names})
    return table


def is_junk(name: str, names: frozenset[str], known: Mapping[str, str]) -> bool:
    """Whether an icon gives no concept of its own: skin tones, flags of countries, letters, clock times, variants.

    names are all names of its set, known is the vocabulary. Variants of gender, hair and direction go where a
    neutral picture of the same thing exists in the set or in the vocabulary.
    """
    if _SKIN.search(name) or _HAIR.search(name) or _FAMILY.match(name) or _LETTERS.search(name):
        return True
    if _SHORT_SKIN.search(name) and _SHORT_SKIN.sub("", name) in names and letters(name) not in known:
        return True
    if _CLOCK.search(name):
        return name not in _KEPT_CLOCKS
    if name.startswith("flag-") or name.endswith("-flag") and "flag-" + name[:-5] in known.values():
        return name not in _FLAG_NAMES_KEPT
    if "flag-" + name in known.values() or "flag" + letters(name) in known:
        return name not in {"triangular", "crossed", "white", "black"}
    if _TURNED.search(name) and _TURNED.sub("", name) in names:
        return True
    return _has_neutral(name, names, known)


def _has_neutral(name: str, names: frozenset[str], known: Mapping[str, str]) -> bool:
    match = _GENDERED.match(name)
    if match is None:
        return False
    rest = match.group(2)
    neutral = {rest, "person-" + rest, "people-" + rest}
    return any(each in names or letters(each) in known for each in neutral)


def renamed(style: str, name: str) -> str:
    """The name after the tables made by hand."""
    return RENAMED_IN.get(style, {}).get(name) or RENAMED.get(name) or name


def concept(style: str, name: str, aliases: Iterable[str], known: Mapping[str, str]) -> str:
    """The words for an icon: its name in the vocabulary if it or one of its aliases is known there, else its own."""
    own = renamed(style, name)
    for each in (own, *aliases):
        if letters(each) in known:
            return known[letters(each)].replace("-", " ")
    return own.replace("-", " ").lower()
