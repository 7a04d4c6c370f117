//! Which parameters are trained.

use crate::error::{Error, Result};

/// Names offered where a pattern matches nothing.
const N_NEAR: usize = 3;

/// Whether each of `names` is trained, given the patterns of [`TrainConfig::freeze`](crate::TrainConfig::freeze): later
/// ones win.
///
/// # Errors
///
/// [`Error::NoMatch`] for a pattern without effect, [`Error::AllFrozen`] where nothing is left.
pub fn trainable<S: AsRef<str>>(names: &[S], patterns: &[String]) -> Result<Vec<bool>> {
    let mut trained = vec![true; names.len()];
    for pattern in patterns {
        let (frozen, glob) = match pattern.strip_prefix('!') {
            Some(rest) => (false, rest),
            None => (true, pattern.as_str()),
        };
        let mut matched = false;
        for (name, trained) in names.iter().zip(&mut trained) {
            if matches(glob, name.as_ref()) {
                matched = true;
                *trained = !frozen;
            }
        }
        if !matched {
            return Err(no_match("freeze", pattern, glob, names));
        }
    }
    if !trained.contains(&true) {
        return Err(Error::AllFrozen { patterns: patterns.to_vec(), n_parameters: names.len() });
    }
    Ok(trained)
}

/// The error for a pattern that has no effect.
pub(crate) fn no_match<S: AsRef<str>>(
    field: &'static str,
    pattern: &str,
    glob: &str,
    names: &[S],
) -> Error {
    Error::NoMatch { field, pattern: pattern.to_owned(), near: nearest(glob, names) }
}

/// Whether `name` is `glob` with each `*` replaced by something, or nothing.
pub(crate) fn matches(glob: &str, name: &str) -> bool {
    let Some((start, rest)) = glob.split_once('*') else { return glob == name };
    let Some(mut name) = name.strip_prefix(start) else { return false };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let end = parts.pop().expect("splitting gives at least one part");
    // The earliest place for each part leaves the most for the others.
    for part in parts {
        match name.find(part) {
            Some(at) => name = &name[at + part.len()..],
            None => return false,
        }
    }
    name.ends_with(end)
}

fn nearest<S: AsRef<str>>(glob: &str, names: &[S]) -> Vec<String> {
    let text = glob.replace('*', "");
    let mut ranked: Vec<(f64, &str)> = names
        .iter()
        .map(|name| (strsim::normalized_damerau_levenshtein(&text, name.as_ref()), name.as_ref()))
        .collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    ranked.into_iter().take(N_NEAR).map(|(_, name)| name.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 5] = [
        "transformer.wte.weight",
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_attn.bias",
        "transformer.h.1.mlp.c_fc.weight",
        "score.weight",
    ];

    fn trained(patterns: &[&str]) -> Result<Vec<bool>> {
        trainable(&NAMES, &patterns.iter().map(|&p| p.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn a_star_stands_for_anything() {
        for (glob, name, expected) in [
            ("a.b", "a.b", true),
            ("a.b", "a.bc", false),
            ("*", "", true),
            ("a*", "a", true),
            ("*a", "ba", true),
            ("*a", "ab", false),
            ("a*b*c", "a.b.b.c", true),
            ("a*bc*bc", "abc", false),
            ("ab*ba", "aba", false),
            ("*.bias", "h.0.bias", true),
            ("h.*.w", "h.1.w", true),
            ("**x**", "yxz", true),
        ] {
            assert_eq!(matches(glob, name), expected, "{glob} on {name}");
        }
    }

    #[test]
    fn later_patterns_win() {
        assert_eq!(trained(&[]).unwrap(), [true; 5]);
        assert_eq!(trained(&["*.attn.*"]).unwrap(), [true, false, false, true, true]);
        assert_eq!(trained(&["*", "!score*"]).unwrap(), [false, false, false, false, true]);
        assert_eq!(
            trained(&["transformer.*", "!*.h.0.*", "*.bias"]).unwrap(),
            [false, true, false, false, true]
        );
    }

    #[test]
    fn a_pattern_without_effect_names_the_nearest_parameters() {
        let error = trained(&["*.attn.*", "transformer.h.1.mlp.c_fcc.weight"]).unwrap_err();
        assert_eq!(
            error.to_string().lines().next().unwrap(),
            "`freeze`: `transformer.h.1.mlp.c_fcc.weight` matches no parameter"
        );
        assert!(
            error.to_string().contains("nearest are `transformer.h.1.mlp.c_fc.weight`"),
            "{error}"
        );
        assert!(matches!(trained(&["!lm_head*"]), Err(Error::NoMatch { .. })));
    }

    #[test]
    fn freezing_everything_is_refused() {
        let error = trained(&["transformer.*", "score*"]).unwrap_err().to_string();
        assert_eq!(
            error,
            "`freeze`: `transformer.*`, `score*` leave none of 5 parameters to train"
        );
    }
}
