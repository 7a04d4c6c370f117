//! `attn swap`, `attn distill` and `attn eval --against`: another attention, and the way back to what the model did.

mod common;

use attn_core::{LoadOptions, Model, ModelInput};
use common::{Place, config, rows};
use serde_json::Value;
use tch::Tensor;

/// A small language model in `lm/model`.
fn place(base: &str) -> Place {
    let place = Place::new();
    let texts: Vec<String> = rows(80).into_iter().map(|(text, _)| text).collect();
    place.write("text.txt", &texts.join("\n"));
    let mut init = config(base);
    init.remove("vocab_size");
    // Large weights: attention matters from the start.
    init.insert("initializer_range".into(), 0.3.into());
    let init = toml::to_string(&init).unwrap();
    let (objective, vocab_size) =
        if base == "distilbert" { ("masked", 90) } else { ("causal", 290) };
    place.write(
        "lm.toml",
        &format!(
            "objective = '{objective}'\n[init]\n{init}\n[tokenizer]\nvocab_size = {vocab_size}\n[data]\nsource = \
             'text.txt'\n[examples]\nmax_len = 24\nhold_out = 10\n[train]\nlr = 1e-2\nepochs = 8\nbatch_size = 8\n"
        ),
    );
    place.write(
        "distill.toml",
        "model = 'lm/model'\n[data]\nsource = 'text.txt'\nvalidation_split = 'train'\n[examples]\nmax_len = 24\n\
         [attention]\nkind = 'gated'\n[transfer.train]\nlr = 1e-2\nmax_steps = 6\nbatch_size = 8\n[tune.train]\nlr = \
         3e-3\nmax_steps = 20\nbatch_size = 8\n",
    );
    place.done("pretrain lm.toml --out lm");
    place
}

fn kl(score: &Value) -> f64 {
    score["kl_nats_per_token"].as_f64().unwrap()
}

fn load(place: &Place, folder: &str) -> Model {
    Model::load(&place.path(folder), &LoadOptions::default()).unwrap().0
}

#[test]
fn a_swapped_folder_is_a_model_like_any_other() {
    let place = place("gpt2");
    let said = place
        .done("swap --model lm/model --attention window --set size=2 --layers 1 --out swapped")
        .stdout;
    assert!(said.contains("window (size 2) in layer 1, softmax elsewhere"), "{said}");
    let base = "--model swapped --task text.txt --split train --max-len 24";
    let said = place.done(&format!("eval {base} --against lm/model --out kl.json")).stdout;
    assert!(said.contains("nats per token") && said.contains("agreement"), "{said}");
    let divergence = &place.json("kl.json")["divergence"];
    assert!(kl(divergence) > 1e-4, "{divergence}");
    assert_eq!(place.json("kl.json")["against"], "lm/model");
    place.done("generate --model swapped --max-new-tokens 3 the");

    // Kinds are mixed by a second swap, and a kind put back is the model it was.
    place.done("swap --model swapped --attention gated --layers 0 --out mixed");
    let said = place.done("swap --model mixed --attention softmax --out back").stdout;
    assert!(said.contains("as plain transformers"), "{said}");
    let ids = Tensor::from_slice(&[3i64, 5, 7, 9]).view([1, 4]);
    let of = |folder: &str| {
        let model = load(&place, folder);
        model.forward(&ModelInput::new(ids.shallow_clone()), &Default::default()).unwrap().logits
    };
    assert!(of("back").equal(&of("lm/model")));
    assert!(!of("mixed").equal(&of("lm/model")));
}

#[test]
fn a_student_comes_nearer_to_its_teacher_stage_by_stage() {
    for base in ["gpt2", "llama", "distilbert"] {
        let place = place(base);
        let kind = "--set attention.kind=window --set attention.size=1";
        let ran = place.done(&format!("distill distill.toml {kind} --out run"));
        assert!(ran.stderr.contains("`transfer` has nothing to train"), "{}", ran.stderr);
        assert!(
            ran.stdout.contains("at the swap") && ran.stdout.contains("after tune"),
            "{}",
            ran.stdout
        );
        let summary = place.json("run/summary.json");
        let [before, after] = [&summary["at_swap"], &summary["stages"][0]["after"]].map(kl);
        assert!(after < 0.8 * before, "{base}: {before} to {after}");
        assert!(place.bytes("run/plots/tune.png").starts_with(b"\x89PNG"));
        assert!(!place.path("run/tune/checkpoints").exists());

        // What is reported is what the folder does.
        let task =
            "--model run/model --task text.txt --split train --max-len 24 --batch-size 5 --seed 0";
        place.done(&format!("eval {task} --against lm/model --out kl.json"));
        let again = kl(&place.json("kl.json")["divergence"]);
        assert!((again - after).abs() < 1e-5, "{base}: {again} is not {after}");
        assert!(!ran.stderr.contains("farther from the teacher"), "{}", ran.stderr);
    }
}

#[test]
fn a_student_that_got_worse_is_said_to() {
    let place = place("gpt2");
    let kind = "--set attention.kind=window --set attention.size=8";
    let ran = place.done(&format!("distill distill.toml {kind} --set tune.train.lr=1 --out run"));
    let summary = place.json("run/summary.json");
    let [before, after] = [&summary["at_swap"], &summary["stages"][0]["after"]].map(kl);
    assert!(after > before, "{before} to {after}");
    assert!(ran.stderr.contains("farther from the teacher"), "{}", ran.stderr);
}

#[test]
fn what_a_kind_adds_is_transferred_first_and_adapters_leave_the_teacher_alone() {
    let place = place("gpt2");
    let said = place
        .attn("distill distill.toml --set tune.lora.rank=2 --set tune.lora.save=adapter --out no");
    assert!(said.code == 1 && said.stderr.contains("adapters are merged"), "{}", said.stderr);
    let ran = place.done("distill distill.toml --set tune.lora.rank=2 --out run");
    let summary = place.json("run/summary.json");
    let n_trained = |stage: usize| summary["stages"][stage]["n_trained"].as_u64().unwrap();
    assert_eq!(n_trained(0), summary["n_added"].as_u64().unwrap(), "{}", ran.stderr);
    assert!(
        n_trained(1) > n_trained(0) && n_trained(1) < summary["n_parameters"].as_u64().unwrap()
    );
    // A gate starts at one: the student is its teacher until something is trained.
    assert!(kl(&summary["at_swap"]).abs() < 1e-6);
    let names: Vec<String> =
        load(&place, "run/model").parameters().into_iter().map(|(name, _)| name).collect();
    assert!(names.iter().all(|name| !name.contains("lora")), "adapters are merged");
}

#[test]
fn an_interrupted_distillation_ends_where_an_unbroken_one_does() {
    for more in ["", "--set tune.teacher_cache=cache", "--set tune.on_policy.share=0.4"] {
        interrupted_and_unbroken(more);
    }
}

fn interrupted_and_unbroken(more: &str) {
    let place = place("gpt2");
    let settings = format!(
        "distill distill.toml --set attention.kind=window --set attention.size=2 --set threads=1 {more}"
    );
    let every = "--set tune.train.checkpoint_every=5 --set tune.train.max_steps=100";
    place.done(&format!("{settings} {every} --out whole"));
    let mut child = place.command(&format!("{settings} {every} --out broken")).spawn().unwrap();
    let saved = |n: usize| {
        let folder = place.path("broken/tune/checkpoints");
        std::fs::read_dir(folder).is_ok_and(|entries| entries.count() >= n)
    };
    let started = std::time::Instant::now();
    while !saved(2) && started.elapsed().as_secs() < 120 {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!place.path("broken/summary.json").exists(), "it was killed before its end");
    place.done("distill --out broken --resume");
    let of = |run: &str| place.bytes(&format!("{run}/model/model.safetensors"));
    assert!(of("whole") == of("broken"), "{more}");
    let score =
        |run: &str| place.json(&format!("{run}/summary.json"))["stages"][0]["after"].clone();
    assert_eq!(score("whole"), score("broken"));
}

#[test]
fn finished_stages_are_taken_over_as_they_were() {
    let place = place("gpt2");
    // Both a kind with parameters of its own and adapters, which are merged once.
    let settings = "--set tune.lora.rank=2 --set tune.lora.alpha=8 --set threads=1";
    place.done(&format!("distill distill.toml {settings} --out run"));
    let weights = || place.bytes("run/model/model.safetensors");
    let stages = || place.json("run/summary.json")["stages"].clone();
    let (whole, scores) = (weights(), stages());
    let undo = |stage: Option<&str>| {
        std::fs::remove_file(place.path("run/summary.json")).unwrap();
        std::fs::remove_dir_all(place.path("run/model")).unwrap();
        if let Some(stage) = stage {
            std::fs::remove_dir_all(place.path("run").join(stage)).unwrap();
        }
    };

    // As a kill between the last stage and the summary leaves it.
    undo(None);
    place.done("distill --out run --resume");
    assert!(weights() == whole, "both stages were taken over");
    assert_eq!(stages(), scores);

    // As one between the stages does.
    undo(Some("tune"));
    place.done("distill --out run --resume");
    assert!(weights() == whole, "the first stage was taken over, the second one trained again");
    assert_eq!(stages()[1]["after"], scores[1]["after"]);

    // What was learnt from one teacher is not gone on with by another.
    undo(None);
    place.done("pretrain lm.toml --seed 7 --out other");
    let file = "model/model.safetensors";
    std::fs::write(place.path("lm").join(file), place.bytes(&format!("other/{file}"))).unwrap();
    place.refused("distill --out run --resume", &["the teacher is another model", "hint: put its"]);

    // Nor by one of which little is known.
    place.write("run/teacher.json", "\"0123456789abcdef-0123456789abcdef\"");
    let parts = ["begun by an earlier version", "`teacher.json`", "hint: begin a new run"];
    place.refused("distill --out run --resume", &parts);
}

#[test]
fn a_student_learns_from_predictions_on_disk_and_from_its_own_words() {
    let place = place("gpt2");
    let kind = "--set attention.kind=window --set attention.size=1 --set tune.train.max_steps=40";
    for more in ["tune.teacher_cache=cache", "tune.on_policy={share=0.5,prompt_tokens=4}"] {
        let _ = std::fs::remove_dir_all(place.path("run"));
        place.done(&format!("distill distill.toml {kind} --set {more} --out run"));
        let summary = place.json("run/summary.json");
        let [before, after] = [&summary["at_swap"], &summary["stages"][0]["after"]].map(kl);
        assert!(after < 0.8 * before, "{more}: {before} to {after}");
    }
    // The next run finds it there; another text is another cache.
    let shard = "cache/shard-00000.safetensors";
    let made = place.path(shard).metadata().unwrap().modified().unwrap();
    let cached = format!("distill distill.toml {kind} --set tune.teacher_cache=cache");
    place.done(&format!("{cached} --seed 3 --out again"));
    assert_eq!(place.path(shard).metadata().unwrap().modified().unwrap(), made);
    let other = format!("{cached} --set examples.limit=20 --out no");
    place.refused(&other, &["cannot use `tune.teacher_cache`", "`n_rows`", "hint: name another"]);
    assert!(
        !place.path("no").exists(),
        "a cache of other rows is refused before anything is written"
    );
}

#[test]
fn what_cannot_be_distilled_is_refused_before_the_weights_are_read() {
    let place = place("gpt2");
    std::fs::write(place.path("lm/model/model.safetensors"), b"no weights").unwrap();
    for (arguments, problem) in [
        ("distill distill.toml --set attention.kind=softmaxx --out o", "softmaxx"),
        (
            "distill distill.toml --set attention.kind=window --set attention.size=0 --out o",
            "`attention.size` is 0",
        ),
        ("distill distill.toml --set surgery.layers=[9] --out o", "layer 9 is out of range"),
        ("distill distill.toml --set tune.loss.forward_kl=-1 --out o", "`forward_kl` is -1"),
        ("distill distill.toml --set attention= --out o", "the student would be its teacher"),
        ("distill distill.toml --set transfer= --set tune= --out o", "nothing is trained"),
        (
            "distill distill.toml --set tune.teacher_cache=c --set tune.loss.hidden_mse=1 --out o",
            "cannot use `tune.teacher_cache`",
        ),
        (
            "distill distill.toml --set tune.teacher_cache=c --set tune.on_policy.share=0.5 --out o",
            "leave one of them away",
        ),
        ("distill distill.toml --set tune.on_policy.share=1.5 --out o", "`share` is 1.5"),
        (
            "distill distill.toml --set tune.on_policy.prompt_tokens=24 --out o",
            "`tune.on_policy.prompt_tokens` is 24, and rows have 24 tokens",
        ),
        (
            "distill distill.toml --set tune.train.gradient_checkpointing=true --set tune.loss.attention_output=1 --out o",
            "`gradient_checkpointing` is true, expected false",
        ),
        ("distill lm.toml --out o", "this is a config for `pretrain`"),
        ("swap --model lm/model --attention window --set size=0 --out o", "size"),
        ("swap --model lm/model --attention windo --out o", "expected one of"),
        ("swap --model lm/model --attention window --layers 7 --out o", "there is no layer 7"),
    ] {
        let ran = place.attn(arguments);
        assert_eq!(ran.code, 1, "{arguments}: {}", ran.stderr);
        assert!(ran.stderr.contains(problem), "{arguments}: {}", ran.stderr);
        assert!(!place.path("o").exists(), "{arguments}");
    }
    let place = self::place("distilbert");
    for setting in ["teacher_cache=c", "on_policy.share=0.5"] {
        let arguments = format!("distill distill.toml --set tune.{setting} --out o");
        place.refused(&arguments, &["is a masked language model", "hint: leave it away"]);
    }

    // What reads two texts, before the data, which is not there.
    place.done("swap --model lm/model --attention cross --layers 1 --out crossed");
    place.write("crossed/model.safetensors", "no weights");
    place.write("lm/model/model.safetensors", "no weights");
    let distill = "distill distill.toml --set data.source=none.txt --out o --set";
    for (settings, problem) in [
        ("attention.kind=cross", "`attention.kind` is `cross`"),
        ("model=crossed", "layer 1 of `model`, `crossed`, is `cross`"),
        ("model=crossed --set surgery.layers=[0]", "layer 1 of `model`, `crossed`, is `cross`"),
        ("teacher=crossed", "layer 1 of `teacher`, `crossed`, is `cross`"),
        ("model=crossed --set surgery.layers=[0] --set teacher=lm/model", "layer 1 of `model`"),
    ] {
        let settings = format!("{distill} {settings}");
        place.refused(&settings, &[problem, "hint: `attn finetune` trains it"]);
        assert!(!place.path("o").exists(), "{settings}");
    }
    place.refused(&format!("{distill} model=crossed --set teacher=lm/model"), &["`none.txt`"]);
}

#[test]
fn what_an_indexer_learns_from_is_had_where_activations_are_computed_again() {
    let place = place("gpt2");
    let indexed = "--set attention={kind=\"indexed\",index_dim=4,top_k=2} --set threads=1";
    let train = |more: &str, out: &str| {
        place.done(&format!("distill distill.toml {indexed} {more} --out {out}"));
        kl(&place.json(&format!("{out}/summary.json"))["stages"][1]["after"])
    };
    let kept = train("", "kept");
    let again =
        ["transfer", "tune"].map(|s| format!("--set {s}.train.gradient_checkpointing=true"));
    let recomputed = train(&again.join(" "), "recomputed");
    assert!((kept - recomputed).abs() < 1e-4 * kept, "{kept} is not {recomputed}");
}

#[test]
fn a_sweep_refuses_attention_that_the_model_cannot_have_before_its_first_run() {
    let place = place("gpt2");
    place.write(
        "sweep.toml",
        "base = 'distill.toml'\n[[run]]\nname = 'near'\nattention.kind = 'window'\nattention.size = 4\n\
         [[run]]\nname = 'far'\nattention.kind = 'moba'\nattention.block = 2\nattention.top_k = 900\n",
    );
    for more in ["", " --dry-run"] {
        let sweep = format!("sweep sweep.toml --out swept{more}");
        place.refused(&sweep, &["cannot run `far", "`top_k` = 900"]);
        assert!(!place.path("swept").exists(), "{sweep}");
    }
}
