//! The examples do what they say.

use std::path::Path;

#[path = "../examples/load_and_forward.rs"]
#[allow(dead_code, reason = "its `main` is the example's")]
mod load_and_forward;

#[test]
fn a_folder_is_loaded_and_asked_for_the_next_token() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../results/models/wikitext-gpt2");
    let found = load_and_forward::next_tokens(&folder, &[11, 205, 340]).unwrap();
    assert_eq!(found.len(), 5);
    let shares: Vec<f64> = found.iter().map(|it| it.1).collect();
    assert!(shares.is_sorted_by(|a, b| a >= b) && shares.iter().sum::<f64>() < 1.0, "{found:?}");
}
