//! `img map`: where the data of an image is.

use std::collections::BTreeMap;

use blockplex::drivers::null::Null;
use blockplex::graph::NodeView;
use blockplex::graph::driver::Role;
use blockplex::{Backend, BlockStatus, NodeId};

use super::source::{FORCE_SHARE, FORMAT, HELP, IMAGE_OPTS, OBJECT, Source};
use super::{Command, DONE, one_file, print_command_help, wants_json};
use crate::tool::getopt::{Opt, Parser, long_with, with};
use crate::tool::json::shown;
use crate::tool::names::{beneath_filters, of_files};
use crate::tool::open::Image;
use crate::tool::{Failure, Tool, size, wait};

pub const COMMAND: Command =
    Command { name: "map", help: HELP_TEXT, run, summary: "show where the data of an image is" };

const HELP_TEXT: &str = "\
Show where the data of a disk image is.

Usage: {tool} map [-f FMT | --image-opts] [-U] [--output human|json]
           [--start-offset OFFSET] [--max-length LENGTH] FILE

  -h, --help                 print this help and exit
  -f, --format FMT           format of FILE, instead of finding it out
      --image-opts           FILE is a list of options, driver=...,file.filename=...
  -s, --start-offset OFFSET  where to begin
  -l, --max-length LENGTH    how far to go
      --output human|json    how to print it
  -U, --force-share          whatever other programs do with the image meanwhile
      --object OBJECT        define a secret
";

const OPTIONS: &[Opt] = &[
    HELP,
    FORMAT,
    IMAGE_OPTS,
    with("start-offset", 's'),
    with("max-length", 'l'),
    long_with("output"),
    FORCE_SHARE,
    OBJECT,
];

/// The most bytes that one question is about.
const STEP: u64 = 1 << 30;

fn run(tool: &mut Tool, words: Vec<String>) -> Result<u8, Failure> {
    let mut source = Source::default();
    let (mut json, mut start, mut length) = (false, 0, None);
    let mut parser = Parser::new(tool.name(), Some("map"), OPTIONS, words);
    while let Some(option) = parser.next()? {
        match option.name {
            "help" => return print_command_help(tool, &COMMAND),
            "output" => json = wants_json(&option.value)?,
            "start-offset" => start = size::parse_bytes("start offset", &option.value)?,
            "max-length" => length = Some(size::parse_bytes("max length", &option.value)?),
            _ => drop(source.take(tool, &option)?),
        }
    }
    let filename = one_file(parser.positional())?;
    let image = tool.open(&source.open_options(&filename)?)?;
    let result = print_map(&image, json, start, length);
    image.close()?;
    result.map(|()| DONE)
}

fn print_map(image: &Image, json: bool, start: u64, length: Option<u64>) -> Result<(), Failure> {
    if !json {
        println!("{:16}{:16}{:16}File", "Offset", "Length", "Mapped to");
    }
    // As in QEMU, whose disks end with a sector.
    let end = image.length()?.next_multiple_of(512);
    let end = length.map_or(end, |length| end.min(start.saturating_add(length)));
    let mut map = Map::new(image)?;
    let printed = print_entries(&mut map, Printer { json, is_first: true }, start..end);
    let closed = map.close();
    printed.and(closed)
}

fn print_entries(
    map: &mut Map<'_>,
    mut printer: Printer,
    range: std::ops::Range<u64>,
) -> Result<(), Failure> {
    let (start, end) = (range.start, range.end);
    let mut current = Entry { start, ..Entry::default() };
    while current.end() < end {
        let offset = current.end();
        let next = map.entry(offset, (end - offset).min(STEP))?;
        if !current.take_in(&next) {
            printer.print(&current, false)?;
            current = next;
        }
    }
    printer.print(&current, true)
}

/// A stretch of the disk that is of one kind.
#[derive(Clone, Debug, Default, PartialEq)]
struct Entry {
    start: u64,
    length: u64,
    depth: u32,
    data: bool,
    zero: bool,
    present: bool,
    compressed: bool,
    offset: Option<u64>,
    file: Option<String>,
}

impl Entry {
    fn end(&self) -> u64 {
        self.start + self.length
    }

    /// Makes one of two that follow one another, where they are of one kind; whether they are.
    fn take_in(&mut self, next: &Entry) -> bool {
        if self.length == 0 {
            *self = next.clone();
            return true;
        }
        let continues = match (self.offset, next.offset) {
            (Some(offset), Some(following)) => offset + self.length == following,
            (None, None) => true,
            _ => false,
        };
        let length = self.length + next.length;
        let alike =
            Entry { start: self.start, length: self.length, offset: self.offset, ..next.clone() };
        let merges = continues && *self == alike;
        if merges {
            self.length = length;
        }
        merges
    }
}

/// The questions that are asked of an image.
struct Map<'a> {
    image: &'a Image,
    length: u64,
    names: BTreeMap<NodeId, String>,
    /// The nodes one below the other, and what asks them by themselves, once it is needed.
    layers: Vec<(NodeId, Option<Backend>)>,
}

impl Map<'_> {
    fn new(image: &Image) -> Result<Map<'_>, Failure> {
        let mut layers = Vec::new();
        let mut next = Some(image.view()?);
        while let Some(view) = next {
            layers.push((view.id(), None));
            let view = beneath_filters(view);
            next = view.edge_in_role(Role::Backing).and_then(|edge| view.child(edge)).cloned();
        }
        Ok(Map { image, length: image.length()?, names: of_files(image), layers })
    }

    fn entry(&mut self, start: u64, length: u64) -> Result<Entry, Failure> {
        if start >= self.length {
            return self.rest_of_sector(start, length);
        }
        let mut status = self.image.disk().block_status(start, length)?;
        if status.zero && start + status.length >= self.length {
            // The last sector may not be whole.
            status.length = length;
        }
        let mut entry = Entry {
            start,
            length: status.length.min(length),
            depth: status.depth,
            data: status.data,
            zero: status.zero,
            present: status.allocated,
            compressed: status.compressed,
            offset: status.offset,
            file: None,
        };
        if status.depth > 0 && status.backed {
            entry.present = self.is_present(&status, start, entry.length)?;
        }
        if entry.data && self.is_null() {
            // What keeps nothing has nothing to show, as in QEMU.
            return Ok(Entry { start, length: entry.length, ..Entry::default() });
        }
        let node = self.layers.get(status.depth as usize).map(|(node, _)| *node);
        entry.file = node.and_then(|node| self.file_of(node)).filter(|_| entry.offset.is_some());
        Ok(entry)
    }

    /// What lies between the end of the disk and the end of its last sector.
    fn rest_of_sector(&self, start: u64, length: u64) -> Result<Entry, Failure> {
        let offset = (self.image.format()? == "raw").then_some(start);
        let file = self.file_of(self.image.root).filter(|_| offset.is_some());
        let entry = Entry { start, length, zero: true, present: true, ..Entry::default() };
        Ok(Entry { offset, file, ..entry })
    }

    /// Whether the node that answered holds the range itself.
    fn is_present(
        &mut self,
        status: &BlockStatus,
        start: u64,
        length: u64,
    ) -> Result<bool, Failure> {
        if status.data || !status.zero {
            return Ok(true);
        }
        let Some((node, backend)) = self.layers.get_mut(status.depth as usize) else {
            return Ok(true);
        };
        let backend = match backend {
            Some(backend) => backend,
            None => backend.insert(wait(self.image.layer().open_backend("map", *node, true))?),
        };
        Ok(backend.blocking().block_status(start, length)?.allocated)
    }

    /// Whether the image is no more than a null device.
    fn is_null(&self) -> bool {
        let mut next = self.image.view().ok();
        while let Some(view) = next {
            if view.driver_as::<Null>().is_some() {
                return true;
            }
            next = data_child(&view).filter(|_| view.driver().driver_name() == "raw");
        }
        false
    }

    /// The name of the file that holds a node's data.
    fn file_of(&self, node: NodeId) -> Option<String> {
        let topology = self.image.layer().graph().topology();
        let mut view = topology.node(node)?.clone();
        while let Some(child) = data_child(&view) {
            view = child;
        }
        self.names.get(&view.id()).cloned()
    }

    fn close(self) -> Result<(), Failure> {
        for (_, backend) in self.layers {
            backend.map_or(Ok(()), |backend| wait(backend.close()))?;
        }
        Ok(())
    }
}

fn data_child(view: &NodeView) -> Option<std::sync::Arc<NodeView>> {
    let roles = [Role::Data, Role::File, Role::Filtered];
    let edge = roles.into_iter().find_map(|role| view.edge_in_role(role))?;
    view.child(edge).cloned()
}

struct Printer {
    json: bool,
    is_first: bool,
}

impl Printer {
    fn print(&mut self, entry: &Entry, is_last: bool) -> Result<(), Failure> {
        if !self.json {
            return print_row(entry);
        }
        let Entry { start, length, depth, data, zero, present, compressed, offset, .. } = entry;
        print!("{}", if self.is_first { "[" } else { ",\n" });
        self.is_first = false;
        print!(
            "{{ \"start\": {start}, \"length\": {length}, \"depth\": {depth}, \"present\": \
             {present}, \"zero\": {zero}, \"data\": {data}, \"compressed\": {compressed}"
        );
        if let Some(offset) = offset {
            print!(", \"offset\": {offset}");
        }
        print!("}}");
        if is_last {
            println!("]");
        }
        Ok(())
    }
}

fn print_row(entry: &Entry) -> Result<(), Failure> {
    if !entry.data || entry.zero {
        return Ok(());
    }
    let (Some(offset), Some(file)) = (entry.offset, &entry.file) else {
        let text = "File contains external, encrypted or compressed clusters.";
        return Err(Failure::new(text));
    };
    let number = |value: u64| match value {
        0 => "0".to_owned(),
        value => format!("{value:#x}"),
    };
    let (start, length) = (number(entry.start), number(entry.length));
    println!("{start:16}{length:16}{:16}{}", number(offset), shown(file));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(start: u64, length: u64, offset: Option<u64>) -> Entry {
        Entry { start, length, offset, data: true, ..Entry::default() }
    }

    #[test]
    fn stretches_are_one_where_their_places_follow_one_another() {
        let mut first = entry(0, 10, Some(100));
        assert!(first.take_in(&entry(10, 5, Some(110))));
        assert_eq!(first, entry(0, 15, Some(100)));
        assert!(!first.take_in(&entry(15, 5, Some(200))));
        assert!(!first.take_in(&entry(15, 5, None)));
        assert!(!first.take_in(&Entry { zero: true, ..entry(15, 5, Some(115)) }));
    }
}
