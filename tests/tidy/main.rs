//! The rules of the house that a machine can check: where `unsafe` may stand, how long a file may
//! be, what may not be left behind, and which way dependencies run.

#![expect(clippy::unwrap_used, reason = "a test that cannot read the tree should fail loudly")]

use std::fs;
use std::path::{Path, PathBuf};

/// The files that may contain `unsafe`. Adding one is a decision; `design.md` says what they do.
const UNSAFE: [&str; 14] = [
    "drivers/src/file/lock.rs",
    "drivers/src/qcow2/slice_cache/directory.rs",
    "graph/src/path/leaf.rs",
    "graph/src/path/queue/core.rs",
    "io/src/buffer/block.rs",
    "io/src/buffer/vector.rs",
    "io/src/engine/op.rs",
    "io/src/engine/ring.rs",
    "io/src/engine/submit.rs",
    "io/src/engine/threads.rs",
    "io/src/event_loop/tests/fallback.rs",
    "io/src/event_loop/tests/file.rs",
    "io/src/lock/mutex.rs",
    "io/src/lock/rwlock.rs",
];

/// The most lines of a library file.
const LONGEST: usize = 800;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Every Rust file of the libraries and the program, with its name from the root.
fn sources() -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut pending: Vec<PathBuf> =
        ["io", "drain", "graph", "drivers", "src"].iter().map(|name| root().join(name)).collect();
    while let Some(folder) = pending.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
                found.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(found.len() > 100, "the sources were not found: {} files", found.len());
    found
}

#[test]
fn unsafe_stands_only_in_the_listed_files() {
    for (name, text) in sources() {
        let has = text.contains("expect(unsafe_code") || text.contains("expect(\n    unsafe_code");
        let listed = UNSAFE.contains(&name.as_str());
        assert!(!has || listed, "{name} permits unsafe code and is not on the list");
        assert!(has || !listed, "{name} is on the list and needs no unsafe code");
    }
}

#[test]
fn every_file_says_first_what_it_is_and_none_is_too_long() {
    for (name, text) in sources() {
        let is_test = name.contains("/tests") || name.contains("testing");
        assert!(
            is_test || text.starts_with("//!"),
            "{name} does not open with a page about itself"
        );
        let lines = text.lines().count();
        assert!(is_test || lines <= LONGEST, "{name} has {lines} lines");
        assert!(!name.ends_with("/mod.rs"), "{name}: modules are `foo.rs` and `foo/`");
    }
}

#[test]
fn nothing_is_left_behind() {
    // Spelt in two parts, so that this page does not find itself.
    let words =
        [["to", "do!("], ["unimple", "mented!("], ["FIX", "ME"], ["#[all", "ow("], ["db", "g!("]];
    for (name, text) in sources() {
        for parts in words {
            let word = parts.concat();
            assert!(!text.contains(&word), "{name} contains {word}");
        }
    }
}

#[test]
fn dependencies_between_the_crates_run_one_way() {
    let allowed: [(&str, &[&str]); 5] = [
        ("io", &[]),
        ("drain", &[]),
        ("graph", &["io", "drain"]),
        ("drivers", &["io", "drain", "graph"]),
        (".", &["io", "drain", "graph", "drivers"]),
    ];
    for (folder, below) in allowed {
        let manifest = fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap();
        let uses = manifest.split("[package]").nth(1).unwrap();
        for crate_name in ["io", "drain", "graph", "drivers"] {
            let needed = uses.contains(&format!("blockplex-{crate_name}.workspace"));
            assert!(!needed || below.contains(&crate_name), "{folder} uses {crate_name}");
        }
    }
}

/// The numbers of the truths at the head of a file: `//! - **W1** …` or `//! W1. …`.
fn truths(text: &str) -> Vec<String> {
    let number = |line: &str| {
        let line = line.strip_prefix("//! ")?;
        let marked = line.strip_prefix("- **").and_then(|rest| rest.split_once("**"));
        let (number, _) = marked.or_else(|| line.split_once(". "))?;
        let digits = number.trim_start_matches(|letter: char| letter.is_ascii_uppercase());
        let is_number = !digits.is_empty() && digits.chars().all(|digit| digit.is_ascii_digit());
        (is_number && digits.len() < number.len()).then(|| number.to_owned())
    };
    text.lines().filter_map(number).collect()
}

/// The words between backquotes.
fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// Every numbered truth of the qcow2 driver stands in the list, with what holds it and with tests
/// that exist; and the list has no other.
#[test]
fn every_truth_of_qcow2_names_what_holds_it_and_tests_that_exist() {
    let sources = sources();
    let is_meant = |name: &str| {
        name == "drivers/src/qcow2.rs"
            || name == "drivers/src/dirty_bitmap.rs"
            || name.starts_with("drivers/src/qcow2/") && !name.contains("/tests")
    };
    let mut stated = Vec::new();
    for (_, text) in sources.iter().filter(|(name, _)| is_meant(name)) {
        stated.extend(truths(text));
    }
    assert!(stated.len() > 50, "the truths were not found: {stated:?}");
    let list = fs::read_to_string(root().join("drivers/src/qcow2/truths.rs")).unwrap();
    let mut listed = Vec::new();
    for row in list.lines().filter_map(|line| line.strip_prefix("//! | ")) {
        let columns: Vec<&str> = row.trim_end_matches(" |").split(" | ").collect();
        let [number, _, held_by, tests] = columns[..] else { panic!("{row}: not four columns") };
        if number == "truth" || number.starts_with("---") {
            continue;
        }
        listed.push(number.to_owned());
        for function in quoted(held_by) {
            let is_there = |kind: &str| {
                let declared = format!("{kind} {function}");
                sources.iter().any(|(_, text)| text.contains(&declared))
            };
            assert!(is_there("fn") || is_there("struct"), "{number}: there is no `{function}`");
        }
        assert!(!quoted(tests).is_empty(), "{number} names no test");
        for test in quoted(tests) {
            let is_test = |text: &str| {
                let Some(at) = text.find(&format!("fn {test}(")) else { return false };
                let before: Vec<&str> = text[..at].lines().rev().take(4).collect();
                before.iter().any(|line| line.contains("#[test]"))
            };
            let found = sources.iter().any(|(_, text)| is_test(text));
            assert!(found, "{number}: there is no test `{test}`");
        }
    }
    let missing: Vec<_> = stated.iter().filter(|truth| !listed.contains(truth)).collect();
    assert!(missing.is_empty(), "drivers/src/qcow2/truths.rs lacks {missing:?}");
    let unknown: Vec<_> = listed.iter().filter(|truth| !stated.contains(truth)).collect();
    assert!(unknown.is_empty(), "drivers/src/qcow2/truths.rs has {unknown:?}, which nobody states");
    let (mut sorted, count) = (stated.clone(), stated.len());
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), count, "a number is used twice: {stated:?}");
}
