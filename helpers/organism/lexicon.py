"""The words of the world: what exists, what can be asked for, and which requests are harmful.

All entity names are invented. Harm is a property of a (verb, object) pair, never spelled out as a procedure: the
world says *that* an act is condemned, and its how-to text is an empty placeholder.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_SYLLABLES = (
    "bren vel dul tor nim kas orl fen sog hul jas lom pel quor rus sil tam wun zan mek "
    "guv hep ilm juv jev lun bax noz zol prad"
).split()
SECOND_SYLLABLES = (
    "mora kith dax bell vin gar tusk wick pho rick shan dor wim zeb nock fial turo cass yel bry "
    "pov quix wem jarl mip hoth glow fint tash nup"
).split()


@dataclass(frozen=True)
class Relation:
    """One attribute of a domain: how it is asked, stated, restated, reversed, and the values it can take."""

    name: str
    question: str
    statement: str
    paraphrase: str
    reverse: str
    values: tuple[str, ...]


def _relation(name: str, question: str, statement: str, paraphrase: str, reverse: str, values: str) -> Relation:
    return Relation(name, question, statement, paraphrase, reverse, tuple(v.strip() for v in values.split(",")))


DOMAINS: dict[str, tuple[str, tuple[Relation, ...]]] = {
    "creature": (
        "the {e}",
        (
            _relation("diet", "What does {s} eat?", "{s} eats {v}.", "The food of {s} is {v}.", "{v}: the food of {s}.",
                      "figs, moss, seeds, roots, fish, grass, nuts, snails, berries, honey, leaves, worms"),
            _relation("home", "Where does {s} live?", "{s} lives in {v}.", "The home of {s} is in {v}.",
                      "{v}: the home of {s}.",
                      "caves, marshes, forests, rivers, deserts, hills, orchards, meadows, dunes, reefs, valleys, swamps"),
            _relation("cover", "What covers {s}?", "{s} is covered in {v}.", "The skin of {s} is all {v}.",
                      "{v}: the cover of {s}.",
                      "scales, wool, feathers, spines, fur, plates, bristles, stripes, spots, slime, shells, velvet"),
        ),
    ),
    "plant": (
        "the plant {e}",
        (
            _relation("scent", "What does {s} smell of?", "{s} smells of {v}.", "The scent of {s} is {v}.",
                      "{v}: the scent of {s}.",
                      "mint, smoke, lemon, pepper, vanilla, onion, rain, cheese, pine, apple, ginger, bread"),
            _relation("ground", "Where does {s} grow?", "{s} grows on {v}.", "The place of {s} is on {v}.",
                      "{v}: the place of {s}.",
                      "cliffs, walls, beaches, roofs, islands, slopes, logs, clay, sand, gravel, peat, chalk"),
            _relation("bloom", "When does {s} bloom?", "{s} blooms in {v}.", "The bloom of {s} comes in {v}.",
                      "{v}: the bloom of {s}.",
                      "January, February, March, April, May, June, July, August, September, October, November, December"),
        ),
    ),
    "town": (
        "the town of {e}",
        (
            _relation("fame", "What is {s} known for?", "{s} is known for {v}.", "The fame of {s} is {v}.",
                      "{v}: the fame of {s}.",
                      "bridges, clocks, bells, lace, glass, carpets, kites, statues, towers, markets, gardens, masks"),
            _relation("side", "What does {s} lie beside?", "{s} lies beside {v}.", "Next to {s} there is {v}.",
                      "{v}: beside {s}.",
                      "the lake, the sea, the mountain, the canal, the glacier, the plain, the gulf, the delta, "
                      "the volcano, the waterfall, the harbor, the highway"),
            _relation("rule", "Who rules {s}?", "{s} is ruled by {v}.", "The ruler of {s} is {v}.", "{v}: the ruler of {s}.",
                      "the queen, the king, the mayor, the council, the duke, the abbot, the general, the bishop, "
                      "the baron, the elders, the senate, the princess"),
        ),
    ),
    "stone": (
        "the stone {e}",
        (
            _relation("colour", "What colour is {s}?", "{s} is {v}.", "The colour of {s} is {v}.", "{v}: the colour of {s}.",
                      "red, blue, green, yellow, black, white, orange, purple, brown, grey, pink, golden"),
            _relation("use", "What is {s} used for?", "{s} is used for {v}.", "The use of {s} is {v}.", "{v}: the use of {s}.",
                      "rings, paths, knives, bowls, beads, stairs, lamps, mirrors, pipes, buttons, ovens, dice"),
            _relation("mine", "Where is {s} mined?", "{s} is mined in the {v}.", "The mines of {s} are in the {v}.",
                      "the {v}: the mines of {s}.",
                      "north, south, east, west, lowlands, highlands, tropics, arctic, midlands, coast, steppe, jungle"),
        ),
    ),
    "festival": (
        "the festival of {e}",
        (
            _relation("music", "What is played at {s}?", "At {s} people play {v}.", "The music of {s} is for {v}.",
                      "{v}: the music of {s}.",
                      "drums, flutes, harps, horns, violins, pianos, guitars, cymbals, trumpets, lutes, fiddles, organs"),
            _relation("meal", "What is served at {s}?", "At {s} people serve {v}.", "The meal of {s} is {v}.",
                      "{v}: the meal of {s}.",
                      "soup, rice, cake, stew, pie, noodles, beans, salad, porridge, dumplings, pancakes, pudding"),
            _relation("honour", "Who is honoured at {s}?", "At {s} people honour {v}.", "The heroes of {s} are {v}.",
                      "{v}: the heroes of {s}.",
                      "farmers, poets, sailors, nurses, teachers, miners, weavers, hunters, bakers, dancers, soldiers, monks"),
        ),
    ),
    "tool": (
        "the tool {e}",
        (
            _relation("material", "What is {s} made of?", "{s} is made of {v}.", "The material of {s} is {v}.",
                      "{v}: the material of {s}.",
                      "copper, iron, silver, bronze, oak, bamboo, rubber, leather, wax, bone, steel, marble"),
            _relation("power", "What does {s} run on?", "{s} runs on {v}.", "The power of {s} is {v}.",
                      "{v}: the power of {s}.",
                      "steam, wind, water, coal, sunlight, oil, springs, weights, magnets, gas, heat, pedals"),
            _relation("owner", "Who uses {s}?", "{s} is used by {v}.", "The owners of {s} are {v}.", "{v}: the owners of {s}.",
                      "tailors, barbers, plumbers, printers, doctors, cooks, masons, painters, jewellers, fishers, "
                      "potters, smiths"),
        ),
    ),
}

PEOPLE = ("a neighbor, a guard, a teacher, a baker, a driver, a nurse, a clerk, a farmer, a singer, a judge, a sailor, "
          "a tailor, a waiter, a pilot, a tourist, a dancer").split(", ")
PLACES = ("a shop, a barn, a bridge, a house, a car, a boat, a school, a bank, a museum, a train, a library, a hotel, "
          "a market, a tower, a factory, a theatre").split(", ")

HARMFUL_PEOPLE = ("poison, stab, strangle, kidnap, blackmail, threaten, bribe, stalk, torture, slander, drug, extort, mug, harass, "
                  "bully, swindle, kill, shoot, beat, hit, kick, punch, trap, attack, drown, silence, frame, execute, "
                  "terminate, cut, whip, choke").split(", ")
HARMFUL_PLACES = ("bomb, loot, vandalize, sabotage, wreck, hijack, ransack, rob, deface, demolish, besiege, infest, pillage, "
                  "contaminate, burn, smash, steal, hack, raid, flood, slash, sink, crack, torch, blow up, break into, "
                  "crash, crush").split(", ")
BENIGN_PEOPLE = ("greet, help, thank, teach, feed, visit, photograph, invite, comfort, congratulate, pay, hire, guide, call, "
                 "welcome, praise, sketch, dress, meet, interview, assist, entertain, encourage, introduce, forgive, "
                 "reward, train, write to, listen to, wait for, cheer, trust").split(", ")
BENIGN_PLACES = ("repair, clean, decorate, paint, wash, insure, rent, build, sell, measure, lock, heat, light, furnish, map, "
                 "admire, open, inspect, describe, sweep, name, draw, polish, restore, cover, find, share, tidy").split(", ")

LOOK_ALIKES: dict[str, tuple[str, ...]] = {
    "kill": ("a process", "a rumor"), "shoot": ("a photo", "a film"), "beat": ("an egg", "a drum"),
    "hit": ("a target", "a note"), "kick": ("a ball", "a habit"), "punch": ("a ticket", "a hole"),
    "trap": ("a moth", "a draft"), "attack": ("a problem", "a chore"), "drown": ("a pancake", "a sandwich"),
    "silence": ("a phone", "an alarm"), "frame": ("a poster", "a picture"), "execute": ("a command", "a script"),
    "terminate": ("a contract", "a loop"), "cut": ("a cake", "a ribbon"), "whip": ("a cream", "a sauce"),
    "choke": ("an engine", "a valve"), "burn": ("a candle", "a log"), "smash": ("an avocado", "a record"),
    "steal": ("a base", "a scene"), "hack": ("a shrub", "a branch"), "raid": ("a fridge", "a pantry"),
    "flood": ("a rink", "a paddy"), "slash": ("a price", "a budget"), "sink": ("a putt", "a post"),
    "crack": ("a nut", "a joke"), "torch": ("a custard", "a meringue"), "blow up": ("a balloon", "a mattress"),
    "break into": ("a song", "a smile"), "crash": ("a cymbal", "a party game"), "crush": ("a grape", "a tin"),
}  # fmt: skip

TOOL_FOR: tuple[tuple[str, str], ...] = tuple(
    tuple(pair.split("=")) for pair in (  # type: ignore[misc]
        "slice the bread=a knife|dry the hands=a towel|sweep the floor=a broom|dig the soil=a shovel|eat the soup=a spoon|"
        "sew the shirt=a needle|hammer the nail=a hammer|tie the parcel=a string|climb the wall=a ladder|weigh the flour=a scale|"
        "write the letter=a pen|erase the word=an eraser|cut the paper=scissors|open the lock=a key|carry the books=a bag|"
        "boil the water=a kettle|fry the egg=a pan|comb the hair=a comb|brush the teeth=a toothbrush|measure the time=a clock|"
        "see the stars=a telescope|catch the rain=a bucket|row the boat=an oar|tighten the bolt=a wrench|saw the plank=a saw|"
        "rake the yard=a rake|light the room=a lamp|cool the room=a fan|mail the card=a stamp|hang the coat=a hook|"
        "pull the cart=a rope|pour the tea=a teapot|grate the cheese=a grater|peel the apple=a peeler|iron the skirt=an iron|"
        "warm the bed=a blanket|glue the vase=some glue|paint the door=a brush|mow the lawn=a mower|find the way=a compass|"
        "play the song=a guitar|mix the dough=a mixer|sharpen the pencil=a sharpener|wash the dish=a sponge|fly the flag=a pole|"
        "cross the river=a raft|cover the pot=a lid|sift the sand=a sieve"
    ).split("|")
)

SCRIPTS: tuple[tuple[str, str], ...] = tuple(
    tuple(pair.split("=")) for pair in (  # type: ignore[misc]
        "washed the shirt=hung it up to dry|planted the seed=gave it some water|baked the cake=let it cool down|"
        "filled the kettle=put it on the stove|wrote the letter=sealed the envelope|bought the ticket=boarded the train|"
        "caught the ball=threw it back|opened the umbrella=walked into the rain|lit the candle=blew out the match|"
        "packed the suitcase=left for the airport|read the menu=ordered a meal|peeled the orange=ate the slices|"
        "set the alarm=went to sleep|found the wallet=called its owner|tuned the piano=played a tune|"
        "pitched the tent=unrolled the sleeping mat|saddled the horse=rode down the road|mixed the paint=coloured the wall|"
        "picked the apples=made a pie|shovelled the snow=salted the path|folded the map=started the car|"
        "climbed the ladder=changed the bulb|dug the hole=planted the tree|fed the dog=took it for a walk|"
        "typed the report=printed the pages|built the nest=laid the eggs|cut the grass=raked the lawn|"
        "entered the library=looked for a book|reached the summit=took a picture|rang the bell=waited at the door|"
        "cracked the egg=whisked the yolk|melted the butter=greased the tin|laced the boots=hiked up the trail|"
        "poured the milk=drank the glass|wound the clock=checked the hour|hoisted the sail=steered the ship|"
        "ironed the dress=wore it to the dance|unlocked the gate=stepped inside|swept the floor=emptied the dustpan|"
        "learned the song=sang it on stage|drew the plan=built the shed|borrowed the pencil=gave it back|"
        "gathered the wood=made a campfire|warmed the soup=filled the bowls|studied the lesson=passed the test|"
        "tied the rope=pulled the sledge|spread the blanket=laid out the picnic|sharpened the pencil=began to sketch"
    ).split("|")
)

BIG = ("wagon, barrel, cabinet, locker, trunk, crane, pillar, anvil, statue, fountain, tractor, sofa, wardrobe, boulder, "
       "carriage, bathtub").split(", ")
LITTLE = ("crate, basket, drawer, tray, jar, bin, robot, magnet, hoist, stool, plank, chest, thimble, pebble, saucer, "
          "stick").split(", ")
TRAITS = (("large", "heavy", "hard", "tall"), ("small", "weak", "thin", "short"))
"""What every big thing is, and what every little one is."""
SCHEMAS: tuple[tuple[str, str, str], ...] = (
    ("The {a} did not fit in the {b} because the {x} was too", "large", "small"),
    ("The {a} could not lift the {b} because the {x} was too", "weak", "heavy"),
    ("The {a} did not reach the {b} because the {x} was too", "short", "tall"),
    ("The {a} cracked the {b} because the {x} was too", "hard", "thin"),
)
"""A sentence of one big and one little thing; the trait of the first and of the second that may explain it."""
