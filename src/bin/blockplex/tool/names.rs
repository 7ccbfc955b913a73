//! The names by which images are shown: as the command line and the images themselves give them,
//! not as the kernel resolves them.

use std::collections::BTreeMap;

use blockplex::drivers::options::{Number, Value};
use blockplex::drivers::qcow2::Qcow2;
use blockplex::file_name::protocol_of;
use blockplex::graph::NodeView;
use blockplex::graph::driver::Role;
use blockplex::{NodeId, OptionTree};

use super::json::quoted;
use super::open::Image;

/// What the image `filename` means by `name`.
pub fn beside(filename: &str, name: &str) -> String {
    if name.starts_with('/') || protocol_of(name).is_some() {
        return name.to_owned();
    }
    let directory = filename.rfind('/').and_then(|slash| filename.get(..=slash)).unwrap_or("");
    format!("{directory}{name}")
}

/// The name of the image that `tree` describes: its file's, where that says all.
pub fn of_tree(tree: &OptionTree) -> String {
    file_name(tree).unwrap_or_else(|| format!("json:{}", json(&Value::Tree(tree.clone()))))
}

/// The name of the file of the image that `tree` describes.
pub fn of_file(tree: &OptionTree) -> String {
    match tree.get("file").or_else(|| tree.get("image")) {
        Some(Value::Tree(file)) => of_tree(file),
        _ => of_tree(tree),
    }
}

/// The options that do not make it another image.
const GENERIC: [&str; 9] = [
    "driver",
    "cache",
    "discard",
    "detect-zeroes",
    "read-only",
    "force-share",
    "node-name",
    "locking",
    "filename",
];

fn file_name(tree: &OptionTree) -> Option<String> {
    let plain = |known: &[&str]| {
        let mut keys = tree.iter().map(|(key, _)| key);
        keys.all(|key| GENERIC.contains(&key) || known.contains(&key))
    };
    let driver = match tree.get("driver") {
        Some(Value::String(driver)) => driver.as_str(),
        _ => "",
    };
    match (driver, tree.get("filename"), tree.get("file")) {
        ("null-co", None, None) if plain(&[]) => Some("null-co://".to_owned()),
        ("file" | "host_device" | "", Some(Value::String(name)), None) if plain(&[]) => {
            Some(name.clone())
        }
        ("" | "raw" | "qcow2" | "luks", None, Some(Value::Tree(file)))
            if plain(&["file", "key-secret", "encrypt"]) =>
        {
            file_name(file)
        }
        _ => None,
    }
}

fn json(value: &Value) -> String {
    match value {
        Value::String(text) => quoted(text),
        Value::Number(Number::Unsigned(number)) => number.to_string(),
        Value::Number(number) => number.to_string(),
        Value::Bool(value) => value.to_string(),
        Value::Null => "null".to_owned(),
        Value::List(items) => {
            let items: Vec<_> = items.iter().map(json).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Tree(tree) => {
            let driver = tree.iter().filter(|(key, _)| *key == "driver");
            let others = tree.iter().filter(|(key, _)| match *key {
                "filename" => true,
                key => !GENERIC.contains(&key),
            });
            let members: Vec<_> = driver
                .chain(others)
                .map(|(key, value)| format!("{}: {}", quoted(key), json(value)))
                .collect();
            format!("{{{}}}", members.join(", "))
        }
    }
}

/// The names of an image's files: of each node below it that holds one.
pub fn of_files(image: &Image) -> BTreeMap<NodeId, String> {
    let mut names = BTreeMap::new();
    let topology = image.layer().graph().topology();
    let mut next = topology.node(image.root).cloned();
    let mut filename = image.shown_name.clone();
    while let Some(view) = next {
        name_files(&mut names, &view, &filename);
        if view.id() == image.root
            && let Some(file) =
                [Role::File, Role::Filtered].into_iter().find_map(|role| view.edge_in_role(role))
            && let Some(child) = view.child(file)
        {
            name_files(&mut names, child, &image.shown_file);
        }
        next = view.edge_in_role(Role::Backing).and_then(|edge| view.child(edge)).cloned();
        if let Some(backing) = view.driver_as::<Qcow2>().and_then(Qcow2::backing) {
            filename = beside(&filename, &String::from_utf8_lossy(&backing.name));
        }
    }
    names
}

fn name_files(names: &mut BTreeMap<NodeId, String>, view: &NodeView, filename: &str) {
    names.insert(view.id(), filename.to_owned());
    for (index, edge) in view.edges().iter().enumerate() {
        let Some(child) = view.child(index) else { continue };
        match edge.role {
            Role::Backing => {}
            Role::Data => {
                let stated = view
                    .driver_as::<Qcow2>()
                    .and_then(|image| image.information().data_file.clone());
                let stated = stated.unwrap_or_default();
                let name = beside(filename, &String::from_utf8_lossy(&stated));
                name_files(names, child, &name);
            }
            Role::File | Role::Filtered => name_files(names, child, filename),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_an_image_are_relative_to_it() {
        assert_eq!(beside("a", "b"), "b");
        assert_eq!(beside("x/a", "../b"), "x/../b");
        assert_eq!(beside("x/a", "/b"), "/b");
        assert_eq!(beside("x/a", "nbd:b"), "nbd:b");
    }

    #[test]
    fn an_image_goes_by_its_files_name_or_by_its_description() {
        let of = |text| of_tree(&OptionTree::parse(text, None).unwrap());
        assert_eq!(of("driver=qcow2,file.driver=file,file.filename=a,discard=unmap"), "a");
        assert_eq!(
            of("driver=raw,file.driver=null-co,file.size=1M"),
            "json:{\"driver\": \"raw\", \"file\": {\"driver\": \"null-co\", \"size\": \"1M\"}}"
        );
    }
}
