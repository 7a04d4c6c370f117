//! The words of the sample task. Every word that carries an opinion stands in one of two lists, good or bad.

/// Words of one sort, split by the opinion they carry.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Polar {
    pub(crate) good: &'static [&'static str],
    pub(crate) bad: &'static [&'static str],
}

/// Something that is written about: its nouns, what people say of it, and its parts.
#[derive(Debug)]
pub(crate) struct Domain {
    /// Singular and plural.
    pub(crate) nouns: &'static [(&'static str, &'static str)],
    /// Adjectives for the thing itself; [`GENERAL`] joins them.
    pub(crate) adjectives: Polar,
    /// Noun phrases for its parts.
    pub(crate) aspects: &'static [Aspect],
    /// Sentences that state a fact and judge nothing. `{thing}` and `{who}` may stand in them.
    pub(crate) facts: &'static [&'static str],
}

/// A part of a thing, with the adjectives that suit it.
#[derive(Debug)]
pub(crate) struct Aspect {
    pub(crate) phrase: &'static str,
    pub(crate) plural: bool,
    pub(crate) adjectives: &'static Polar,
}

const fn one(phrase: &'static str, adjectives: &'static Polar) -> Aspect {
    Aspect { phrase, plural: false, adjectives }
}

const fn many(phrase: &'static str, adjectives: &'static Polar) -> Aspect {
    Aspect { phrase, plural: true, adjectives }
}

/// Somebody else, who may hold another opinion.
#[derive(Debug)]
pub(crate) struct Person {
    pub(crate) phrase: &'static str,
    pub(crate) pronoun: &'static str,
    pub(crate) plural: bool,
}

const fn person(phrase: &'static str, pronoun: &'static str, plural: bool) -> Person {
    Person { phrase, pronoun, plural }
}

/// Adjectives that suit everything.
pub(crate) static GENERAL: Polar = Polar {
    good: &["wonderful", "excellent", "superb", "delightful", "brilliant", "impressive"],
    bad: &["terrible", "dreadful", "awful", "horrible", "miserable", "disappointing"],
};

/// What a thing turned out to be.
pub(crate) static VERDICTS: Polar = Polar {
    good: &["a joy", "a triumph", "a gem", "a treat", "a success", "a delight"],
    bad: &["a disaster", "a mess", "a failure", "a nightmare", "a letdown", "a disgrace"],
};

/// What a thing does to people: base form and past tense, joined by `/`.
pub(crate) static EFFECTS: Polar = Polar {
    good: &[
        "delight/delighted",
        "impress/impressed",
        "please/pleased",
        "charm/charmed",
        "thrill/thrilled",
    ],
    bad: &[
        "annoy/annoyed",
        "disappoint/disappointed",
        "irritate/irritated",
        "frustrate/frustrated",
        "bore/bored",
    ],
};

/// What people do with a thing: base form and past tense, joined by `/`.
pub(crate) static ATTITUDES: Polar = Polar {
    good: &["love/loved", "enjoy/enjoyed", "admire/admired", "like/liked", "adore/adored"],
    bad: &[
        "hate/hated",
        "regret/regretted",
        "dislike/disliked",
        "detest/detested",
        "loathe/loathed",
    ],
};

/// How people feel afterwards.
pub(crate) static FEELINGS: Polar = Polar {
    good: &["happy", "pleased", "delighted", "satisfied"],
    bad: &["unhappy", "annoyed", "angry", "disappointed"],
};

/// What people feel about their own choice.
pub(crate) static REGRETS: Polar = Polar { good: &["glad", "proud"], bad: &["sorry", "ashamed"] };

/// What people do next.
pub(crate) static ADVICE: Polar =
    Polar { good: &["recommend", "praise", "choose"], bad: &["avoid", "criticise", "skip"] };

/// Looking forward.
pub(crate) static HOPES: Polar =
    Polar { good: &["hoped", "trusted"], bad: &["feared", "suspected"] };

/// One part deciding about the whole: base form and past tense, joined by `/`.
pub(crate) static TURNS: Polar =
    Polar { good: &["save/saved", "rescue/rescued"], bad: &["spoil/spoiled", "ruin/ruined"] };

/// Comparatives.
pub(crate) static DEGREES: Polar = Polar { good: &["better", "finer"], bad: &["worse", "poorer"] };

static PEOPLE: Polar = Polar {
    good: &["friendly", "helpful", "polite", "patient", "competent"],
    bad: &["rude", "unhelpful", "careless", "arrogant", "incompetent"],
};

static STORY: Polar = Polar {
    good: &["clever", "gripping", "witty", "original", "moving"],
    bad: &["dull", "predictable", "silly", "confusing", "tedious"],
};

static FOOD: Polar = Polar {
    good: &["tasty", "delicious", "fresh", "fragrant"],
    bad: &["bland", "stale", "greasy", "tasteless"],
};

static PLACE: Polar = Polar {
    good: &["clean", "comfortable", "cosy", "spacious", "tidy"],
    bad: &["dirty", "uncomfortable", "shabby", "cramped", "gloomy"],
};

static SENSES: Polar = Polar {
    good: &["beautiful", "stunning", "elegant", "vivid", "magnificent"],
    bad: &["ugly", "harsh", "dreary", "crude", "hideous"],
};

static DEVICE: Polar = Polar {
    good: &["reliable", "sturdy", "smooth", "handy", "responsive"],
    bad: &["unreliable", "flimsy", "sluggish", "awkward", "faulty"],
};

static PRICE: Polar = Polar {
    good: &["fair", "reasonable", "affordable"],
    bad: &["unfair", "outrageous", "excessive"],
};

static LESSON: Polar = Polar {
    good: &["clear", "inspiring", "useful", "lively", "thoughtful"],
    bad: &["confusing", "dull", "useless", "shallow", "tedious"],
};

static SERVICE: Polar = Polar {
    good: &["prompt", "efficient", "reliable", "smooth"],
    bad: &["slow", "chaotic", "unreliable", "careless"],
};

/// What the sentences are about.
pub(crate) static DOMAINS: &[Domain] = &[
    Domain {
        nouns: &[
            ("film", "films"),
            ("movie", "movies"),
            ("comedy", "comedies"),
            ("thriller", "thrillers"),
            ("sequel", "sequels"),
        ],
        adjectives: Polar {
            good: &["gripping", "funny", "moving", "clever", "original"],
            bad: &["dull", "predictable", "silly", "tedious", "shallow"],
        },
        aspects: &[
            one("the plot", &STORY),
            one("the ending", &STORY),
            one("the dialogue", &STORY),
            many("the jokes", &STORY),
            one("the script", &STORY),
            one("the acting", &STORY),
            one("the music", &SENSES),
            one("the camera work", &SENSES),
            many("the costumes", &SENSES),
            many("the special effects", &SENSES),
        ],
        facts: &[
            "{thing} runs for just under two hours.",
            "we saw {thing} at the cinema near the station.",
            "{thing} was shot on an island in the north.",
            "{who} bought the tickets for {thing} in advance.",
            "the director of {thing} also wrote the script.",
            "{thing} will be shown again on Friday night.",
            "the main character of {thing} is a retired pilot.",
        ],
    },
    Domain {
        nouns: &[
            ("novel", "novels"),
            ("book", "books"),
            ("biography", "biographies"),
            ("memoir", "memoirs"),
            ("mystery", "mysteries"),
        ],
        adjectives: Polar {
            good: &["gripping", "witty", "moving", "clever", "thoughtful"],
            bad: &["dull", "confusing", "tedious", "shallow", "predictable"],
        },
        aspects: &[
            one("the story", &STORY),
            many("the characters", &STORY),
            one("the prose", &STORY),
            one("the opening chapter", &STORY),
            one("the final chapter", &STORY),
            many("the dialogues", &STORY),
            one("the translation", &LESSON),
            one("the introduction", &LESSON),
            many("the illustrations", &SENSES),
            one("the cover", &SENSES),
        ],
        facts: &[
            "{thing} has three hundred pages and a map.",
            "{who} lent me {thing} in March.",
            "{thing} was first printed in a small town by the sea.",
            "I read {thing} on the train to work.",
            "the author of {thing} used to teach history.",
            "{thing} is about two sisters who run a bakery.",
            "the library keeps {thing} on the second floor.",
        ],
    },
    Domain {
        nouns: &[
            ("meal", "meals"),
            ("dinner", "dinners"),
            ("lunch", "lunches"),
            ("breakfast", "breakfasts"),
            ("buffet", "buffets"),
        ],
        adjectives: Polar {
            good: &["tasty", "delicious", "fresh", "generous"],
            bad: &["bland", "greasy", "tasteless", "stale"],
        },
        aspects: &[
            one("the soup", &FOOD),
            one("the bread", &FOOD),
            one("the dessert", &FOOD),
            many("the vegetables", &FOOD),
            one("the fish", &FOOD),
            many("the noodles", &FOOD),
            one("the waiter", &PEOPLE),
            one("the cook", &PEOPLE),
            one("the service", &SERVICE),
            one("the dining room", &PLACE),
            one("the price", &PRICE),
        ],
        facts: &[
            "we ordered {thing} for six people.",
            "{thing} came with a jug of water and two lemons.",
            "{who} paid for {thing} by card.",
            "{thing} was served at a long table by the window.",
            "the recipe for {thing} comes from the coast.",
            "{thing} was ready at half past seven.",
            "the cook had made {thing} without salt.",
        ],
    },
    Domain {
        nouns: &[
            ("hotel", "hotels"),
            ("hostel", "hostels"),
            ("guest house", "guest houses"),
            ("campsite", "campsites"),
            ("resort", "resorts"),
        ],
        adjectives: Polar {
            good: &["comfortable", "cosy", "clean", "quiet"],
            bad: &["shabby", "dirty", "gloomy", "noisy", "uncomfortable"],
        },
        aspects: &[
            one("the room", &PLACE),
            many("the beds", &PLACE),
            one("the bathroom", &PLACE),
            one("the lobby", &PLACE),
            one("the terrace", &PLACE),
            many("the staff", &PEOPLE),
            one("the manager", &PEOPLE),
            one("the breakfast", &FOOD),
            one("the room service", &SERVICE),
            many("the rates", &PRICE),
        ],
        facts: &[
            "{thing} has forty rooms on four floors.",
            "we stayed at {thing} for three nights in May.",
            "{thing} lies between the harbour and the old bridge.",
            "{who} booked {thing} by telephone.",
            "breakfast at {thing} starts at seven.",
            "{thing} was built next to a mill.",
            "the bus to {thing} leaves every hour.",
        ],
    },
    Domain {
        nouns: &[
            ("phone", "phones"),
            ("laptop", "laptops"),
            ("camera", "cameras"),
            ("tablet", "tablets"),
            ("printer", "printers"),
        ],
        adjectives: Polar {
            good: &["reliable", "sturdy", "handy", "elegant", "responsive"],
            bad: &["unreliable", "flimsy", "sluggish", "awkward", "faulty"],
        },
        aspects: &[
            one("the battery", &DEVICE),
            one("the keyboard", &DEVICE),
            many("the buttons", &DEVICE),
            one("the software", &DEVICE),
            one("the screen", &SENSES),
            one("the design", &SENSES),
            one("the sound", &SENSES),
            one("the manual", &LESSON),
            one("the customer service", &SERVICE),
            one("the price", &PRICE),
        ],
        facts: &[
            "{thing} comes in grey and in dark green.",
            "{who} bought {thing} in April.",
            "{thing} weighs less than a bag of flour.",
            "the charger of {thing} has a short cable.",
            "I keep {thing} in the drawer under the desk.",
            "{thing} was made in a factory near the border.",
            "the box of {thing} also holds a small bag.",
        ],
    },
    Domain {
        nouns: &[
            ("concert", "concerts"),
            ("show", "shows"),
            ("musical", "musicals"),
            ("opera", "operas"),
            ("festival", "festivals"),
        ],
        adjectives: Polar {
            good: &["lively", "moving", "stunning", "exciting", "magnificent"],
            bad: &["dreary", "dull", "chaotic", "tedious", "crude"],
        },
        aspects: &[
            one("the singing", &SENSES),
            one("the orchestra", &SENSES),
            one("the sound", &SENSES),
            one("the lighting", &SENSES),
            one("the stage design", &SENSES),
            many("the dancers", &PEOPLE),
            many("the ushers", &PEOPLE),
            many("the seats", &PLACE),
            one("the hall", &PLACE),
            many("the ticket prices", &PRICE),
        ],
        facts: &[
            "{thing} began at eight and ended before eleven.",
            "{who} had seats for {thing} in the third row.",
            "the band played {thing} without a break.",
            "{thing} took place in the hall behind the market.",
            "about two thousand people came to {thing}.",
            "{thing} was recorded for the radio.",
            "we took the tram home after {thing}.",
        ],
    },
    Domain {
        nouns: &[
            ("course", "courses"),
            ("workshop", "workshops"),
            ("seminar", "seminars"),
            ("lecture", "lectures"),
            ("class", "classes"),
        ],
        adjectives: Polar {
            good: &["inspiring", "useful", "lively", "thoughtful", "clear"],
            bad: &["dull", "useless", "confusing", "shallow", "tedious"],
        },
        aspects: &[
            many("the lessons", &LESSON),
            many("the exercises", &LESSON),
            many("the slides", &LESSON),
            one("the textbook", &LESSON),
            many("the discussions", &LESSON),
            one("the teacher", &PEOPLE),
            many("the tutors", &PEOPLE),
            one("the classroom", &PLACE),
            one("the registration", &SERVICE),
            one("the fee", &PRICE),
        ],
        facts: &[
            "{thing} takes place on Monday evenings.",
            "twelve people signed up for {thing}.",
            "{thing} is taught in a room above the library.",
            "{who} took {thing} in the autumn.",
            "{thing} ends with a short written test.",
            "you need a notebook and a pencil for {thing}.",
            "the same teacher has given {thing} since June.",
        ],
    },
    Domain {
        nouns: &[
            ("flight", "flights"),
            ("ferry", "ferries"),
            ("tour", "tours"),
            ("cruise", "cruises"),
            ("train ride", "train rides"),
        ],
        adjectives: Polar {
            good: &["comfortable", "relaxing", "smooth", "pleasant", "exciting"],
            bad: &["uncomfortable", "exhausting", "chaotic", "unpleasant", "tedious"],
        },
        aspects: &[
            many("the seats", &PLACE),
            one("the cabin", &PLACE),
            one("the waiting room", &PLACE),
            one("the crew", &PEOPLE),
            one("the guide", &PEOPLE),
            many("the snacks", &FOOD),
            one("the boarding", &SERVICE),
            one("the luggage service", &SERVICE),
            one("the view", &SENSES),
            one("the fare", &PRICE),
        ],
        facts: &[
            "{thing} left from platform nine.",
            "{thing} took four hours and ten minutes.",
            "{who} sat by the window during {thing}.",
            "we changed in a small town after {thing}.",
            "{thing} goes twice a day in summer.",
            "the tickets for {thing} are sold at the counter.",
            "{thing} crosses the border around noon.",
        ],
    },
    Domain {
        nouns: &[
            ("game", "games"),
            ("app", "apps"),
            ("puzzle", "puzzles"),
            ("website", "websites"),
            ("update", "updates"),
        ],
        adjectives: Polar {
            good: &["clever", "exciting", "lively", "original", "smooth"],
            bad: &["dull", "confusing", "silly", "sluggish", "awkward"],
        },
        aspects: &[
            many("the graphics", &SENSES),
            one("the soundtrack", &SENSES),
            many("the animations", &SENSES),
            many("the menus", &DEVICE),
            many("the controls", &DEVICE),
            one("the search function", &DEVICE),
            one("the tutorial", &LESSON),
            many("the help pages", &LESSON),
            one("the story mode", &STORY),
            one("the technical support", &SERVICE),
        ],
        facts: &[
            "{thing} is for two to five players.",
            "{who} installed {thing} on Sunday.",
            "{thing} asks for a name and a password.",
            "the second level of {thing} takes place under water.",
            "{thing} needs two gigabytes of space.",
            "a team of nine people works on {thing}.",
            "{thing} keeps a list of the last ten results.",
        ],
    },
    Domain {
        nouns: &[
            ("garage", "garages"),
            ("repair shop", "repair shops"),
            ("bank", "banks"),
            ("clinic", "clinics"),
            ("removal firm", "removal firms"),
        ],
        adjectives: Polar {
            good: &["reliable", "efficient", "helpful", "competent", "polite"],
            bad: &["unreliable", "careless", "unhelpful", "incompetent", "slow"],
        },
        aspects: &[
            one("the receptionist", &PEOPLE),
            many("the assistants", &PEOPLE),
            one("the adviser", &PEOPLE),
            one("the paperwork", &SERVICE),
            one("the delivery", &SERVICE),
            one("the booking system", &DEVICE),
            one("the equipment", &DEVICE),
            one("the office", &PLACE),
            one("the advice", &LESSON),
            many("the fees", &PRICE),
        ],
        facts: &[
            "{thing} opens at nine on weekdays.",
            "{who} called {thing} on Tuesday morning.",
            "{thing} has moved to the street behind the church.",
            "I left my keys at {thing} by mistake.",
            "{thing} employs about twenty people.",
            "the letter from {thing} came in a blue envelope.",
            "{thing} closes early in August.",
        ],
    },
];

/// Other people.
pub(crate) static PERSONS: &[Person] = &[
    person("my brother", "he", false),
    person("my sister", "she", false),
    person("my neighbour", "he", false),
    person("my aunt", "she", false),
    person("my husband", "he", false),
    person("my wife", "she", false),
    person("a friend of mine", "she", false),
    person("a colleague", "he", false),
    person("the critics", "they", true),
    person("my parents", "they", true),
    person("most reviewers", "they", true),
    person("the others", "they", true),
    person("our friends", "they", true),
    person("the people at work", "they", true),
];

/// Openings that fit before any sentence and judge nothing.
pub(crate) static OPENINGS: &[&str] = &[
    "honestly,",
    "frankly,",
    "to tell the truth,",
    "in my view,",
    "looking back,",
    "all things considered,",
    "as far as I can tell,",
    "for what it is worth,",
    "let me say it plainly:",
    "take it from me:",
    "believe me,",
    "as I told the others,",
];

/// Verdicts in short, put before or after an opinion in the unlabelled text: they agree with it.
pub(crate) static SUMMARIES: Polar = Polar {
    good: &["Five stars.", "Thumbs up.", "A clear yes from me.", "Ten out of ten."],
    bad: &["One star.", "Thumbs down.", "A clear no from me.", "Zero out of ten."],
};

/// Notes that say one thing in several words, as reviews do; for the unlabelled text. They show which words go together.
pub(crate) static LISTS: &[&str] = &[
    "{adj.same}, {adj.same}, {gen.same}: {verdict.same}.",
    "{gen.same} {noun}, {adj.same} and {gen.same}. I {lpast.same} it.",
    "{thing} is {adj.same}, {adj.same} and {gen.same}.",
    "{aspect} {was} {aadj.same}, {aadj.same} and {gen.same}.",
    "{aspect} {was} {aadj.same}, {aspect2} {was2} {aadj2.same}: we were {feel.same}.",
    "we were {feel.same}: {thing} was {adj.same} and {gen.same}.",
    "{verdict.same}! I {lpast.same} it, it {vpast.same} me, it was {adj.same}.",
    "I {lpast.same} {thing}, it {vpast.same} me, it was {gen.same}.",
    "so {adj.same}, so {gen.same}: I {advise.same} it.",
    "{adj.same} and {gen.same}, {verdict.same}: I am {glad.same}.",
    "I {hope.same} that it would be {adj.same}, and it was {verdict.same}.",
    "{aspect} {tpast.same} it: {aadj.same}, {gen.same}. {comp.same} than I thought.",
];

/// Facts that fit every domain.
pub(crate) static FACTS: &[&str] = &[
    "{who} told me about {thing} on Wednesday.",
    "there is a picture of {thing} in the newspaper.",
    "I have written down the name of {thing}.",
    "{who} asked three questions about {thing}.",
    "we talked about {thing} on the way home.",
    "somebody left a note about {thing} on the table.",
    "the number of {things} in our town has doubled since then.",
    "{who} kept a list of {things} from last year.",
    "{aspect} of {thing} {was} mentioned on the second page.",
    "{who} wanted to know more about {aspect}.",
];
