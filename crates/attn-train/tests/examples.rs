//! The examples do what they say.

use std::path::Path;

#[path = "../examples/own_loop.rs"]
#[allow(dead_code, reason = "its `main` is the example's")]
mod own_loop;

#[test]
fn a_student_comes_nearer_in_a_loop_of_the_users_own() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../results/models/wikitext-gpt2");
    let losses = own_loop::distill(&folder, 12).unwrap();
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    assert!(mean(&losses[8..]) < 0.9 * mean(&losses[..4]), "{losses:?}");
}
