"""The twelve icon sets: four that the tiny base is trained on, and eight held-out sets.

Versions and contents are pinned, so the images are reproducible. The keys of the tables name a set; Style.word is its
name in captions. The word of a held-out set does not occur in the base model's captions.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """One icon set: its npm package at a fixed version, who drew it, and the word that captions use for it."""

    word: str
    package: str
    version: str
    sha256: str
    licence: str
    author: str
    url: str

    @property
    def archive(self) -> str:
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def _style(word: str, name: str, version: str, licence: str, author: str, repository: str, sha256: str) -> Style:
    return Style(word, f"@iconify-json/{name}", version, sha256, licence, author, f"https://github.com/{repository}")


REFERENCE = "noto"
BASE_STYLES = {
    "noto": _style(
        "noto",
        "noto",
        "1.2.9",
        "Apache-2.0",
        "Google Inc",
        "googlefonts/noto-emoji",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "twemoji": _style(
        "twemoji",
        "twemoji",
        "1.2.5",
        "CC-BY-4.0",
        "Twitter, Inc and others",
        "jdecked/twemoji",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    "emojione": _style(
        "emojione",
        "emojione",
        "1.2.3",
        "CC-BY-4.0",
        "Emoji One",
        "EmojiTwo/emojitwo",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
    ),
    "fluent": _style(
        "fluent",
        "fluent-emoji-flat",
        "1.2.6",
        "MIT",
        "Microsoft Corporation",
        "microsoft/fluentui-emoji",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
}
HELD_OUT_STYLES = {
    "openmoji": _style(
        "openmoji",
        "openmoji",
        "1.2.29",
        "CC-BY-SA-4.0",
        "OpenMoji",
        "hfg-gmuend/openmoji",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
    ),
    "fluent-emoji": _style(
        "glossy",
        "fluent-emoji",
        "1.2.7",
        "MIT",
        "Microsoft Corporation",
        "microsoft/fluentui-emoji",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    ),
    "noto-v1": _style(
        "blob",
        "noto-v1",
        "1.2.5",
        "Apache-2.0",
        "Google Inc",
        "googlefonts/noto-emoji",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    ),
    "emojione-v1": _style(
        "emojiclassic",
        "emojione-v1",
        "1.2.3",
        "CC-BY-SA-4.0",
        "Emoji One",
        "joypixels/emojione-legacy",
        "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
    ),
    "fxemoji": _style(
        "fxemoji",
        "fxemoji",
        "1.2.2",
        "Apache-2.0",
        "Mozilla",
        "mozilla/fxemoji",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
    ),
    "streamline-emojis": _style(
        "streamline",
        "streamline-emojis",
        "1.2.4",
        "CC-BY-4.0",
        "Streamline",
        "webalys-hq/streamline-vectors",
        "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
    ),
    "fluent-emoji-high-contrast": _style(
        "highcontrast",
        "fluent-emoji-high-contrast",
        "1.2.6",
        "MIT",
        "Microsoft Corporation",
        "microsoft/fluentui-emoji",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    ),
    "emojione-monotone": _style(
        "monotone",
        "emojione-monotone",
        "1.2.1",
        "CC-BY-4.0",
        "Emoji One",
        "EmojiTwo/emojitwo",
        "40b90004bafb406b59266155ef9b7e1dd67bf2947fc8db8d07388776f4d0d04e",
    ),
}
ALL_STYLES = {**BASE_STYLES, **HELD_OUT_STYLES}


def known_style(style: str) -> Style:
    """Return the set of a key. Raises KeyError with the list of keys for an unknown one."""
    if style not in ALL_STYLES:
        raise KeyError(f"no icon style is called {style!r}; there are: {', '.join(ALL_STYLES)}")
    return ALL_STYLES[style]
