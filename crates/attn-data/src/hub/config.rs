//! Where the cache is, which Hub is asked, and with what token.

use std::{
    env, fmt, fs,
    path::{Path, PathBuf},
};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Settings of a [`Hub`](super::Hub).
#[derive(Clone, PartialEq, Eq)]
pub struct HubConfig {
    /// Folder of the cache, in the layout of the Python library.
    pub cache: PathBuf,
    /// Address of the Hub or of a mirror, without a slash at the end.
    pub endpoint: String,
    /// Answers from the cache alone.
    pub offline: bool,
    /// Sent with every request where present. The environment is not consulted for another.
    pub token: Option<String>,
}

impl HubConfig {
    /// Settings from the variables that the Python libraries read.
    ///
    /// | variable | meaning |
    /// | --- | --- |
    /// | `HF_HUB_CACHE` | the cache; else `$HF_HOME/hub` |
    /// | `HF_HOME` | else `$XDG_CACHE_HOME/huggingface`, else `~/.cache/huggingface` |
    /// | `HF_HUB_OFFLINE` | 1, true, yes or on: no network; `TRANSFORMERS_OFFLINE` and `HF_DATASETS_OFFLINE` too |
    /// | `HF_TOKEN` | the token; else the content of `HF_TOKEN_PATH`, else of `$HF_HOME/token` |
    /// | `HF_HUB_DISABLE_IMPLICIT_TOKEN` | 1: no token |
    /// | `HF_ENDPOINT` | the Hub's address; else `https://huggingface.co` |
    ///
    /// Variables that are set but empty count as unset.
    pub fn from_env() -> Self {
        Self::from_vars(|name| env::var(name).ok())
    }

    fn from_vars(var: impl Fn(&str) -> Option<String>) -> Self {
        let var = |name: &str| {
            var(name).map(|value| value.trim().to_string()).filter(|value| !value.is_empty())
        };
        let user = var("HOME")
            .or_else(|| var("USERPROFILE"))
            .map(PathBuf::from)
            .unwrap_or_else(env::temp_dir);
        let path = |name: &str| var(name).map(|value| expand(&value, &user));
        let set = |name: &str| {
            var(name).is_some_and(|value| {
                ["1", "true", "yes", "on"].contains(&value.to_lowercase().as_str())
            })
        };

        let caches = path("XDG_CACHE_HOME").unwrap_or_else(|| user.join(".cache"));
        let home = path("HF_HOME").unwrap_or_else(|| caches.join("huggingface"));
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .unwrap_or_else(|| home.join("hub"));
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.into());
        let offline =
            ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"].into_iter().any(set);
        let stored = || read_token(&path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token")));
        let token = var("HF_TOKEN").or_else(|| var("HUGGING_FACE_HUB_TOKEN")).or_else(stored);
        let token = token.filter(|_| !set("HF_HUB_DISABLE_IMPLICIT_TOKEN"));
        Self { cache, endpoint: endpoint.trim_end_matches('/').into(), offline, token }
    }
}

impl Default for HubConfig {
    /// The public Hub, no token, and the cache where it stands when no variable is set.
    fn default() -> Self {
        let home =
            |name: &str| env::var(name).ok().filter(|_| ["HOME", "USERPROFILE"].contains(&name));
        Self { token: None, ..Self::from_vars(home) }
    }
}

impl fmt::Debug for HubConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubConfig")
            .field("cache", &self.cache)
            .field("endpoint", &self.endpoint)
            .field("offline", &self.offline)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .finish()
    }
}

fn expand(path: &str, user: &Path) -> PathBuf {
    match path.strip_prefix("~/") {
        Some(rest) => user.join(rest),
        None => path.into(),
    }
}

fn read_token(path: &Path) -> Option<String> {
    let token = fs::read_to_string(path).ok()?;
    Some(token.trim().to_string()).filter(|token| !token.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(vars: &[(&str, &str)]) -> HubConfig {
        HubConfig::from_vars(|name| {
            vars.iter().find(|(other, _)| *other == name).map(|(_, value)| value.to_string())
        })
    }

    #[test]
    fn the_cache_follows_the_variables_in_their_order() {
        let all = [
            ("HOME", "/home/u"),
            ("XDG_CACHE_HOME", "/xdg"),
            ("HF_HOME", "~/hf"),
            ("HUGGINGFACE_HUB_CACHE", "/old"),
            ("HF_HUB_CACHE", "/cache"),
        ];
        let expected = [
            "/home/u/.cache/huggingface/hub",
            "/xdg/huggingface/hub",
            "/home/u/hf/hub",
            "/old",
            "/cache",
        ];

        for (n, expected) in (1..).zip(expected) {
            assert_eq!(config(&all[..n]).cache, Path::new(expected));
        }
    }

    #[test]
    fn offline_is_what_the_python_libraries_take_for_true() {
        for value in ["1", "true", "YES", "On"] {
            assert!(config(&[("HF_HUB_OFFLINE", value)]).offline, "{value}");
        }
        for value in ["0", "false", "no", "", "2"] {
            assert!(!config(&[("HF_HUB_OFFLINE", value)]).offline, "{value}");
        }
        assert!(config(&[("TRANSFORMERS_OFFLINE", "1")]).offline);
    }

    #[test]
    fn the_token_is_found_and_never_shown() {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("token"), "hf_stored\n").unwrap();
        let home = home.path().to_str().unwrap();

        assert_eq!(config(&[("HF_HOME", home)]).token.as_deref(), Some("hf_stored"));
        assert_eq!(
            config(&[("HF_HOME", home), ("HF_TOKEN", " hf_own ")]).token.as_deref(),
            Some("hf_own")
        );
        assert_eq!(
            config(&[("HF_HOME", home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]).token,
            None
        );
        assert!(!format!("{:?}", config(&[("HF_TOKEN", "hf_own")])).contains("hf_own"));
    }

    #[test]
    fn an_endpoint_loses_its_last_slash() {
        assert_eq!(config(&[("HF_ENDPOINT", "http://mirror:80/")]).endpoint, "http://mirror:80");
        assert_eq!(config(&[("HF_ENDPOINT", "")]).endpoint, DEFAULT_ENDPOINT);
    }
}
