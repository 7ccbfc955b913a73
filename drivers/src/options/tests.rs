//! What the three spellings promise together, and what taking and finishing promise.

use proptest::prelude::*;

use super::*;

fn keyval(text: &str) -> OptionTree {
    OptionTree::from_keyval(text, None).expect(text)
}

fn json(text: &str) -> OptionTree {
    OptionTree::from_json(text).expect(text)
}

fn keyval_error(text: &str) -> String {
    OptionTree::from_keyval(text, None).expect_err(text).to_string()
}

fn json_error(text: &str) -> String {
    OptionTree::from_json(text).expect_err(text).to_string()
}

#[test]
fn dots_nest_and_doubled_commas_are_one_comma() {
    let mut tree = keyval("driver=qcow2,file.driver=file,file.filename=/a,,b,,,,c,x=");
    assert_eq!(tree.take_str("driver"), Ok(Some("qcow2".into())));
    let mut file = tree.take_subtree("file").unwrap().unwrap();
    assert_eq!(file.take_str("filename"), Ok(Some("/a,b,,c".into())));
    assert_eq!(file.require_str("driver"), Ok("file".into()));
    assert_eq!(tree.take_str("x"), Ok(Some(String::new())));
    assert_eq!(file.finish(), Ok(()));
    assert_eq!(tree.finish(), Ok(()));
}

#[test]
fn the_implied_key_serves_the_first_bare_value_only() {
    let parse = |text| OptionTree::from_keyval(text, Some("driver"));
    assert_eq!(parse("qcow2,a=1"), Ok(keyval("driver=qcow2,a=1")));
    assert_eq!(parse("a,,b"), Ok(keyval("driver=a,,b")));
    assert_eq!(parse("driver=qcow2"), Ok(keyval("driver=qcow2")));
    assert_eq!(parse(""), Ok(OptionTree::new()));
    for text in ["a=1,qcow2", "qcow2,raw", ",a=1"] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.starts_with("expected '='"), "{text}: {error}");
    }
    let error = parse("qcow2,driver=raw").unwrap_err().to_string();
    assert_eq!(error, "option 'driver': given twice");
}

#[test]
fn a_trailing_comma_ends_the_text() {
    assert_eq!(keyval("a=1,"), keyval("a=1"));
    assert!(
        OptionTree::from_keyval("a=1,,,", None).is_ok_and(|tree| tree == json(r#"{"a": "1,"}"#))
    );
}

#[test]
fn indices_make_lists_in_any_order() {
    let tree = keyval("children.1.driver=b,children.0.driver=a,children.2=c");
    assert_eq!(tree, json(r#"{"children": [{"driver": "a"}, {"driver": "b"}, "c"]}"#));
    let many: Vec<String> = (0..11).rev().map(|n| format!("l.{n}={n}")).collect();
    match keyval(&many.join(",")).get("l") {
        Some(Value::List(items)) => assert_eq!(items[10], Value::String("10".into())),
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_spelling_gives_the_same_tree() {
    let nested = json(r#"{"driver": "raw", "file": {"driver": "file", "filename": "/a"}}"#);
    for other in [
        r#"{"driver": "raw", "file.driver": "file", "file.filename": "/a"}"#,
        r#"{"file": {"driver": "file"}, "file.filename": "/a", "driver": "raw"}"#,
        r#"{"file.filename": "/a", "file": {"driver": "file"}, "driver": "raw"}"#,
        r#"json:{"driver":"raw","file":{"driver":"file","filename":"/a"}}"#,
        r"{'driver': 'raw', 'file': {'driver': 'file', 'filename': '/a'}}",
        "raw,file.driver=file,file.filename=/a",
    ] {
        assert_eq!(OptionTree::parse(other, Some("driver")), Ok(nested.clone()), "{other}");
    }
    assert!(OptionTree::from_json_url("{}").is_err());
}

#[test]
fn either_quote_may_stand_in_strings_of_the_other() {
    let expected = json(r#"{"a": "it's", "b": "\"x\"\\"}"#);
    for text in [r#"{'a': 'it\'s', 'b': '"x"\\'}"#, r#"{"a": "it\'s", 'b': '\"x\"\\'}"#] {
        assert_eq!(json(text), expected, "{text}");
    }
    for text in ["{'a: 1}", "{'a\": 1}", "{'a': 'b\\"] {
        assert!(json_error(text).starts_with("malformed JSON"), "{text}");
    }
}

#[test]
fn a_key_given_twice_is_an_error_that_names_it() {
    for (text, expected) in [
        ("a=1,a=1", "option 'a': given twice"),
        ("a.b=1,a.b=2", "option 'a.b': given twice"),
        ("l.0=1,l.0=2", "option 'l.0': given twice"),
    ] {
        assert_eq!(keyval_error(text), expected, "{text}");
    }
    for (text, expected) in [
        (r#"{"a": 1, "a": 1}"#, "option 'a': given twice"),
        (r#"{"a": {"b": 1, "b": 2}}"#, "option 'a.b': given twice"),
        (r#"{"a": {"b": 1}, "a.b": 2}"#, "option 'a.b': given twice"),
        (r#"{"a": 1, "\u0061": 1}"#, "option 'a': given twice"),
        (r#"{"l": [{}, {"x": [], "x": 1}]}"#, "option 'l.1.x': given twice"),
        (r#"{"a": {"b": 1}, "a": {"c": 1}}"#, "option 'a': given twice"),
        (r#"{'a': 1, "a": 1}"#, "option 'a': given twice"),
    ] {
        assert_eq!(json_error(text), expected, "{text}");
    }
}

#[test]
fn the_same_key_in_different_objects_is_not_given_twice() {
    let tree = json(r#"{"a": {"x": "a"}, "b": {"x": "b"}, "l": [{"x": "x"}, {"x": ": x"}]}"#);
    assert_eq!(tree, keyval("a.x=a,b.x=b,l.0.x=x,l.1.x=: x"));
}

#[test]
fn a_value_cannot_also_be_a_parent() {
    for text in ["a=1,a.b=2", "a.b=2,a=1", "a.b.c=1,a.b=2", "a.b=2,a.b.c=1"] {
        let error = keyval_error(text);
        assert!(error.ends_with("with further options below it"), "{error}");
    }
    for text in [r#"{"a": null, "a.b": 2}"#, r#"{"a.b": 1, "a": []}"#] {
        assert!(json_error(text).contains("further options below it"));
    }
}

#[test]
fn bad_indices_are_refused() {
    for text in [
        "l.0=a,l.2=b",
        "l.1=a",
        "l.0=a,l.x=b",
        "l.00=a",
        "l.01=a",
        "l.0x=a",
        "l.99999999999999999999=a",
        "l.999999999=a",
        "l.-1=a",
        "0=a",
        "0.a=1,1.a=2",
    ] {
        keyval_error(text);
    }
    assert_eq!(
        keyval_error("l.0=a,l.2=b"),
        "option 'l.2': the indices of this list of 2 do not run from 0 on without a gap"
    );
}

#[test]
fn impossible_names_are_refused_and_shown_escaped() {
    let long = format!("{}=1", "a".repeat(129));
    for text in ["=1", "a..b=1", ".a=1", "a.=1", "a b=1", "-a=1", "ä=1", "a/b=1", &long] {
        keyval_error(text);
    }
    assert_eq!(
        json_error("{\"a\\u001b[2J\": 1}"),
        r"key name 'a\x1b[2J' has characters a key cannot have"
    );
    assert_eq!(json_error(r#"{"": 1}"#), "key name '' is empty");
    assert_eq!(json_error(r#"{"a": {"": 1}}"#), "key name '' is empty");
}

#[test]
fn depth_and_length_are_bounded() {
    let deep = |levels: usize| format!("{}=1", vec!["a"; levels].join("."));
    assert!(OptionTree::from_keyval(&deep(MAX_DEPTH), None).is_ok());
    assert!(keyval_error(&deep(MAX_DEPTH + 1)).contains("deeper"));
    assert!(OptionTree::from_keyval(&deep(MAX_TEXT / 4), None).is_err());
    let nested = |levels: usize| format!("{}1{}", "{\"a\":".repeat(levels), "}".repeat(levels));
    assert!(OptionTree::from_json(&nested(MAX_DEPTH)).is_ok());
    assert!(json_error(&nested(MAX_DEPTH + 1)).contains("levels deep"));
    assert!(json_error(&"[".repeat(MAX_TEXT)).contains("levels deep"));
    assert!(keyval_error(&format!("a={}", "x".repeat(MAX_TEXT))).contains("too long"));
}

#[test]
fn malformed_json_is_refused() {
    for text in [
        "",
        "{",
        "}",
        "[]",
        "1",
        "null",
        "\"a\"",
        "{\"a\"}",
        "{\"a\":}",
        "{'a': 1",
        "{\"a\": 1,}",
        "{} {}",
        "{\"a\": \"\\",
        "{:",
        "[:]",
        "]]]",
    ] {
        assert!(json_error(text).starts_with("malformed JSON"), "{text}");
    }
}

#[test]
fn typed_values_come_from_both_spellings() {
    for mut tree in [
        keyval("b=off,n=0x10,s=1.5k,e=unmap,big=18446744073709551615"),
        json(r#"{"b": false, "n": 16, "s": 1536, "e": "unmap", "big": 18446744073709551615}"#),
    ] {
        assert_eq!(tree.take_bool("b"), Ok(Some(false)));
        assert_eq!(tree.take_u64_within("n", 1..=16), Ok(Some(16)));
        assert_eq!(tree.take_size("s"), Ok(Some(1536)));
        let choices = [("ignore", 0), ("unmap", 1)];
        assert_eq!(tree.take_enum("e", &choices), Ok(Some(1)));
        assert_eq!(tree.take_u64("big"), Ok(Some(u64::MAX)));
        assert_eq!(tree.take_u64("absent"), Ok(None));
        assert_eq!(tree.finish(), Ok(()));
    }
    let mut detect = json(r#"{"detect-zeroes": true}"#);
    let choices = [("on", 'a'), ("off", 'b')];
    assert_eq!(detect.take_enum("detect-zeroes", &choices), Ok(Some('a')));
}

#[test]
fn wrong_values_name_their_full_path() {
    let mut tree = keyval("file.size=big,file.on=maybe,file.n=010,file.e=x,file.sub=1,file.r=9");
    let mut file = tree.take_subtree("file").unwrap().unwrap();
    let shown = |error: OptionError| error.to_string();
    assert_eq!(
        file.take_size("size").map_err(shown),
        Err("option 'file.size': 'big' is not a size".into())
    );
    assert_eq!(
        file.take_bool("on").map_err(shown),
        Err("option 'file.on': 'maybe' is neither 'on' nor 'off'".into())
    );
    assert_eq!(
        file.take_u64("n").map_err(shown),
        Err("option 'file.n': '010' is not a whole number within 64 bits".into())
    );
    assert_eq!(
        file.take_enum("e", &[("a", ()), ("b", ())]).map_err(shown),
        Err("option 'file.e': 'x' is none of a, b".into())
    );
    assert_eq!(
        file.take_subtree("sub").map_err(shown),
        Err("option 'file.sub': must be a group of options, not a string".into())
    );
    assert_eq!(
        file.take_u64_within("r", 1..=8).map_err(shown),
        Err("option 'file.r': 9 is not within 1 to 8".into())
    );
    assert_eq!(
        file.require_str("filename").map_err(shown),
        Err("option 'file.filename': must be given".into())
    );
}

#[test]
fn json_numbers_that_are_not_whole_or_not_positive_are_refused() {
    for text in ["-1", "1.5", "1e3", "18446744073709551616"] {
        let mut tree = json(&format!(r#"{{"n": {text}, "s": {text}, "b": {text}}}"#));
        assert!(tree.take_u64("n").is_err(), "{text}");
        assert!(tree.take_size("s").is_err(), "{text}");
        assert!(tree.take_bool("b").is_err(), "{text}");
    }
}

#[test]
fn references_are_names_descriptions_or_nothing() {
    let mut tree = json(r#"{"a": "node0", "b": {"driver": "file"}, "c": null, "d": 1}"#);
    assert_eq!(tree.take_reference("a"), Ok(Some(Reference::Name("node0".into()))));
    match tree.take_reference("b") {
        Ok(Some(Reference::Tree(mut inner))) => {
            assert_eq!(inner.path_of("x"), "b.x");
            assert_eq!(inner.require_str("driver"), Ok("file".into()));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(tree.take_reference("c"), Ok(Some(Reference::Nothing)));
    assert!(tree.take_reference("d").is_err());
    assert_eq!(tree.take_reference("e"), Ok(None));
    assert_eq!(keyval("backing=").take_reference("backing"), Ok(Some(Reference::Nothing)));
}

#[test]
fn lists_of_nodes_and_of_groups_know_their_paths() {
    let mut tree = keyval("c.0=a,c.1.driver=b,g.0.x=1,g.1.y=2");
    let children = tree.take_reference_list("c").unwrap().unwrap();
    assert_eq!(children[0], Reference::Name("a".into()));
    match &children[1] {
        Reference::Tree(inner) => assert_eq!(inner.path_of("driver"), "c.1.driver"),
        other => panic!("{other:?}"),
    }
    let groups = tree.take_subtree_list("g").unwrap().unwrap();
    assert_eq!(groups[1].path_of("y"), "g.1.y");
    assert!(keyval("g.0=1").take_subtree_list("g").is_err());
    assert!(keyval("g=1").take_reference_list("g").is_err());
}

#[test]
fn finish_names_every_option_nobody_took() {
    let mut tree = keyval("driver=x,a.b.c=1,a.l.0=1,z=2");
    tree.take_str("driver").unwrap();
    assert_eq!(tree.finish().unwrap_err().to_string(), "unknown options 'a.b.c', 'a.l.0', 'z'");
    let mut tree = keyval("file.x=1");
    let file = tree.take_subtree("file").unwrap().unwrap();
    assert_eq!(file.finish().unwrap_err().to_string(), "option 'file.x': is unknown here");
    let empty_group = json(r#"{"a": {}}"#);
    assert_eq!(empty_group.finish().unwrap_err().path, "a");
    let many: Vec<String> = (0..30).map(|n| format!("o{n}=1")).collect();
    let message = keyval(&many.join(",")).finish().unwrap_err().message;
    assert!(message.ends_with(" and 10 more"), "{message}");
}

#[test]
fn what_keyval_cannot_say_is_an_error() {
    for text in [r#"{"a": null}"#, r#"{"a": {}}"#, r#"{"a": [[]]}"#] {
        assert!(json(text).to_keyval().is_err(), "{text}");
    }
    assert_eq!(json(r#"{"a": true, "b": -1, "c": 1.5}"#).to_keyval(), Ok("a=on,b=-1,c=1.5".into()));
}

/// Trees whose leaves are strings and whose groups are not empty: all that keyval can say.
fn arbitrary_tree() -> impl Strategy<Value = OptionTree> {
    let leaf = any::<String>().prop_map(Value::String);
    let value = leaf.prop_recursive(4, 32, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 1..4).prop_map(Value::List),
            prop::collection::btree_map(NAME, inner, 1..4)
                .prop_map(|entries| Value::Tree(OptionTree { path: String::new(), entries })),
        ]
    });
    prop::collection::btree_map(NAME, value, 0..5)
        .prop_map(|entries| OptionTree { path: String::new(), entries })
}

const NAME: &str = "[A-Za-z_][A-Za-z0-9_-]{0,6}";

/// The same tree as JSON text.
fn to_json(value: &Value) -> serde_json::Value {
    match value {
        Value::String(text) => text.as_str().into(),
        Value::List(items) => items.iter().map(to_json).collect(),
        Value::Tree(tree) => {
            tree.iter().map(|(key, value)| (key.to_owned(), to_json(value))).collect()
        }
        other => panic!("{other:?}"),
    }
}

proptest! {
    #[test]
    fn a_tree_survives_the_way_through_keyval(tree in arbitrary_tree()) {
        let text = tree.to_keyval().unwrap();
        prop_assert_eq!(OptionTree::from_keyval(&text, None), Ok(tree));
    }

    #[test]
    fn a_tree_survives_the_way_through_json(tree in arbitrary_tree()) {
        let text = to_json(&Value::Tree(tree.clone())).to_string();
        prop_assert_eq!(OptionTree::from_json(&text), Ok(tree));
    }

    #[test]
    fn no_text_makes_a_parser_panic(text in "[a-c0-2.,=:{}\\[\\]\"\\\\ \\PC]{0,40}") {
        if let Ok(tree) = OptionTree::parse(&text, Some("driver")) {
            // Whatever was accepted from keyval can be said again.
            if !text.starts_with('{') && !text.starts_with(JSON_URL_PREFIX) {
                let again = tree.to_keyval().unwrap();
                prop_assert_eq!(OptionTree::from_keyval(&again, None), Ok(tree));
            }
        }
    }

    #[test]
    fn no_text_makes_the_size_parser_panic(text in "[0-9.xkKeEpP-]{0,24}") {
        let accepted = parse_size(&text);
        let looks_right = text.starts_with("0x")
            || text.bytes().next().is_some_and(|first| first.is_ascii_digit() || first == b'.');
        prop_assert!(accepted.is_err() || looks_right);
    }
}
