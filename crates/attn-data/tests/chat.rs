//! Chat templates against what transformers makes of them (`scripts/make_chat_goldens.py`).

use attn_data::chat::{ChatTemplate, Message, python_repr};
use serde_json::Value;

fn goldens() -> Value {
    serde_json::from_str(include_str!("chat/goldens.json")).unwrap()
}

fn messages(case: &Value) -> Vec<Message> {
    serde_json::from_value(case["messages"].clone()).unwrap()
}

#[test]
fn conversations_are_written_as_transformers_writes_them() {
    let goldens = goldens();
    let mut n_refused = 0;
    for case in goldens["cases"].as_array().unwrap() {
        let name = case["template"].as_str().unwrap();
        let template = &goldens["templates"][name];
        let tokens = template["tokens"].as_object().unwrap().clone();
        let template =
            ChatTemplate::new(template["source"].as_str().unwrap(), tokens, "golden").unwrap();

        let written =
            template.render(&messages(case), case["add_generation_prompt"].as_bool().unwrap());

        let shown = format!("{name}, {}", case["chat"]);
        match (written, case["text"].as_str()) {
            (Ok(text), Some(expected)) => assert_eq!(text, expected, "{shown}"),
            (Err(error), None) => {
                let (error, words) = (error.to_string(), case["error"].as_str().unwrap());
                assert!(error.contains(words) && error.contains("`golden`"), "{shown}: {error}");
                n_refused += 1;
            }
            (written, expected) => panic!("{shown}: {written:?}, expected {expected:?}"),
        }
    }
    assert!(n_refused >= 2, "a template that raises is among them");
}

#[test]
fn messages_are_printed_as_python_prints_them() {
    for case in goldens()["cases"].as_array().unwrap() {
        assert_eq!(python_repr(&messages(case)), case["repr"].as_str().unwrap());
    }
}

#[test]
fn a_template_that_does_not_end_is_refused() {
    let nested = "{% for i in range(90000) %}".repeat(3) + "x" + &"{% endfor %}".repeat(3);
    for source in [nested.as_str(), "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"] {
        let template = ChatTemplate::new(source, Default::default(), "x.jinja").unwrap();
        let error = template.render(&[Message::new("user", "hi")], true).unwrap_err().to_string();
        assert!(error.contains("x.jinja"), "{error}");
    }
}
