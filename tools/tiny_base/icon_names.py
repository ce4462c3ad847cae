"""Map the names in an icon set to concepts: which icons to keep, and their names in captions.

A concept is the icon's name in lower case with spaces for hyphens ("hot-beverage" is "hot beverage").
The sets name the same image differently, so every name is looked up in the noto set:

1. by its letters and digits alone, so fxemoji's "hotbeverage" matches "hot-beverage";
2. by the aliases of both sets ("bear-face" is noto's "bear");
3. by RENAMED, a short handmade table, and RENAMED_IN for names with another meaning in one set only
   (fxemoji's "dog" is the face of a dog).

A name that noto does not have is kept; in fxemoji, whose names cannot be split into words, its icon is dropped.
"""

import re
from collections.abc import Iterable, Mapping

_SKIN = re.compile(r"-tone[1-5]\b|(^|-)(light|medium-light|medium|medium-dark|dark)-skin-tone")
_SHORT_SKIN = re.compile(r"-(light|medium-light|medium|medium-dark|dark)$")
_HAIR = re.compile(r"^(person|man|woman)-.*(hair|haired|bald|beard)$|^(red|curly|white|blond)-hair(ed)?$|^bald$")
_CLOCK = re.compile(r"-oclock$|-thirty$")
_LETTERS = re.compile(
    r"^(keycap|letter-|input-|circled-|squared)"
    r"|^regional-indicator|^digit-|^\w$|^asterisk$|^japanese-.*-button$|button-blood-type$"
    r"|^(a|ab|b|o|cl|cool|free|id|new|ng|ok|p|sos|up|vs|up-text|up-exclamation)-button$"
    r"|^(back|end|on|soon|top|on-exclamation)-arrow$|^(copyright|registered|trade-mark|information|atm-sign)$"
)
_GENDERED = re.compile(r"^(man|men|woman|women)-(.+)$")
_FAMILY = re.compile(r"^(family|kiss|couple-with-heart|couple)-.+")
_KEPT_CLOCK = "three-oclock"
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
# Names that only fxemoji has, or has for another image, as fxemoji=noto; with nothing after "=" the image is dropped:
# a second drawing, one of something else, or (heartblue) one outside its own frame.
_FXEMOJI = """
cat=cat-face catside=cat dog=dog-face dogside=dog mouse=mouse-face mouseside=mouse pig=pig-face pigside=pig
tiger=tiger-face tigerside=tiger bunny=rabbit-face bunnyside=rabbit spurtingwhale=spouting-whale
dragonhead=dragon-face dragonside=dragon leopardside=leopard sheep=ewe frontfacingchick=front-facing-baby-chick
hampster=hamster bactriancamel=two-hump-camel dromedarycamel=camel pigsnout=pig-nose doveofpeace=dove
monkeyhear=hear-no-evil-monkey monkeysee=see-no-evil-monkey monkeyspeak=speak-no-evil-monkey
2hearts=two-hearts heartarrow=heart-with-arrow heartblue= heartgreen=green-heart heartpurple=purple-heart
heartyellow=yellow-heart heartribbon=heart-with-ribbon heartlefttip=beating-heart acorn=chestnut aubergine=eggplant
americasglobe=globe-showing-americas asiaaustraliaglobe=globe-showing-asia-australia meridianglobe=globe-with-meridians
europeafricaglobe=globe-showing-europe-africa anger=anger-symbol angry=enraged-face pouting=angry-face
anguish=anguished-face antennawithbars=antenna-bars aok=ok-hand astonished=face-with-crossed-out-eyes
banknotedollar=dollar-banknote banknoteeuro=euro-banknote banknotepound=pound-banknote banknoteyen=yen-banknote
bath=person-taking-bath beachumbrella=beach-with-umbrella bellcancellation=bell-with-slash billiards=pool-8-ball
bicyclist=person-mountain-biking blackclubsuit=club-suit blackdiamondsuit=diamond-suit blackspadesuit=spade-suit
blackheartsuit=heart-suit blackscissors=scissors blacktelephone=telephone blackskullcrossbones=skull-and-crossbones
blackpushpin=pushpin blackuniversalrecyclingsymbol=recycling-symbol blackdroplet=droplet bolt=high-voltage
bookmarktab=bookmark-tabs boot=womans-boot bouquetofflowers=bouquet bow=ribbon bowing=person-bowing
bride=person-with-veil bullhorn=megaphone megaphone= cellphone=mobile-phone chartdownwardstrend=chart-decreasing
chartupwardstrend=chart-increasing chartupwardstrendyen=chart-increasing-with-yen chilipepper=hot-pepper
clap=clapping-hands clock3oclock=three-oclock closedmailboxlowered=closed-mailbox-with-lowered-flag
closedmailboxraised=closed-mailbox-with-raised-flag openmailboxlowered=open-mailbox-with-lowered-flag
openmailboxraised=open-mailbox-with-raised-flag coldsweat=anxious-face-with-sweat confetti=confetti-ball
confounded=confounded-face confused=confused-face construct=construction-worker construction=building-construction
constructionsign=construction controlknob=control-knobs cop=police-officer crying=loudly-crying-face
loudlycrying= curryandrice=curry-rice daggerknife=dagger dancer=woman-dancing darksunglasses=sunglasses
sunglasses=smiling-face-with-sunglasses dash=dashing-away devilhorns=smiling-face-with-horns imp=angry-face-with-horns
disappointed=disappointed-face dissapointedrelief=sad-but-relieved-face donotlittersymbol=no-littering
doubleexclaimationmark=double-exclamation-mark earofmaize=ear-of-corn earofrice=sheaf-of-rice
electrictorch=flashlight evergreen=evergreen-tree exclaimationquestionmark=exclamation-question-mark
envelopedownarrowabove=envelope-with-arrow europeancastle=castle expressionless=expressionless-face
fallingleaf=fallen-leaf leaffluttering=leaf-fluttering-in-wind fatherchristmas=santa-claus faxicon=fax-machine
fearful=fearful-face fireworksparkler=sparkler fishcakeswirl=fish-cake-with-swirl fishingpoleandfish=fishing-pole
fistedhand=oncoming-fist flexbicep=flexed-biceps flushed=flushed-face forkknife=fork-and-knife
forkandknife=fork-and-knife-with-plate framewithpicture=framed-picture fullmoonwithface=full-moon-face
newmoonwithface=new-moon-face gem=gem-stone girlguy=woman-and-man-holding-hands gma=old-woman gpa=old-man
golfer=person-golfing grimacing=grimacing-face grin=grinning-face-with-big-eyes grineyes=beaming-face-with-smiling-eyes
grinsquint=grinning-squinting-face grinsweat=grinning-face-with-sweat grintears=face-with-tears-of-joy
grinwide=grinning-face grinwideeyes=grinning-face-with-smiling-eyes guapimao=person-with-skullcap guardsman=guard
haircut=person-getting-haircut halo=smiling-face-with-halo hand=raised-hand hands=open-hands high5=raising-hands
handup=person-raising-hand handheldvideocamera=video-camera headmassage=person-getting-massage
hearteyes=smiling-face-with-heart-eyes heels=high-heeled-shoe highbrightness=bright-button lowbrightness=dim-button
highspeedtrainbulletnose=bullet-train hocho=kitchen-knife hourglass=hourglass-done
hourglassflowingsand=hourglass-not-done housebuilding=house housebuildings=houses hundredpointssymbol=hundred-points
hushed=hushed-face openmouth=face-with-open-mouth index=index-pointing-up izakayalantern=red-paper-lantern
japaneseangrymask=ogre ogre= kiss=kissing-face-with-closed-eyes kisseyes=kissing-face-with-smiling-eyes
kissclosedeyes=kissing-face keyboard= kissing=face-blowing-a-kiss largebluecircle=blue-circle largeredcircle=red-circle
leftmagnifyingglass=magnifying-glass-tilted-left rightmagnifyingglass=magnifying-glass-tilted-right linksymbol=link
lips=mouth lock=locked openlock=unlocked lockandkey=locked-with-key lockwithinkpen=locked-with-pen
lowerleftcrayon=crayon lowerleftfountainpen=fountain-pen lowerleftpaintbrush=paintbrush lowerleftpen=pen
mahjong=mahjong-red-dragon makeupbag=clutch-bag pinkwallet=purse maninbusinesssuitlevitating=person-in-suit-levitating
manltepiececlock=mantelpiece-clock mansshirt=t-shirt womansshirt=womans-clothes medicalmask=face-with-medical-mask
mensrunner=running-shoe mensshoe=mans-shoe menssymbol=mens-room womenssymbol=womens-room minidisc=computer-disk
moyai=moai multiplemusicalnotes=musical-notes neutral=neutral-face nogesture=person-gesturing-no
okgesture=person-gesturing-ok nomouth=face-without-mouth noentrysign=prohibited nosmokingsymbol=no-smoking
nonpotablewatersymbol=non-potable-water nooneunder18symbol=no-one-under-eighteen omsymbol=om opticaldisc=optical-disk
oldpersonalcomputer=laptop personalcomputer=desktop-computer desktopcomputer= outbox=outbox-tray pensive=pensive-face
perservere=persevering-face phonerightarrowleft=mobile-phone-with-arrow playingcardblackjoker=joker
policecarsrevolvinglight=police-car-light poo=pile-of-poo potablewatersystem=potable-water pout=person-pouting
frown=person-frowning frownmouth=frowning-face-with-open-mouth smallfrown=slightly-frowning-face
smallsmile=slightly-smiling-face pray=folded-hands present=wrapped-gift putlitterinitsplacesymbol=litter-in-bin-sign
racecar=racing-car raincloud=cloud-with-rain snowcloud=cloud-with-snow stormcloud=cloud-with-lightning
sunraincloud=sun-behind-rain-cloud whitesun=sun sunrays= whitesunbehindcloud=sun-behind-large-cloud
whitesunsmallcloud=sun-behind-small-cloud raisedhandpartfingers=vulcan-salute
raisedhandsfingerssplayed=hand-with-fingers-splayed recreationalvehicle=sport-utility-vehicle relieved=relieved-face
reminder=reminder-ribbon reversehandmiddlefinger=middle-finger rightspeaker= speaker=speaker-low-volume
speakeronesoundwave=speaker-medium-volume speaker3soundwaves=speaker-high-volume speakercancellation=muted-speaker
rowboat=person-rowing-boat running=person-running walking=person-walking saggitarius=sagittarius
sakebottleandcup=sake sandals=womans-sandal schoolsatchel=backpack screamfear=face-screaming-in-fear
sixpointedstarwithdot=dotted-six-pointed-star skiandskiboot=skis sleeping=sleeping-face sleepy=sleepy-face
sleuthspy=detective sliceofpizza=pizza smileeyes=smiling-face-with-smiling-eyes smiletongue=face-savoring-food
smirk=smirking-face smokingsymbol=cigarette snowmountains=snow-capped-mountain softshellfloppy=floppy-disk
speakingheadinsilhouette=speaking-head speechbubble=speech-balloon thoughtbaloon=thought-balloon
spiralcalendarpad=spiral-calendar steamlocomotive=locomotive studiomic=studio-microphone sunsetoverbuildings=sunset
surfer=person-surfing sweat=downcast-face-with-sweat sweatsplash=sweat-droplets swimming=person-swimming
telephonereceiver2=telephone-receiver tennisball=tennis tie=necktie tired=tired-face toykotower=tokyo-tower
tongueout=face-with-tongue tongueoutwink=winking-face-with-tongue tongueoutwink2=squinting-face-with-tongue
triangularflagonpost=triangular-flag triumph=face-with-steam-from-nose turban=person-wearing-turban
twistedrightwardsarrows=shuffle-tracks-button unamused=unamused-face umbrella=closed-umbrella
umbrellawithraindrops=umbrella-with-rain-drops videocasette=videocassette waitress=person-tipping-hand
waningbibbousmoon=waning-gibbous-moon warningsign=warning wave=water-wave waving=waving-hand weary=weary-face
weightlifter=person-lifting-weights whitesmilingface=smiling-face winking=winking-face worried=worried-face
whiteexclaimationmark=white-exclamation-mark tent=camping camping=tent screen= dizzyface=
tearoffcalendar=calendar calendar=tear-off-calendar couple= couplekiss=
"""
# Flags that streamline-emojis names by the country only, and names that it uses for another image.
_STREAMLINE = """
australia= brazil= canada= china= egypt= france= germany= greece= india= iran= iraq= italy= japan= malaysia= mexico=
nepal= north-korea= pakistan= portugal= russia= singapore= south-africa= south-korea= spain= switzerland= syria=
thailand= united-arab-emirates= united-kingdom= united-states= crazy-face=zany-face game-dice=game-die
red-wine-glass=wine-glass gesturing-ok=person-gesturing-ok
"""
RENAMED_IN: dict[str, dict[str, str]] = {
    "fxemoji": dict(pair.split("=") for pair in _FXEMOJI.split()),
    "streamline-emojis": dict(pair.split("=") for pair in _STREAMLINE.split()),
}
# Sets whose names cannot be split into words: icons that noto does not have are dropped.
_UNDIVIDED = {"fxemoji"}
# Sets that draw some icons twice, as name-1, name-2, ...: the first one counts.
_NUMBERED = {"streamline-emojis"}


def letters(name: str) -> str:
    """Return the letters and digits of a name, by which names of different sets are compared."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def vocabulary(names: Iterable[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """Return letters(name) -> name for the names and aliases of the reference set; names override aliases."""
    table = {letters(alias): parent for alias, parent in aliases.items()}
    table.update({letters(name): name for name in names})
    return table


def is_junk(name: str, names: frozenset[str], known: Mapping[str, str]) -> bool:
    """Return whether an icon is no concept of its own: skin tones, flags of countries, letters, clock times, variants.

    Variants of gender, hair and direction count as junk if the set or the vocabulary has a neutral one.

    Args:
        names: all names of the set.
        known: the vocabulary.
    """
    if _SKIN.search(name) or _HAIR.search(name) or _FAMILY.match(name) or _LETTERS.search(name):
        return True
    if _SHORT_SKIN.search(name) and _SHORT_SKIN.sub("", name) in names and letters(name) not in known:
        return True
    if _CLOCK.search(name):
        return name != _KEPT_CLOCK
    if name.startswith("flag-") or name.endswith("-flag"):
        return letters(name) not in known
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
    """Return the name after the handmade tables, without a drawing's number; "" for an icon to drop."""
    if style in _NUMBERED:
        name = re.sub(r"-\d$", "", name)
    return RENAMED_IN.get(style, {}).get(name, RENAMED.get(name, name))


def concept(style: str, name: str, aliases: Iterable[str], known: Mapping[str, str]) -> str:
    """Return an icon's concept: its name or alias in the vocabulary, otherwise its own name; "" to drop it."""
    own = renamed(style, name)
    for each in (own, *aliases):
        if letters(each) in known:
            return known[letters(each)].replace("-", " ")
    return "" if style in _UNDIVIDED else own.replace("-", " ").lower()
