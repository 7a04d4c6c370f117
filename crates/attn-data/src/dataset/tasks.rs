//! Data sets known by a short name.

use super::DatasetSpec;

/// A data set with a short name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Task {
    /// The short name.
    pub name: &'static str,
    /// What it is, in one line.
    pub about: &'static str,
    /// Repository on the Hub.
    pub source: &'static str,
    /// Configuration, where the repository has several.
    pub config: Option<&'static str>,
    /// Column of the text.
    pub text: &'static str,
    /// Column of the second text.
    pub text_pair: Option<&'static str>,
    /// Column of the label.
    pub label: Option<&'static str>,
    /// Class names in the order of their numbers.
    pub classes: &'static [&'static str],
    /// The split to report on.
    pub validation_split: &'static str,
}

/// Every task. To add one: write an entry here.
pub fn tasks() -> &'static [Task] {
    &TASKS
}

const TASKS: [Task; 5] = [
    Task {
        name: "sst2",
        about: "sentiment of sentences and phrases from film reviews (67,349 / 872 / 1,821 rows; test unlabelled)",
        source: "stanfordnlp/sst2",
        config: None,
        text: "sentence",
        text_pair: None,
        label: Some("label"),
        classes: &["negative", "positive"],
        validation_split: "validation",
    },
    Task {
        name: "mnli",
        about: "does the first sentence imply the second? (392,702 / 9,815 matched / 9,832 mismatched rows)",
        source: "nyu-mll/multi_nli",
        config: None,
        text: "premise",
        text_pair: Some("hypothesis"),
        label: Some("label"),
        classes: &["entailment", "neutral", "contradiction"],
        validation_split: "validation_matched",
    },
    Task {
        name: "wikitext-2",
        about: "Wikipedia articles, rare words as <unk> (36,718 / 3,760 / 4,358 lines)",
        source: "Salesforce/wikitext",
        config: Some("wikitext-2-v1"),
        text: "text",
        text_pair: None,
        label: None,
        classes: &[],
        validation_split: "validation",
    },
    Task {
        name: "wikitext-2-raw",
        about: "the same articles as they were written (36,718 / 3,760 / 4,358 lines)",
        source: "Salesforce/wikitext",
        config: Some("wikitext-2-raw-v1"),
        text: "text",
        text_pair: None,
        label: None,
        classes: &[],
        validation_split: "validation",
    },
    Task {
        name: "blimp",
        about: "which of two sentences is English? for `attn eval` alone (67 paradigms of 1,000 pairs)",
        source: "nyu-mll/blimp",
        config: None,
        text: "sentence_good",
        text_pair: Some("sentence_bad"),
        label: None,
        classes: &[],
        validation_split: "train",
    },
];

impl Task {
    /// The columns and splits of the task.
    pub fn spec(&self) -> DatasetSpec {
        let classes: Vec<String> = self.classes.iter().map(|&name| name.into()).collect();
        DatasetSpec {
            source: self.source.into(),
            config: self.config.map(Into::into),
            text: self.text.into(),
            text_pair: self.text_pair.map(Into::into),
            label: self.label.map(Into::into),
            classes: (!classes.is_empty()).then_some(classes),
            validation_split: self.validation_split.into(),
            ..DatasetSpec::default()
        }
    }
}

pub(super) fn find(name: &str) -> Option<&'static Task> {
    tasks().iter().find(|task| task.name == name)
}
