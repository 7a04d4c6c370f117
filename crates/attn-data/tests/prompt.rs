//! Prompts: their text, and which tokens are the answer's.

use attn_data::{
    Error,
    chat::{ChatTemplate, Message},
    dataset::{DatasetSpec, Example},
    prompt::{Prompt, PromptSpec, Question},
    tokenizer::{Style, TextTokenizer, train_bpe},
};
use serde_json::json;

const LLAMA_3: &str = "{% for message in messages %}{{ '<|start|>' + message['role'] + '<|end|>\n\n' \
                       + message['content'] | trim + '<|eot|>' }}{% endfor %}\
                       {% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}";

fn row(text: &str, pair: Option<&str>, label: i64) -> Example {
    Example { text: text.into(), pair: pair.map(Into::into), label: Some(label) }
}

fn named(name: &str) -> PromptSpec {
    PromptSpec { name: Some(name.into()), ..PromptSpec::default() }
}

fn own(template: &str, answers: &[&str]) -> PromptSpec {
    PromptSpec {
        template: Some(template.into()),
        answers: Some(answers.iter().map(|&answer| answer.into()).collect()),
        ..PromptSpec::default()
    }
}

fn chat(source: &str) -> attn_data::Result<ChatTemplate> {
    let tokens = json!({"bos_token": "<s>", "eos_token": "</s>"});
    ChatTemplate::new(source, tokens.as_object().unwrap().clone(), "tokenizer_config.json")
}

/// The prompt for a task of `attn list`.
fn prompt(spec: &PromptSpec, task: &str) -> attn_data::Result<Prompt> {
    let data = DatasetSpec::known(task).unwrap();
    let classes = data.classes.clone().unwrap();
    Prompt::new(spec, &data, &classes, || chat(LLAMA_3))
}

fn text(spec: &PromptSpec, task: &str, row: &Example) -> String {
    prompt(spec, task).unwrap().text(row).unwrap()
}

/// A byte-level tokenizer, in which any text comes back letter by letter.
fn tokenizer() -> TextTokenizer {
    let texts =
        ["the film is negative positive True False Neither entailment neutral\nAnswer: "; 4];
    train_bpe(&texts, 300, Style::ByteLevel, None).unwrap()
}

fn questions(spec: &PromptSpec, task: &str, rows: &[Example]) -> attn_data::Result<Vec<Question>> {
    let rows: Vec<(usize, &Example)> = rows.iter().enumerate().collect();
    Ok(prompt(spec, task)?.questions(&tokenizer(), &rows, 500)?.rows)
}

/// Each answer to the one row, as the text before it and its own.
fn parts(spec: &PromptSpec, task: &str, row: Example) -> Vec<[String; 2]> {
    let tokenizer = tokenizer();
    let found = questions(spec, task, &[row]).unwrap();
    let decode = |ids: &[u32]| tokenizer.decode(ids, false).unwrap();
    let answers = found[0].answers.iter();
    answers
        .map(|one| [decode(&one.ids[..one.answer.start]), decode(&one.ids[one.answer.clone()])])
        .collect()
}

#[track_caller]
fn refused(result: attn_data::Result<impl std::fmt::Debug>, parts: &[&str]) {
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Prompt { .. } | Error::ChatTemplate { .. }), "{error:?}");
    for part in parts {
        assert!(error.to_string().contains(part), "no `{part}` in: {error}");
    }
}

/// The texts of lm-evaluation-harness: `doc_to_text` of `sst2` and `mnli`.
#[test]
fn built_in_prompts_are_the_harness_s_word_for_word() {
    assert_eq!(
        text(&named("sst2"), "sst2", &row("a fine film ", None, 1)),
        "a fine film \nQuestion: Is this sentence positive or negative?\nAnswer:"
    );
    let mnli = |hypothesis| text(&named("mnli"), "mnli", &row("It rains.", Some(hypothesis), 0));
    let expected = "It rains.\nQuestion: It is wet. True, False or Neither?\nAnswer:";
    assert_eq!(mnli("It is wet"), expected);
    assert_eq!(mnli(" It is wet. "), expected);
    let answers = prompt(&named("mnli"), "mnli").unwrap().answers().to_vec();
    assert_eq!(answers, ["True", "Neither", "False"], "entailment, neutral, contradiction");
}

#[test]
fn an_answer_s_tokens_begin_where_its_text_does() {
    let found = parts(&named("sst2"), "sst2", row("the film is", None, 0));

    let before = "the film is\nQuestion: Is this sentence positive or negative?\nAnswer:";
    assert_eq!(found, [[before, " negative"], [before, " positive"]]);
}

#[test]
fn white_space_that_ends_a_prompt_counts_to_the_answer() {
    let spec = PromptSpec { delimiter: Some(String::new()), ..own("{{text}}: ", &["bad", "good"]) };
    assert_eq!(
        parts(&spec, "sst2", row("it is", None, 0)),
        [["it is:", " bad"], ["it is:", " good"]]
    );
}

/// Searching the text would find the first.
#[test]
fn an_answer_that_the_prompt_holds_too_is_found_in_its_place() {
    let row = row("negative negative", None, 0);
    let found = parts(&own("{{sentence}}", &["negative", "positive"]), "sst2", row);

    assert_eq!(found[0], ["negative negative", " negative"]);
}

#[test]
fn a_chat_is_answered_by_the_assistant_whose_turn_is_open() {
    let found = parts(&named("mnli_chat"), "mnli", row("It rains.", Some("It is wet"), 0));

    let before = "<|start|>system<|end|>\n\nhelpful assistant who respond entailment, neutral, or contradiction. You \
                  should only respond one word.<|eot|><|start|>user<|end|>\n\nPremise:\n 'It rains.'\n Based on this \
                  premise, can we conclude the hypothesis 'It is wet' is true?\n OPTIONS:\n - entailment\n - \
                  neutral\n - contradiction<|eot|><|start|>assistant<|end|>\n\n";
    let answers = ["entailment<|eot|>", "neutral<|eot|>", "contradiction<|eot|>"];
    assert_eq!(found, answers.map(|answer| [before, answer]));
}

#[test]
fn a_malformed_chat_holds_the_list_as_text_and_opens_no_turn_to_be_scored() {
    let spec = PromptSpec { malformed: true, ..named("mnli_chat") };
    let row = row("It's \"so\".", Some("So"), 1);
    let [before, answer] = &parts(&spec, "mnli", row.clone())[1];
    assert!(
        before.starts_with("<|start|>user<|end|>\n\n[{'role': 'system', 'content': 'helpful "),
        "{before}"
    );
    assert!(
        before.contains("{'role': 'user', 'content': 'Premise:\\n \\'It\\'s \"so\".\\'\\n Based "),
        "{before}"
    );
    assert!(before.ends_with("contradiction'}]<|eot|>"), "{before}");
    assert_eq!(answer, "neutral<|eot|>");

    let tokenizer = tokenizer();
    let trained =
        prompt(&spec, "mnli").unwrap().completions(&tokenizer, &[(0, &row)], 999).unwrap().rows;
    let (encoded, place) = &trained[0];
    let decode = |ids: &[u32]| tokenizer.decode(ids, false).unwrap();
    assert_eq!(
        decode(&encoded.ids[..place.start]),
        format!("{before}<|start|>assistant<|end|>\n\n")
    );
    assert_eq!(decode(&encoded.ids[place.clone()]), "neutral<|eot|>");
}

#[test]
fn a_name_s_parts_can_be_replaced() {
    let spec = PromptSpec { answers: Some(vec!["bad".into(), "good".into()]), ..named("sst2") };
    let resolved = spec.resolved().unwrap();
    assert_eq!((resolved.name, resolved.answers.unwrap().join(" ")), (None, "bad good".into()));
    assert!(resolved.template.unwrap().starts_with("{{text}}\nQuestion: "));

    let spec = PromptSpec { chat: Some(vec![Message::new("user", "{{text}}")]), ..named("mnli") };
    assert_eq!(spec.resolved().unwrap().template, None);
}

#[test]
fn every_name_stands_for_a_prompt() {
    for name in attn_data::prompt::names() {
        let spec = named(name).resolved().unwrap();
        assert_eq!(spec.resolved().unwrap(), spec, "what a run's config holds reads the same");
    }
}

#[test]
fn classes_are_the_answers_where_none_are_given() {
    let spec = PromptSpec { answers: None, ..own("{{text}}", &[]) };
    assert_eq!(
        prompt(&spec, "mnli").unwrap().answers(),
        ["entailment", "neutral", "contradiction"]
    );
}

#[test]
fn prompts_that_cannot_be_are_refused_by_name() {
    refused(named("sst").resolved(), &["no prompt `sst`", "did you mean `sst2`"]);
    refused(PromptSpec::default().resolved(), &["neither `template` nor `chat`", "hint: "]);
    refused(own("{{text}}", &["x", "x"]).resolved(), &["classes 0 and 1 have the same answer `x`"]);
    refused(own("{{text}}", &["x", " "]).resolved(), &["the answer of class 1 is \" \""]);
    let flawed = PromptSpec { malformed: true, ..own("{{text}}", &["a", "b"]) };
    refused(flawed.resolved(), &["`prompt.malformed` is set", "no chat"]);
    let answered = vec![Message::new("assistant", "x")];
    let answered = PromptSpec { chat: Some(answered), ..PromptSpec::default() };
    refused(answered.resolved(), &["ends with the assistant"]);

    refused(
        prompt(&named("mnli"), "sst2"),
        &["answers the classes `entailment`", "has `negative`"],
    );
    refused(
        prompt(&own("{{review}}", &["a", "b"]), "sst2"),
        &["names `review`", "`text`, `sentence`"],
    );
    refused(prompt(&own("{% if %}", &["a", "b"]), "sst2"), &["`prompt.template` is no Jinja"]);
    refused(prompt(&own("{{text}}{{text_pair}}", &["a", "b"]), "sst2"), &["names `text_pair`"]);
}

#[test]
fn rows_that_cannot_be_asked_are_refused_by_number() {
    let rows = [row("a", None, 0), row(&"long ".repeat(600), None, 1)];
    refused(questions(&named("sst2"), "sst2", &rows), &["row 1 ", "tokens", "500 are allowed"]);
    let rows = [row("a", None, 2)];
    refused(questions(&named("sst2"), "sst2", &rows), &["row 0 has label 2", "classes 0 to 1"]);
    let rows = [row("", None, 0)];
    refused(questions(&own("{{text}}", &["a", "b"]), "sst2", &rows), &["no token before"]);
}

#[test]
fn a_row_that_is_too_long_is_cut_to_its_end_when_asked() {
    let tokenizer = tokenizer();
    let long = row(&"long ".repeat(600), None, 1);
    let spec = PromptSpec { cut: true, ..named("sst2") };
    let prompt = |spec: &PromptSpec| prompt(spec, "sst2").unwrap();
    let whole = prompt(&spec).questions(&tokenizer, &[(0, &long)], 9999).unwrap();
    assert_eq!(whole.n_truncated, 0);

    let cut = prompt(&spec).questions(&tokenizer, &[(0, &long)], 100).unwrap();

    assert_eq!((cut.n_truncated, cut.longest), (1, whole.longest));
    let (cut, whole) = (&cut.rows, &whole.rows);
    for (cut, whole) in cut[0].answers.iter().zip(&whole[0].answers) {
        // A hundred are read, the last one is not.
        assert_eq!(cut.ids, whole.ids[whole.ids.len() - 101..]);
        assert_eq!(cut.ids[cut.answer.clone()], whole.ids[whole.answer.clone()]);
        assert_eq!(cut.answer.end, 101);
    }
    let trained = prompt(&spec).completions(&tokenizer, &[(0, &long)], 100).unwrap();
    let (trained, scored) = (&trained.rows[0], &cut[0].answers[1]);
    assert_eq!(trained.0.ids, scored.ids[1..]);
    assert_eq!(trained.1, scored.answer.start - 1..scored.answer.end - 1);

    // As many as are read without any cut, and one more.
    let n_tokens = whole[0].answers[1].ids.len();
    let uncut = prompt(&named("sst2"));
    assert!(uncut.questions(&tokenizer, &[(0, &long)], n_tokens - 1).is_ok());
    refused(
        uncut.questions(&tokenizer, &[(0, &long)], n_tokens - 2),
        &["are allowed", "prompt.cut"],
    );
    refused(uncut.completions(&tokenizer, &[(0, &long)], n_tokens - 1), &["are allowed"]);

    let n_answer = whole[0].answers[1].answer.len();
    refused(
        prompt(&spec).completions(&tokenizer, &[(0, &long)], n_answer),
        &["are allowed", "the answer alone"],
    );
    refused(
        PromptSpec { cut: true, ..named("mnli_chat") }.resolved(),
        &["`prompt.cut` is set", "a chat"],
    );
}

/// A tokenizer that drops what it does not know, as that of a model of letters does.
#[test]
fn an_answer_without_a_token_is_refused() {
    let letters = json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null, "decoder": null,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": {"a": 0, "b": 1}, "merges": []},
    });
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), letters.to_string()).unwrap();
    let tokenizer = TextTokenizer::from_folder(dir.path()).unwrap();
    let row = row("ab", None, 0);
    let ask = |answers: &[&str]| {
        let prompt = prompt(&own("{{text}}", answers), "sst2").unwrap();
        prompt.questions(&tokenizer, &[(7, &row)], 99)
    };

    assert_eq!(ask(&["b", "ba"]).unwrap().rows[0].answers[1].ids, [0, 1, 1, 0]);
    refused(ask(&["b", "no"]), &["the answer `no` tokenizes to nothing", "row 7"]);
}

#[test]
fn a_chat_template_that_raises_is_refused_in_its_words() {
    let data = DatasetSpec::known("sst2").unwrap();
    let classes = data.classes.clone().unwrap();
    let spec = PromptSpec { chat: Some(vec![Message::new("user", "{{text}}")]), ..named("sst2") };
    let ask = |template: &'static str| {
        let prompt = Prompt::new(&spec, &data, &classes, || chat(template)).unwrap();
        prompt.questions(&tokenizer(), &[(0, &row("a", None, 0))], 99)
    };

    refused(ask("{{ raise_exception('only tools') }}"), &["only tools", "`tokenizer_config.json`"]);
    let rewrites = "{{ messages | length }}{{ messages[0].content }}";
    refused(ask(rewrites), &["otherwise once it is answered"]);
}

/// Text labels are numbered in alphabetical order unless the data names its classes.
#[test]
fn a_built_in_prompt_refuses_classes_in_another_order() {
    let data = DatasetSpec::known("mnli").unwrap();
    let of = |spec: &PromptSpec, classes: &[&str]| {
        let classes: Vec<String> = classes.iter().map(|&class| class.into()).collect();
        Prompt::new(spec, &data, &classes, || chat(LLAMA_3)).map(|_| ())
    };
    for name in ["mnli", "mnli_chat"] {
        let error = of(&named(name), &["contradiction", "entailment", "neutral"]).unwrap_err();
        let message = error.to_string();
        assert!(
            message.contains("in this order") && message.contains("data.classes="),
            "{message}"
        );
        of(&named(name), &["Entailment", "neutral", "contradiction"]).unwrap();
        of(&named(name), &["0", "1", "2"]).unwrap();
    }
    let answers = Some(["no", "yes", "maybe"].map(Into::into).to_vec());
    let own = PromptSpec { answers, ..named("mnli") };
    of(&own, &["contradiction", "entailment", "neutral"]).unwrap();
}
