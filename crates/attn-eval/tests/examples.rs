//! The examples do what they say.

use std::path::Path;

#[path = "../examples/score_heads.rs"]
#[allow(dead_code, reason = "its `main` is the example's")]
mod score_heads;

#[test]
fn every_head_has_a_score() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../results/models/wikitext-gpt2");
    let found = score_heads::scores(&folder).unwrap();
    assert_eq!((found.scores.len(), found.scores[0].len()), (4, 6));
    assert!(found.scores.iter().flatten().all(|score| *score > 0.0), "{found:?}");
}
