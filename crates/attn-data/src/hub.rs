//! Files of the Hugging Face Hub, by repository id.

use std::fmt;

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RepoKind {
    /// Weights, a config, a tokenizer.
    Model,
    /// Rows.
    Dataset,
}

impl RepoKind {
    /// What stands before the id in the Hub's addresses.
    pub(crate) fn url_prefix(self) -> &'static str {
        match self {
            Self::Model => "",
            Self::Dataset => "datasets/",
        }
    }
}

impl fmt::Display for RepoKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Model => "model",
            Self::Dataset => "data set",
        })
    }
}

/// A repository on a Hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repo {
    /// Address of the Hub, without a slash at the end.
    pub endpoint: String,
    /// Model or data set.
    pub kind: RepoKind,
    /// `owner/name`, or the bare name of one of the Hub's first repositories.
    pub id: String,
}

impl Repo {
    /// The page a browser shows.
    pub fn page(&self) -> String {
        format!("{}/{}{}", self.endpoint, self.kind.url_prefix(), self.id)
    }
}

impl fmt::Display for Repo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} `{}`", self.kind, self.id)
    }
}
