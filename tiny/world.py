"""A small world to read about: short English passages whose questions can only be answered by reading them.

Every passage states 3-8 facts about people, towns, ships, firms and beasts. Their names are invented from a space of
about 229,000 and split by hash: a name that occurs in a test passage occurs in no training or validation passage. So an
answer is read or it is wrong; it cannot be recalled. Most passages have distractors of the same kind: in 84% of them
another subject has the asked relation too, in 44% the asked subject has other facts, in 94% one or the other.

    python tiny/world.py --split test --seed 0 --examples 3     # look at some

Everything follows from (split, seed, index): the i-th example is the same on every machine, in any order of asking.
"""

import argparse
import hashlib
import json
import random

SPLITS = ("train", "validation", "test")

# ---------------------------------------------------------------------------------------------------------------------
# invented names: start (+ middle) + end. 72 * 65 = 4,680 short ones, 72 * 48 * 65 = 224,640 long ones.

STARTS = (
    "Al Ar Bar Bel Bor Bra Bri Cal Car Cor Da Del Dor Dra El Em Er Fal Fen Fro Gal Gar Gil Gor Har Hel Hol Il Is Ja Jor "
    "Kal Kel Kor La Len Lor Lu Mal Mar Mel Mor Na Nel Nor Ol Or Os Pal Per Pol Quin Ral Ren Ro Sal Sel Sor Stel Ta Tel "
    "Tor Tra Ul Ur Val Vel Vor Wel Wil Yar Zan"
).split()
MIDDLES = (
    "a an ar be bi da de den di do e en er ga ge go i in ka ke ko la le li lo ma mi mo na ne no o on or pa ra re ri ro sa "
    "se si ta te ti to va vi"
).split()
ENDS = (
    "bert bin by cas ch cia ck da dan del den dil dra dric fa fin ford gan gar gen grim ka kin la lan len lia lin lo low "
    "man mar med mer min mond na nak nel nis nor phy ra ran rick rin ris ro rus sa sen sha son sta tan ter thor tin ton "
    "va ven vik wen win wyn"
).split()


def split_of_name(name: str) -> str:
    """The one split whose passages may use this invented name (8/10 train, 1/10 validation, 1/10 test)."""
    bucket = hashlib.sha256(name.encode()).digest()[0] % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def invent_name(rng: random.Random, split: str, taken: set[str]) -> str:
    """A new invented name of this split, unlike any in `taken` (to which it is added)."""
    while True:
        name = rng.choice(STARTS) + (rng.choice(MIDDLES) if rng.random() < 0.6 else "") + rng.choice(ENDS)
        if split_of_name(name) == split and name not in taken:
            taken.add(name)
            return name


# ---------------------------------------------------------------------------------------------------------------------
# values: invented (person, town, ...) or drawn from these closed lists of ordinary words

WORDS = {
    "job": "baker,teacher,sailor,doctor,farmer,miller,painter,weaver,tailor,judge,nurse,singer,hunter,smith,cook,lawyer,"
    "clockmaker,shepherd,gardener,carpenter,night guard,ferry pilot,stone cutter,horse trainer,book binder,tax clerk",
    "colour": "red,green,blue,yellow,white,black,brown,grey,pink,purple,turquoise,silver,gold,dark red,dark green,dark blue,"
    "pale blue,pale green,pale yellow",
    "food": "bread,soup,rice,fish,cheese,apple pie,plum cake,bean stew,roast duck,honey,lamb,noodles,onion soup,porridge,"
    "grilled trout,mushrooms",
    "drink": "tea,coffee,milk,cider,mint tea,apple juice,warm milk,ginger beer,pear juice,water,red wine,lemonade",
    "instrument": "violin,flute,drum,harp,piano,trumpet,guitar,cello,bass drum,wood flute,organ,banjo",
    "animal": "horse,dog,cat,goat,parrot,donkey,goose,rabbit,fox,sheep,falcon,black cat,grey wolf,mountain goat",
    "material": "oak,pine,stone,brick,iron,clay,glass,marble,copper,red brick,white stone,birch,steel",
    "sport": "chess,rowing,archery,tennis,wrestling,fencing,swimming,ice skating,long jump,cycling,bowling,running",
    "goods": "wool,salt,timber,grain,coal,silk,spices,olive oil,dried fish,paper,tin,wine,rope,glass beads",
    "weather": "rain,snow,fog,strong wind,hail,thick mist,sunshine,thunder,light frost,dry heat",
    "subject": "history,law,music,botany,medicine,algebra,poetry,marine biology,geology,grammar,logic,old maps",
    "fear": "spiders,heights,thunder,deep water,snakes,the dark,ghosts,bees,mice,loud bells",
    "tool": "hammer,saw,net,spade,pickaxe,needle,brush,hand drill,ladder,wooden spoon,compass,long rope",
    "gift": "ring,book,lamp,scarf,clock,mirror,silver cup,pocket knife,wool hat,painted box,candle,music box",
    "trait": "brave,lazy,kind,proud,shy,clever,honest,stubborn,very patient,greedy,cheerful,quite strict",
    "building": "bridge,castle,lighthouse,market hall,clock tower,library,windmill,chapel,town gate,museum,theatre",
    "flower": "rose,tulip,lily,iris,poppy,violet,daisy,white rose,wild orchid,sunflower",
    "festival": "harvest feast,lantern night,spring fair,boat race,winter market,kite day,song contest,bread fair",
    "vehicle": "cart,bicycle,sledge,wagon,canoe,motor boat,steam train,small van,coach,red tractor",
}
CLOSED = {kind: words.split(",") for kind, words in WORDS.items()}
MONTHS = "January February March April May June July August September October November December".split()


def invent_value(rng: random.Random, kind: str, split: str, taken: set[str]) -> str:
    """A value of this kind: an invented name, a word from a closed list, a number or a date."""
    if kind == "person":  # one or two words
        name = invent_name(rng, split, taken)
        return f"{name} {invent_name(rng, split, taken)}" if rng.random() < 0.3 else name
    if kind == "town":
        name = invent_name(rng, split, taken)
        return rng.choice(("Port ", "New ", "East ", "Lake ")) + name if rng.random() < 0.2 else name
    if kind in ("ship", "firm", "beast"):
        return invent_name(rng, split, taken)
    if kind == "number":
        return str(rng.randint(2, 99) if rng.random() < 0.5 else rng.randint(100, 999))
    if kind == "year":
        return str(rng.randint(1500, 1999))
    if kind == "date":
        return f"{rng.randint(1, 28)} {rng.choice(MONTHS)}"
    return rng.choice(CLOSED[kind])


# ---------------------------------------------------------------------------------------------------------------------
# relations: (name, kind of subject, kind of value, statements, questions). {s} is the subject, {v} the value.

RELATIONS = [
    ("job", "person", "job", ["{s} works as a {v}.", "By trade {s} is a {v}.", "{s} earns a living as a {v}.", "The job of {s} is {v}."],
     ["What is the job of {s}?", "What does {s} work as?", "What does {s} do for a living?"]),
    ("home", "person", "town", ["{s} lives in {v}.", "The home of {s} is in {v}.", "{s} has a house in {v}.", "{s} settled in {v}."],
     ["Where does {s} live?", "In which town is the home of {s}?", "Where did {s} settle?"]),
    ("birthplace", "person", "town", ["{s} was born in {v}.", "The birthplace of {s} is {v}.", "{s} comes from {v}."],
     ["Where was {s} born?", "What is the birthplace of {s}?", "Which town does {s} come from?"]),
    ("birthday", "person", "date", ["{s} was born on {v}.", "The birthday of {s} is {v}.", "{s} has a birthday on {v}."],
     ["When was {s} born?", "When is the birthday of {s}?", "On what date was {s} born?"]),
    ("age", "person", "number", ["{s} is {v} years old.", "The age of {s} is {v}.", "{s} has lived for {v} years."],
     ["How old is {s}?", "What is the age of {s}?", "How many years has {s} lived?"]),
    ("spouse", "person", "person", ["{s} is married to {v}.", "{s} shares a life with {v}.", "The spouse of {s} is {v}."],
     ["Who is {s} married to?", "Who is the spouse of {s}?", "Who shares a life with {s}?"]),
    ("friend", "person", "person", ["The best friend of {s} is {v}.", "{s} trusts {v} most.", "{s} has a close friend called {v}."],
     ["Who is the best friend of {s}?", "Who does {s} trust most?", "Who is the close friend of {s}?"]),
    ("teacher", "person", "person", ["{s} was taught by {v}.", "The teacher of {s} was {v}.", "{s} took lessons from {v}."],
     ["Who taught {s}?", "Who was the teacher of {s}?", "Who gave lessons to {s}?"]),
    ("rival", "person", "person", ["The rival of {s} is {v}.", "{s} quarrels with {v}.", "{s} competes against {v}."],
     ["Who is the rival of {s}?", "Who does {s} quarrel with?", "Who does {s} compete against?"]),
    ("boss", "person", "person", ["The boss of {s} is {v}.", "{s} takes orders from {v}.", "{s} reports to {v}."],
     ["Who is the boss of {s}?", "Who does {s} take orders from?", "Who does {s} report to?"]),
    ("employer", "person", "firm", ["{s} is employed by {v}.", "The employer of {s} is {v}.", "{s} found work at {v}."],
     ["Who employs {s}?", "What is the employer of {s}?", "Where did {s} find work?"]),
    ("coat", "person", "colour", ["{s} wears a {v} coat.", "The coat of {s} is {v}.", "{s} bought a coat in {v}."],
     ["What colour is the coat of {s}?", "What colour of coat does {s} wear?", "In what colour did {s} buy a coat?"]),
    ("door", "person", "colour", ["{s} has a {v} door.", "The door of {s} is painted {v}.", "{s} painted the door {v}."],
     ["What colour is the door of {s}?", "What colour did {s} paint the door?", "Which colour of door does {s} have?"]),
    ("dish", "person", "food", ["{s} likes to eat {v}.", "The favourite dish of {s} is {v}.", "For dinner {s} chooses {v}."],
     ["What does {s} like to eat?", "What is the favourite dish of {s}?", "What does {s} choose for dinner?"]),
    ("drink", "person", "drink", ["{s} likes to drink {v}.", "The favourite drink of {s} is {v}.", "Every morning {s} drinks {v}."],
     ["What does {s} like to drink?", "What is the favourite drink of {s}?", "What does {s} drink every morning?"]),
    ("instrument", "person", "instrument", ["{s} plays the {v}.", "The instrument of {s} is the {v}.", "{s} practises on the {v}."],
     ["What does {s} play?", "Which instrument does {s} practise?", "What is the instrument of {s}?"]),
    ("pet", "person", "animal", ["{s} keeps a {v}.", "The pet of {s} is a {v}.", "{s} walks with a {v}."],
     ["Which animal does {s} keep?", "What is the pet of {s}?", "What animal does {s} walk with?"]),
    ("sport", "person", "sport", ["{s} is good at {v}.", "The sport of {s} is {v}.", "On Sundays {s} goes in for {v}."],
     ["What is {s} good at?", "What is the sport of {s}?", "What does {s} go in for on Sundays?"]),
    ("studies", "person", "subject", ["{s} studies {v}.", "{s} reads books about {v}.", "The field of {s} is {v}."],
     ["What does {s} study?", "What does {s} read books about?", "What is the field of {s}?"]),
    ("fear", "person", "fear", ["{s} is afraid of {v}.", "{s} runs away from {v}.", "The great fear of {s} is {v}."],
     ["What is {s} afraid of?", "What does {s} run away from?", "What is the great fear of {s}?"]),
    ("tool", "person", "tool", ["{s} carries a {v}.", "The tool of {s} is a {v}.", "{s} never leaves without a {v}."],
     ["What does {s} carry?", "What is the tool of {s}?", "What does {s} never leave without?"]),
    ("gift", "person", "gift", ["{s} was given a {v}.", "As a gift {s} received a {v}.", "The gift for {s} was a {v}."],
     ["What was {s} given?", "What did {s} receive as a gift?", "What was the gift for {s}?"]),
    ("trait", "person", "trait", ["{s} is known to be {v}.", "People call {s} {v}.", "By nature {s} is {v}."],
     ["How is {s} known?", "What do people call {s}?", "What is {s} by nature?"]),
    ("vehicle", "person", "vehicle", ["{s} travels by {v}.", "{s} gets around in a {v}.", "{s} owns a {v}."],
     ["How does {s} travel?", "What does {s} get around in?", "What vehicle does {s} own?"]),
    ("room", "person", "number", ["{s} stays in room {v}.", "The room of {s} has number {v}.", "{s} has the key to room {v}."],
     ["In which room does {s} stay?", "What number is the room of {s}?", "Which room does {s} have the key to?"]),
    ("mayor", "town", "person", ["The mayor of {s} is {v}.", "{s} is governed by {v}.", "{s} elected {v} as mayor."],
     ["Who is the mayor of {s}?", "Who governs {s}?", "Who was elected mayor in {s}?"]),
    ("founder", "town", "person", ["{s} was founded by {v}.", "The founder of {s} was {v}.", "{s} owes its beginning to {v}."],
     ["Who founded {s}?", "Who was the founder of {s}?", "To whom does {s} owe its beginning?"]),
    ("founded", "town", "year", ["{s} was founded in {v}.", "The first stone of {s} was laid in {v}.", "{s} dates from {v}."],
     ["When was {s} founded?", "When was the first stone of {s} laid?", "From which year does {s} date?"]),
    ("people", "town", "number", ["{s} has {v} families.", "There are {v} families in {s}.", "The families of {s} number {v}."],
     ["How many families does {s} have?", "How many families are there in {s}?", "What do the families of {s} number?"]),
    ("flag", "town", "colour", ["The flag of {s} is {v}.", "{s} flies a {v} flag.", "Over {s} hangs a {v} flag."],
     ["What colour is the flag of {s}?", "What flag does {s} fly?", "What colour of flag hangs over {s}?"]),
    ("river", "town", "beast", ["{s} lies on the river {v}.", "The river {v} flows through {s}.", "{s} drinks from the river {v}."],
     ["On which river does {s} lie?", "Which river flows through {s}?", "From which river does {s} drink?"]),
    ("market", "town", "goods", ["{s} is famous for its {v}.", "The market of {s} sells {v}.", "{s} lives from {v}."],
     ["What is {s} famous for?", "What does the market of {s} sell?", "What does {s} live from?"]),
    ("landmark", "town", "building", ["{s} has an old {v}.", "Visitors go to {s} to see the {v}.", "The pride of {s} is the {v}."],
     ["What old building does {s} have?", "What do visitors see in {s}?", "What is the pride of {s}?"]),
    ("walls", "town", "material", ["The walls of {s} are made of {v}.", "{s} is built of {v}.", "The houses of {s} are {v}."],
     ["What are the walls of {s} made of?", "What is {s} built of?", "What are the houses of {s} made of?"]),
    ("weather", "town", "weather", ["{s} is often visited by {v}.", "The weather in {s} brings {v}.", "In {s} people expect {v}."],
     ["What often visits {s}?", "What does the weather in {s} bring?", "What do people expect in {s}?"]),
    ("festival", "town", "festival", ["{s} holds a {v}.", "Each year {s} celebrates the {v}.", "The people of {s} love the {v}."],
     ["What does {s} hold?", "What does {s} celebrate each year?", "What do the people of {s} love?"]),
    ("flower", "town", "flower", ["The flower of {s} is the {v}.", "In {s} grows the {v}.", "The gardens of {s} are full of the {v}."],
     ["What is the flower of {s}?", "Which flower grows in {s}?", "Which flower fills the gardens of {s}?"]),
    ("captain", "ship", "person", ["The ship {s} is led by {v}.", "The captain of the {s} is {v}.", "{v} commands the ship {s}."],
     ["Who leads the ship {s}?", "Who is the captain of the {s}?", "Who commands the ship {s}?"]),
    ("harbour", "ship", "town", ["The ship {s} lies in {v}.", "The home port of the {s} is {v}.", "The ship {s} is moored at {v}."],
     ["Where does the ship {s} lie?", "What is the home port of the {s}?", "Where is the ship {s} moored?"]),
    ("cargo", "ship", "goods", ["The ship {s} carries {v}.", "The cargo of the {s} is {v}.", "The {s} is loaded with {v}."],
     ["What does the ship {s} carry?", "What is the cargo of the {s}?", "What is the {s} loaded with?"]),
    ("sails", "ship", "colour", ["The ship {s} has {v} sails.", "The sails of the {s} are {v}.", "The {s} is known for {v} sails."],
     ["What colour are the sails of the {s}?", "What sails does the ship {s} have?", "For which colour of sails is the {s} known?"]),
    ("crew", "ship", "number", ["The ship {s} has a crew of {v}.", "There are {v} sailors on the {s}.", "The {s} needs {v} sailors."],
     ["How large is the crew of the ship {s}?", "How many sailors are on the {s}?", "How many sailors does the {s} need?"]),
    ("launched", "ship", "year", ["The ship {s} was built in {v}.", "The {s} first sailed in {v}.", "In {v} the {s} left the yard."],
     ["When was the ship {s} built?", "When did the {s} first sail?", "In which year did the {s} leave the yard?"]),
    ("director", "firm", "person", ["The firm {s} is run by {v}.", "The director of {s} is {v}.", "{v} manages the firm {s}."],
     ["Who runs the firm {s}?", "Who is the director of {s}?", "Who manages the firm {s}?"]),
    ("office", "firm", "town", ["The firm {s} has its office in {v}.", "The office of {s} is in {v}.", "The firm {s} moved to {v}."],
     ["Where does the firm {s} have its office?", "Where is the office of {s}?", "Where did the firm {s} move to?"]),
    ("product", "firm", "goods", ["The firm {s} deals in {v}.", "The firm {s} sells {v}.", "The trade of {s} is {v}."],
     ["What does the firm {s} deal in?", "What does the firm {s} sell?", "What is the trade of {s}?"]),
    ("staff", "firm", "number", ["The firm {s} has {v} workers.", "{v} people work for the firm {s}.", "The firm {s} pays {v} workers."],
     ["How many workers does the firm {s} have?", "How many people work for the firm {s}?", "How many workers does the firm {s} pay?"]),
    ("opened", "firm", "date", ["The firm {s} opened on {v}.", "The first day of {s} was {v}.", "The firm {s} began on {v}."],
     ["When did the firm {s} open?", "When was the first day of {s}?", "On what date did the firm {s} begin?"]),
    ("owner", "beast", "person", ["The dog {s} belongs to {v}.", "The owner of the dog {s} is {v}.", "The dog {s} follows {v}."],
     ["Who does the dog {s} belong to?", "Who is the owner of the dog {s}?", "Who does the dog {s} follow?"]),
    ("fur", "beast", "colour", ["The dog {s} has {v} fur.", "The fur of the dog {s} is {v}.", "The coat of the dog {s} is {v}."],
     ["What colour is the fur of the dog {s}?", "What fur does the dog {s} have?", "What colour is the coat of the dog {s}?"]),
    ("kennel", "beast", "town", ["The dog {s} lives in {v}.", "The kennel of the dog {s} is in {v}.", "The dog {s} sleeps in {v}."],
     ["Where does the dog {s} live?", "Where is the kennel of the dog {s}?", "Where does the dog {s} sleep?"]),
    ("weight", "beast", "number", ["The dog {s} weighs {v} pounds.", "The weight of the dog {s} is {v} pounds.", "On the scale the dog {s} shows {v} pounds."],
     ["How many pounds does the dog {s} weigh?", "What is the weight in pounds of the dog {s}?", "How many pounds does the dog {s} show on the scale?"]),
]  # fmt: skip
SUBJECT_KINDS = ("person", "person", "person", "town", "town", "ship", "firm", "beast")  # people are most of the world
OF_KIND = {kind: [r for r in RELATIONS if r[1] == kind] for kind in set(SUBJECT_KINDS)}


# ---------------------------------------------------------------------------------------------------------------------
# passages


def make_passage(rng: random.Random, split: str, facts: int) -> tuple[str, list[tuple[str, str]]]:
    """A passage of `facts` facts and a (question, answer) for each of them, in an order of its own.

    Two or three subjects of one kind share a few relations, so that subject and relation must both be matched.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    taken: set[str] = set()
    stated, pairs = [], set()
    while len(stated) < facts:
        kind = rng.choice(SUBJECT_KINDS)
        left = facts - len(stated)
        subjects = [invent_value(rng, kind, split, taken) for _ in range(rng.randint(2, 3) if left > 1 else 1)]
        relations = rng.sample(OF_KIND[kind], min(len(OF_KIND[kind]), 1 + (left + 1) // len(subjects)))
        grid = [(s, r) for r in relations for s in subjects]  # one relation for all subjects first: the distractors
        for subject, (name, _, value_kind, statements, questions) in grid[: min(left, rng.randint(2, 5))]:
            while (name, value := invent_value(rng, value_kind, split, taken)) in pairs:
                pass  # two subjects never share a value, else the question would not tell them apart
            pairs.add((name, value))
            statement = rng.choice(statements).format(s=subject, v=value)
            stated.append((statement, rng.choice(questions).format(s=subject), value))
    rng.shuffle(stated)
    context = " ".join(statement for statement, _, _ in stated)
    questions = [(question, answer) for _, question, answer in stated]
    rng.shuffle(questions)
    return context, questions


def make_example(split: str, seed: int, index: int) -> dict:
    """The index-th example of a split: {"context", "question", "answers": [one]}, 3-8 facts."""
    rng = random.Random(f"{split}/{seed}/{index}")  # a str seed goes through sha512: the same on every platform
    context, questions = make_passage(rng, split, rng.randint(3, 8))
    question, answer = questions[0]
    return {"context": context, "question": question, "answers": [answer]}


def make_examples(split: str, count: int, seed: int = 0) -> list[dict]:
    """The first `count` examples of a split. Training is unlimited; test sets are fixed by their seed (0)."""
    return [make_example(split, seed, index) for index in range(count)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="print examples as JSON lines", allow_abbrev=False)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=3)
    args = parser.parse_args()
    for row in make_examples(args.split, args.examples, args.seed):
        print(json.dumps(row))
