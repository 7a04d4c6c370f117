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

#[test]
fn heads_are_scored_by_needles_and_masked() {
    let place = place();
    place.done("pretrain lm.toml --out a --set train.max_steps=2");
    let documents = "--model a/model --haystack text.txt --split train --lengths 150,200 --depths 2 --trials 2 --max-new-tokens 6";
    let score = |rest: &str| format!("score-heads {documents} --seed 4 {rest}");

    let ran = place.done(&score(
        "--method retrieval_mass --keep-failures --out heads.json --picture pictures/heads.png",
    ));

    assert!(ran.stdout.contains("16 of 16 trials count"), "{}", ran.stdout);
    assert!(place.path("pictures/heads.png").exists());
    let heads = place.json("heads.json");
    assert_eq!((&heads["method"], &heads["n_rows"]), (&"retrieval_mass".into(), &16.into()));
    assert_eq!(heads["min_rouge1_recall"], Value::Null);
    let scores: Vec<Vec<f64>> = serde_json::from_value(heads["scores"].clone()).unwrap();
    for (layer, row) in scores.iter().enumerate() {
        for (head, score) in row.iter().enumerate() {
            assert!((0.0..=1.0).contains(score), "{score}");
            let interval = &heads["interval_95"][layer][head];
            assert!(interval["low"].as_f64().unwrap() <= *score, "{interval}");
        }
    }
    for trial in heads["trials"].as_array().unwrap() {
        let [needle, told] = ["needle", "told"].map(|key| trial[key].as_array().unwrap());
        let inside = |at: &Value| {
            needle[0].as_u64() <= at[0].as_u64() && at[1].as_u64() <= needle[1].as_u64()
        };
        assert!(told.iter().all(inside) && trial["response"].is_string(), "{trial}");
    }
    place.done(&score("--method query_focused --out asked.json"));
    assert!(place.json("asked.json")["trials"][0].get("response").is_none());

    // The first head of each layer in front: the untrained model may tie.
    let mut ranked = heads.clone();
    for layer in ranked["scores"].as_array_mut().unwrap() {
        for (head, score) in layer.as_array_mut().unwrap().iter_mut().enumerate() {
            *score = (0.5 / (head as f64 + 1.0)).into();
        }
    }
    ranked["scores"][0][0] = 0.75.into();
    place.write("ranked.json", &ranked.to_string());
    let n_heads: usize = scores.iter().map(Vec::len).sum();
    let mask = format!("needle {documents} --mask-heads ranked.json --random-draws 5");
    for fill in ["zero", "uniform"] {
        let ran = place.done(&format!("{mask} --top 1 --mask {fill} --out m.json --pictures p"));
        assert!(ran.stdout.contains("over 5 draws"), "{}", ran.stdout);
        let masked = &place.json("m.json")["masked"];
        assert_eq!((&masked["fill"], &masked["top"]), (&fill.into(), &serde_json::json!([[0, 0]])));
        assert_eq!(masked["n_heads"], n_heads);
        let draws = masked["random"].as_array().unwrap();
        assert!(draws.len() == 5 && draws.iter().all(|draw| draw["heads"] != masked["top"]));
        for name in ["model_block0.png", "model_block_top1.png", "model_block_random1.png"] {
            assert!(place.path(&format!("p/{name}")).exists(), "{name}");
        }
    }

    let refused = |command: String, parts: &[&str]| {
        place.refused(&format!("{command} --out no.json"), parts);
        assert!(!place.path("no.json").exists(), "{command}");
    };
    refused(
        score("--method retrieval --min-recall 99"),
        &["none of 16 trials counts", "--keep-failures"],
    );
    refused(
        score("--method retrieval").replace("tokens 6", "tokens 0"),
        &["`--max-new-tokens` is 0"],
    );
    refused(score("--method retrieval --min-recall 100"), &["`--min-recall` is 100"]);
    refused(
        score("--method retrieval").replace("150,200", "200000"),
        &["haystack has", "200000 are asked for"],
    );
    refused(format!("{mask} --top {n_heads}"), &["`--top` is", "1 to half of them"]);
    refused(format!("{mask} --top 1").replace("draws 5", "draws 0"), &["`--random-draws` is 0"]);
    refused(format!("{mask} --top 3"), &["are not to be told from others"]);
    refused(
        format!("{mask} --top 1").replace("ranked.json", "lm.toml"),
        &["cannot use `--mask-heads"],
    );
    ranked["heads"][0][0] = 7.into();
    place.write("ranked.json", &ranked.to_string());
    refused(format!("{mask} --top 1"), &["scores other heads than"]);
    for wrong in [
        "score-heads --model a/model --method retrieval --out no.json".into(),
        "score-heads --model a/model --out no.json".into(),
        score("--method michel --out no.json"),
        score("--method retrieval --task text.txt --out no.json"),
    ] {
        assert_eq!(place.attn(&wrong).code, 2, "{wrong}");
    }
}

#[test]
fn needles_and_texts_of_the_users_own_are_hidden() {
    let place = place();
    place.done("pretrain lm.toml --out a --set train.max_steps=2");
    let text = place.read("text.txt").replace(". ", ".\n");
    place.write("essays/b.txt", &text[..text.len() / 2]);
    place.write("essays/a.txt", &text[text.len() / 2..]);
    let own = [
        r#"{"needle": "The best of all is a big cake.", "question": "What is best?", "real_needle": "A big cake"}"#,
        r#"{"needle": "He left as it rained.", "question": "Why did he leave?", "real_needle": "it rained"}"#,
    ];
    place.write("own.jsonl", &own.join("\n"));
    let base = "needle --model a/model --haystack essays --needles own.jsonl --depths 3 --trials 2 --lengths 240 --max-new-tokens 4";

    place.done(&format!("{base} --distractors 1 --out out.json"));

    let json = place.json("out.json");
    assert_eq!(json["split"], Value::Null);
    let trials = json["trials"].as_array().unwrap();
    assert_eq!(trials.len(), 2 * 3 * 2);
    for trial in trials {
        let expected = ["a big cake", "it rained"][trial["own"].as_u64().unwrap() as usize];
        assert_eq!((&trial["kind"], &trial["expected"]), (&"own".into(), &expected.into()));
        let [wanted, depth] = ["wanted_depth", "depth"].map(|key| trial[key].as_f64().unwrap());
        assert!((wanted - depth).abs() < 0.35, "{trial}");
        assert!(trial["n_tokens"].as_u64().unwrap() <= 240);
    }
    let refused = |command: String, parts: &[&str]| {
        place.refused(&format!("{command} --out no.json"), parts);
    };
    refused(format!("{base} --distractors 2"), &["`--distractors` is 2", "fewer than that"]);
    refused(base.replace("240", "200000"), &["haystack has", "200000 are asked for"]);
    refused(format!("{base} --template Answer:"), &["one {} in it"]);
    place.write("own.jsonl", &own[0].replace("A big cake", "a small cake"));
    refused(base.into(), &["line 1 of", "`real_needle` is `a small cake`", "hint: copy"]);
}
