//! The names by which images are shown: as the command line and the images themselves give them,
//! not as the kernel resolves them.

use std::collections::BTreeMap;
use std::sync::Arc;

use blockplex::drivers::options::Value;
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
    plain_name(tree).unwrap_or_else(|| format!("json:{}", description(tree)))
}

/// The options that make it another image, in the order in which the peer prints them (that of its
/// hash table); `inject-error` and `set-state` have one for each of their members.
const TELLING: [(&str, &[&str]); 16] = [
    ("opt-write-zero", &["blkdebug"]),
    ("read-zeroes", &["null-co"]),
    ("max-write-zero", &["blkdebug"]),
    ("offset", &["raw"]),
    ("max-transfer", &["blkdebug"]),
    ("encrypt.key-secret", &["qcow2"]),
    ("config", &["blkdebug"]),
    ("filename", &["file", "host_device"]),
    ("size", &["raw", "null-co", "memory"]),
    ("opt-discard", &["blkdebug"]),
    ("key-secret", &["luks"]),
    ("max-discard", &["blkdebug"]),
    ("align", &["blkdebug"]),
    ("inject-error", &["blkdebug"]),
    ("set-state", &["blkdebug"]),
    ("x-image", &["blkdebug"]),
];

/// All keys in that order.
const ORDER: [&str; 19] = [
    "opt-write-zero",
    "read-zeroes",
    "max-write-zero",
    "offset",
    "image",
    "data-file",
    "max-transfer",
    "encrypt.key-secret",
    "driver",
    "config",
    "filename",
    "size",
    "errno",
    "event",
    "opt-discard",
    "file",
    "key-secret",
    "max-discard",
    "align",
];

/// The keys of nodes below.
const BELOW: [&str; 3] = ["image", "data-file", "file"];

fn driver_of(tree: &OptionTree) -> &str {
    match tree.get("driver") {
        Some(Value::String(driver)) => driver,
        _ if tree.contains("filename") => "file",
        _ => "",
    }
}

/// The options that make it another image, by their dotted names.
fn telling(tree: &OptionTree) -> Vec<(String, String)> {
    let driver = driver_of(tree);
    let mut found = Vec::new();
    for (key, drivers) in TELLING {
        if !drivers.contains(&driver) {
            continue;
        }
        let value = match key.split_once('.') {
            Some((group, member)) => match tree.get(group) {
                Some(Value::Tree(group)) => group.get(member),
                _ => None,
            },
            None => tree.get(key),
        };
        if let Some(value) = value {
            flatten(key, value, &mut found);
        }
    }
    found
}

fn flatten(key: &str, value: &Value, found: &mut Vec<(String, String)>) {
    match value {
        Value::String(text) => found.push((key.to_owned(), quoted(text))),
        Value::Number(number) => found.push((key.to_owned(), number.to_string())),
        Value::Bool(value) => found.push((key.to_owned(), value.to_string())),
        Value::Null => found.push((key.to_owned(), "null".to_owned())),
        Value::List(items) => {
            for (index, item) in items.iter().enumerate() {
                flatten(&format!("{key}.{index}"), item, found);
            }
        }
        Value::Tree(tree) => {
            for (name, value) in tree.iter() {
                flatten(&format!("{key}.{name}"), value, found);
            }
        }
    }
}

/// The name that says all, if there is one.
fn plain_name(tree: &OptionTree) -> Option<String> {
    let (driver, telling) = (driver_of(tree), telling(tree));
    let text = |key: &str| match tree.get(key) {
        Some(Value::String(text)) => Some(text.clone()),
        _ => None,
    };
    let below = |key: &str| match tree.get(key) {
        Some(Value::Tree(below)) => plain_name(below),
        _ => None,
    };
    match driver {
        "file" | "host_device" => text("filename"),
        "null-co" => telling.is_empty().then(|| "null-co://".to_owned()),
        "" | "raw" | "qcow2" | "luks" if telling.is_empty() => below("file"),
        "blkdebug" if telling.iter().all(|(key, _)| ["config", "x-image"].contains(&&**key)) => {
            let image = below("image").or_else(|| below("file")).or_else(|| text("x-image"))?;
            Some(format!("blkdebug:{}:{image}", text("config").unwrap_or_default()))
        }
        _ => None,
    }
}

/// What makes a node, and those below it, as JSON.
fn description(tree: &OptionTree) -> String {
    let mut members = telling(tree);
    for key in BELOW {
        if let Some(Value::Tree(below)) = tree.get(key) {
            members.push((key.to_owned(), description(below)));
        }
    }
    let driver = driver_of(tree);
    if !driver.is_empty() {
        members.push(("driver".to_owned(), quoted(driver)));
    }
    let place = |key: &str| {
        let key =
            key.strip_prefix("inject-error.").and_then(|it| it.split('.').nth(1)).unwrap_or(key);
        ORDER.iter().position(|known| *known == key).unwrap_or(ORDER.len())
    };
    members.sort_by_key(|(key, _)| place(key));
    let members: Vec<_> =
        members.iter().map(|(key, value)| format!("{}: {value}", quoted(key))).collect();
    format!("{{{}}}", members.join(", "))
}

/// The first node on the way down that is no filter: filters stand for what is below them.
pub fn beneath_filters(view: Arc<NodeView>) -> Arc<NodeView> {
    let mut view = view;
    while let Some(below) =
        view.edge_in_role(Role::Filtered).and_then(|edge| view.child(edge)).cloned()
    {
        view = below;
    }
    view
}

/// The names of an image's files: of each node below it that holds one.
pub fn of_files(image: &Image) -> BTreeMap<NodeId, String> {
    let mut names = BTreeMap::new();
    let topology = image.layer().graph().topology();
    let mut next = topology.node(image.root).cloned();
    let mut filename = image.shown_name.clone();
    while let Some(view) = next {
        if view.id() == image.root {
            name_nodes(&mut names, &view, &image.description);
            filename = bottom_name(&names, &view).unwrap_or(filename);
        } else {
            name_files(&mut names, &view, &filename);
        }
        let view = beneath_filters(view);
        next = view.edge_in_role(Role::Backing).and_then(|edge| view.child(edge)).cloned();
        if let Some(backing) = view.driver_as::<Qcow2>().and_then(Qcow2::backing) {
            filename = beside(&filename, &String::from_utf8_lossy(&backing.name));
        }
    }
    names
}

/// Names a node, and those below it, as their description has them.
fn name_nodes(names: &mut BTreeMap<NodeId, String>, view: &NodeView, tree: &OptionTree) {
    names.insert(view.id(), of_tree(tree));
    for (index, edge) in view.edges().iter().enumerate() {
        let Some(child) = view.child(index) else { continue };
        let below = match edge.role {
            Role::Backing => continue,
            Role::Data => tree.get("data-file"),
            Role::File | Role::Filtered => tree.get("file").or_else(|| tree.get("image")),
        };
        match below {
            Some(Value::Tree(below)) => name_nodes(names, child, below),
            _ => {
                let file = bottom_name(names, view).unwrap_or_else(|| of_tree(tree));
                let name = if edge.role == Role::Data { stated_data(view, &file) } else { file };
                name_files(names, child, &name);
            }
        }
    }
}

/// The name of the file at the bottom of a node.
fn bottom_name(names: &BTreeMap<NodeId, String>, view: &NodeView) -> Option<String> {
    let mut view = view;
    while let Some(below) = view.edge_in_role(Role::File).or(view.edge_in_role(Role::Filtered)) {
        view = view.child(below)?;
    }
    names.get(&view.id()).cloned()
}

/// The data file that an image states.
fn stated_data(view: &NodeView, filename: &str) -> String {
    let stated = view.driver_as::<Qcow2>().and_then(|image| image.information().data_file.clone());
    beside(filename, &String::from_utf8_lossy(&stated.unwrap_or_default()))
}

fn name_files(names: &mut BTreeMap<NodeId, String>, view: &NodeView, filename: &str) {
    names.insert(view.id(), filename.to_owned());
    for (index, edge) in view.edges().iter().enumerate() {
        let Some(child) = view.child(index) else { continue };
        match edge.role {
            Role::Backing => {}
            Role::Data => name_files(names, child, &stated_data(view, filename)),
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
        assert_eq!(of("driver=raw,file.driver=blkdebug,file.image.filename=a"), "blkdebug::a");
        assert_eq!(
            of("driver=raw,file.driver=blkdebug,file.image.filename=a,file.align=512"),
            "json:{\"driver\": \"raw\", \"file\": {\"image\": {\"driver\": \"file\", \"filename\": \"a\"}, \
             \"driver\": \"blkdebug\", \"align\": \"512\"}}"
        );
    }
}
