//! Facts hidden in long texts: models trained to find them, and `attn needle`, which counts what they find.

mod common;

use attn_core::config::Head;
use common::{Place, config, model_folder};
use serde_json::Value;

/// Lines of the sample text, and a run that trains a small decoder on them with `[needles]`.
fn place() -> Place {
    let place = Place::new();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../data/sample_text.txt");
    let text = std::fs::read_to_string(path).unwrap();
    // With full stops, so that there are borders within lines.
    let lines = text.lines().take(3000).collect::<Vec<_>>();
    let joined: Vec<String> = lines.chunks(6).map(|lines| lines.join(". ") + ".").collect();
    place.write("text.txt", &joined.join("\n"));
    let mut init = config("llama");
    for key in ["vocab_size", "max_position_embeddings"] {
        init.remove(key);
    }
    init.insert("max_position_embeddings".into(), 256.into());
    let init = toml::to_string(&init).unwrap();
    place.write(
        "lm.toml",
        &format!(
            "objective = 'causal'\nthreads = 1\n[init]\n{init}\n[tokenizer]\nvocab_size = 500\n[data]\nsource = \
             'text.txt'\n[examples]\nmax_len = 160\nhold_out = 0.2\n[needles]\nkinds = ['repeat', 'passkey']\n\
             answer_weight = 3\nhold_out = 12\n[train]\nlr = 1e-2\nmax_steps = 6\nbatch_size = 4\n"
        ),
    );
    place
}

fn field<'a>(value: &'a Value, path: &str) -> &'a Value {
    path.split('.').fold(value, |value, key| &value[key])
}

#[test]
fn a_model_is_trained_on_needles_and_goes_on_from_where_it_was() {
    let place = place();
    let ran = place.done("pretrain lm.toml --out a");
    assert!(ran.stderr.contains("documents with needles"), "{}", ran.stderr);
    assert!(ran.stdout.contains("needles: passkey") && ran.stdout.contains("of 12 documents"));
    let a = place.json("a/summary.json");
    assert_eq!(field(&a, "after.needles.repeat.n"), 12);
    let metrics = place.read("a/metrics.jsonl");
    for metric in ["exact_match_passkey", "token_accuracy_repeat"] {
        assert!(metrics.contains(metric), "{metric}: {metrics}");
    }

    place.done("pretrain a/config.toml --out again");
    assert_eq!(metrics, place.read("again/metrics.jsonl"), "documents repeat by the seed");
    place.done("pretrain lm.toml --out plain --set needles.answer_weight=1");
    assert_ne!(metrics, place.read("plain/metrics.jsonl"), "the weight of answers tells");

    let text = place.read("lm.toml");
    let start = text.find("[init]").unwrap();
    let rest = &text[text.find("[data]").unwrap()..];
    place.write("on.toml", &format!("model = 'a/model'\n{}{rest}", &text[..start]));
    place.done("pretrain on.toml --out b");
    let b = place.json("b/summary.json");
    for path in ["loss_nats_per_token", "needles.passkey.token_accuracy"] {
        let (end, start) = (field(&a["after"], path), field(&b["before"], path));
        assert_eq!(end, start, "{path}: the weights are those of the first run");
    }
    assert_ne!(a["after"], b["after"]);
    let [first, second] = ["a", "b"].map(|run| place.bytes(&format!("{run}/model/tokenizer.json")));
    assert_eq!(first, second, "and so is the tokenizer");

    let other = "--set needles.words=10 --set needles.kinds=[\"repeat\",\"repeat\",\"passkey\"]";
    place.done(&format!("pretrain on.toml --out d {other}"));
    let scored = field(&b["before"], "needles").clone();
    assert_eq!(scored, place.json("d/summary.json")["before"]["needles"], "the same documents");

    let refused = |arguments: &str, parts: &[&str]| {
        place.refused(&format!("pretrain on.toml --out c {arguments}"), parts);
        assert!(!place.path("c").exists(), "{arguments}");
    };
    refused("--set init.model_type=llama", &["to go on from", "`[init]`"]);
    refused("--set tokenizer.vocab_size=300", &["to go on from", "`[tokenizer]`"]);
    refused("--set model=nowhere", &["nowhere"]);
    refused(
        "--set objective=masked --set needles=",
        &["`model` is `a/model`", "`objective` is `masked`"],
    );
    refused("--set objective=masked", &["`[needles]` is for `objective`"]);
    refused("--set needles.share=1.0", &["`needles.share` is 1"]);
    refused("--set needles.fill=2.0", &["`needles.fill` is 2"]);
    refused("--set needles.kinds=[]", &["`needles.kinds` is empty"]);
    refused("--set needles.per_document=0", &["`needles.per_document` is 0"]);
    refused("--set examples.max_len=", &["`examples.max_len` is not set"]);
    refused("--set examples.max_len=10", &["`max_len` is 10", "room for a needle"]);
    refused(
        "--set examples.hold_out=2",
        &["cannot hide needles in the rows held out", "haystack has"],
    );
}

#[test]
fn needles_are_counted_by_length_and_depth() {
    let place = place();
    place.done("pretrain lm.toml --out a --set train.max_steps=2");
    let base = "needle --model a/model --haystack text.txt --split train";

    let asked = "--lengths 200,250 --depths 3 --trials 4 --kinds passkey,repeat";
    let ran = place.done(&format!("{base} {asked} --out out.json"));

    assert!(ran.stdout.contains("passkey, exact match in %"), "{}", ran.stdout);
    let json = place.json("out.json");
    assert_eq!(json["cells"].as_array().unwrap().len(), 2 * 2 * (1 + 3));
    let trials = json["trials"].as_array().unwrap();
    assert_eq!(trials.len(), 2 * 2 * 3 * 4);
    for trial in trials {
        let [needle, answer] = ["needle", "answer"].map(|key| {
            let ends: Vec<u64> = serde_json::from_value(trial[key].clone()).unwrap();
            ends
        });
        let n_tokens = trial["n_tokens"].as_u64().unwrap();
        assert!(needle[1] <= answer[0] && answer[0] < answer[1], "{trial}");
        assert_eq!(answer[1], n_tokens, "{trial}");
        assert!(n_tokens <= trial["length"].as_u64().unwrap(), "{trial}");
        let [wanted, depth] = ["wanted_depth", "depth"].map(|key| trial[key].as_f64().unwrap());
        assert!((wanted - depth).abs() < 0.35, "{trial}");
    }
    place.done(&format!("{base} {asked} --out again.json --batch-size 3"));
    let again = place.json("again.json");
    assert_eq!(json["cells"], again["cells"], "the batch size changes nothing");
    place.done(&format!("{base} {asked} --out other.json --seed 1"));
    assert_ne!(json["trials"], place.json("other.json")["trials"], "other documents");
    place.done(&format!("{base} {asked} --out random.json --init random"));
    assert_eq!(place.json("random.json")["random_weights"], true);

    model_folder(&place, "encoder", "distilbert", Head::LanguageModel);
    let refused = |command: String, parts: &[&str]| {
        place.refused(&format!("{command} --out no.json"), parts);
        assert!(!place.path("no.json").exists(), "{command}");
    };
    refused(format!("{base} --lengths 5"), &["`max_len` is 5", "room for a needle"]);
    refused(format!("{base} --lengths 1000000"), &["haystack has", "1000000 are asked for"]);
    refused(format!("{base} --depths 0"), &["`--depths` is 0"]);
    refused(format!("{base} --trials 0"), &["`--trials` is 0"]);
    refused(base.replace("a/model", "encoder") + " --lengths 30", &["it is an encoder"]);
    place.write("few.txt", "one two three.\n");
    refused(base.replace("text.txt", "few.txt"), &["cannot hide needles", "0 words"]);
}
