//! The sentence patterns of the sample task, one line each.
//!
//! A slot stands in braces. `.same` asks for a word that agrees with the label, `.opp` for one that
//! contradicts it, so a pattern says by itself how its words and its label hang together: in
//! `{thing} was not {adj.opp} at all.` the label is the contrary of the adjective.
//!
//! | slot | filled with |
//! | --- | --- |
//! | `thing`, `noun`, `things` | "the hotel", "hotel", "hotels" (one thing per sentence) |
//! | `aspect`, `aspect2`, `was`, `was2` | two different parts of it, and "was" or "were" for each |
//! | `adj`, `aadj`, `aadj2`, `gen` | an adjective for the thing, for either part, for anything |
//! | `verdict` | "a joy", "a mess" |
//! | `vbase`, `vpast` | what it does to me: "annoy", "annoyed" |
//! | `lbase`, `lpast` | what I do with it: "love", "loved" |
//! | `feel`, `glad`, `advise`, `hope` | "angry"; "glad"; "avoid"; "feared" |
//! | `tbase`, `tpast` | "spoil", "spoiled" |
//! | `comp` | "better" |
//! | `who`, `they`, `waswho` | somebody else, the pronoun, and "was" or "were" |

/// Patterns that show one phenomenon.
#[derive(Debug)]
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    /// Used in every split.
    pub(crate) common: &'static [&'static str],
    /// Used for validation, test and the unlabelled text only: no training row is made from them.
    pub(crate) held_out: &'static [&'static str],
}

/// All kinds.
pub(crate) static KINDS: &[Kind] = &[
    Kind {
        name: "plain",
        common: &[
            "{thing} was {adj.same}.",
            "{thing} was {adj.same} in every respect.",
            "I found {thing} {adj.same}.",
            "{aspect} {was} {aadj.same}.",
            "{thing} {vpast.same} me.",
            "I {lpast.same} {thing}.",
            "{thing} was {verdict.same}.",
            "{thing} was {adj.same}, and {aspect} {was} {aadj.same} too.",
            "what a {adj.same} {noun}!",
            "we came away {feel.same}, because {aspect} {was} {aadj.same}.",
            "I am {glad.same} that I picked {thing}.",
            "we were {feel.same} with {thing}, and above all with {aspect}.",
        ],
        held_out: &[
            "from beginning to end, {thing} {vpast.same} me.",
            "everything about {thing} {vpast.same} us, above all {aspect}.",
        ],
    },
    Kind {
        name: "negation",
        common: &[
            "{thing} was not {adj.opp} at all.",
            "{thing} was far from {adj.opp}.",
            "{thing} was anything but {adj.opp}.",
            "I would not call {thing} {adj.opp}.",
            "nobody could call {thing} {adj.opp}.",
            "there was nothing {adj.opp} about {thing}.",
            "{aspect} {was} hardly {aadj.opp}.",
            "I cannot say that {aspect} {was} {aadj.opp}.",
            "{thing} did not {vbase.opp} me for a moment.",
            "I never {lpast.opp} {thing}.",
            "only a fool would call {thing} {adj.opp}.",
            "nobody was {feel.opp} with {thing}.",
            "I was never {feel.opp} with {thing}.",
        ],
        held_out: &[
            "it would be wrong to call {thing} {adj.opp}.",
            "you could call {thing} many things, but not {adj.opp}.",
        ],
    },
    Kind {
        name: "double_negation",
        common: &[
            "{thing} never failed to {vbase.same} me.",
            "nobody could say that {thing} was not {adj.same}.",
            "it is not true that {aspect} {was} not {aadj.same}.",
            "I cannot deny that {aspect} {was} {aadj.same}.",
            "there is no denying that {thing} was {adj.same}.",
            "{thing} was nothing but {verdict.same}.",
            "only a fool would deny that {thing} was {adj.same}.",
        ],
        held_out: &[
            "nobody can deny that {aspect} {was} {aadj.same}.",
            "it is not true that {thing} was not {adj.same}.",
        ],
    },
    Kind {
        name: "contrast",
        common: &[
            "{aspect} {was} {aadj.opp}, but {thing} as a whole was {adj.same}.",
            "although {aspect} {was} {aadj.opp}, I {lpast.same} {thing}.",
            "{thing} was {adj.same}, even though {aspect} {was} {aadj.opp}.",
            "despite {aspect}, which {was} {aadj.opp}, {thing} {vpast.same} me.",
            "at first {thing} seemed {adj.opp}, but in the end it was {adj.same}.",
            "{aspect} {was} {aadj.opp}, but that could not {tbase.opp} {thing}.",
            "{aspect} {was} {aadj.same}, and that {tpast.same} {thing} for me.",
            "we were {feel.same} with {thing}, and it did not matter that {aspect} {was} {aadj.opp}.",
        ],
        held_out: &[
            "{thing} may have been {adj.opp} in places, but all in all it was {adj.same}.",
            "while {aspect} {was} {aadj.opp}, {thing} still {vpast.same} me.",
        ],
    },
    Kind {
        name: "expectation",
        common: &[
            "I expected {verdict.opp} and got {verdict.same}.",
            "I was told that {thing} would be {adj.opp}, and it was not.",
            "I was told that {thing} would be {adj.same}, and it was.",
            "I {hope.opp} that {thing} would be {adj.opp}, and it was not.",
            "I {hope.same} that {thing} would be {adj.same}, and it was.",
            "{thing} looked {adj.opp} on paper; in practice it was {adj.same}.",
            "{thing} was not nearly as {adj.opp} as I had expected.",
            "I was sure that {thing} would {vbase.opp} me, and I was wrong.",
            "I was sure that {thing} would {vbase.same} me, and I was right.",
        ],
        held_out: &[
            "from the outside {thing} looked like {verdict.opp}, yet it turned out to be {verdict.same}.",
            "I had expected {aspect} to be {aadj.opp}, which could not have been further from the truth.",
        ],
    },
    Kind {
        name: "opinion",
        common: &[
            "{who} called {thing} {adj.opp}; I found it {adj.same}.",
            "{who} said that {thing} was {adj.same}, and I could not agree more.",
            "{who} said that {thing} was {adj.opp}, and I could not disagree more.",
            "{who} {lpast.opp} {thing}, but I did not.",
            "{who} {lpast.same} {thing}, and so did I.",
            "unlike {who}, I {lpast.same} {thing}.",
            "{who} thought that {aspect} {was} {aadj.opp}, which is simply not true.",
            "{who} thought that {aspect} {was} {aadj.same}, which is quite true.",
            "\"a {adj.opp} {noun},\" said {who}, and {they} could not have been more wrong.",
            "\"a {adj.same} {noun},\" said {who}, and {they} {waswho} right.",
        ],
        held_out: &[
            "{who} told me to expect {verdict.opp}, and for once {they} {waswho} wrong.",
            "{who} told me to expect {verdict.same}, and as usual {they} {waswho} right.",
        ],
    },
    Kind {
        name: "comparison",
        common: &[
            "I have never come across a more {adj.same} {noun}.",
            "I have never come across a less {adj.opp} {noun}.",
            "{thing} could not have been more {adj.same}.",
            "{thing} could not have been less {adj.opp}.",
            "few {things} are as {adj.same} as this one.",
            "{things} do not get much {comp.same} than this.",
            "almost any other {noun} would have been {comp.opp}.",
        ],
        held_out: &[
            "I have never known a more {adj.same} {noun}.",
            "I have never known a less {adj.opp} {noun}.",
            "you will not find a {comp.same} {noun} anywhere.",
        ],
    },
    Kind {
        name: "question",
        common: &[
            "who would call {thing} {adj.opp}?",
            "how could anyone {lbase.opp} {thing}?",
            "is there anybody who did not {lbase.same} {thing}?",
            "was {thing} {adj.opp}? Not for a second.",
            "was {thing} {adj.same}? Very much so.",
            "could a {noun} be more {adj.same}?",
            "why would anyone say that {aspect} {was} {aadj.opp}?",
        ],
        held_out: &[
            "how could anyone call {thing} {adj.opp}?",
            "is there anyone who did not {lbase.same} {thing}?",
        ],
    },
    Kind {
        name: "advice",
        common: &[
            "I would {advise.same} {thing} without a second thought.",
            "I would never {advise.opp} {thing}.",
            "I see no reason to {advise.opp} {thing}.",
            "I see every reason to {advise.same} {thing}.",
            "you would be a fool to {advise.opp} {thing}.",
            "you would be a fool not to {advise.same} {thing}.",
        ],
        held_out: &[
            "there is no reason to {advise.opp} {thing}.",
            "there is every reason to {advise.same} {thing}.",
        ],
    },
];
