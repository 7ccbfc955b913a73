//! The options of a `blkdebug` node.

use super::config_file::{self, Section};
use super::rules::{Injection, IoKinds, Rule};
use crate::options::{OptionError, OptionTree, Value};
use blockplex_graph::{DebugEvent, Error, ErrorKind, Permissions, Result};
use std::io::Read;
use std::path::Path;
use std::time::Duration;

/// Limits are below this.
const MAX_LIMIT: u64 = i32::MAX as u64;

/// What a node is opened with. Sizes in bytes; 0 is none.
#[derive(Clone, Debug, PartialEq)]
pub struct BlkdebugOptions {
    /// In the order in which they are looked at.
    pub rules: Vec<Rule>,
    /// What random injections start from (`x-seed`).
    pub seed: u64,
    /// The alignment of requests.
    pub align: u64,
    /// The longest transfer.
    pub max_transfer: u64,
    /// The alignment of write-zeroes.
    pub opt_write_zero: u64,
    /// The longest write-zeroes.
    pub max_write_zero: u64,
    /// The alignment of discards.
    pub opt_discard: u64,
    /// The longest discard.
    pub max_discard: u64,
    /// Permissions taken on the child in addition.
    pub take_child_perms: Permissions,
    /// Permissions that the others are not left.
    pub unshare_child_perms: Permissions,
}

impl Default for BlkdebugOptions {
    fn default() -> BlkdebugOptions {
        BlkdebugOptions {
            rules: Vec::new(),
            seed: 0,
            align: 0,
            max_transfer: 0,
            opt_write_zero: 0,
            max_write_zero: 0,
            opt_discard: 0,
            max_discard: 0,
            take_child_perms: Permissions::NONE,
            unshare_child_perms: Permissions::NONE,
        }
    }
}

impl BlkdebugOptions {
    /// Takes all options but the child's. `config` is the text of the configuration file, with its
    /// name, if one was named ([`BlkdebugOptions::take_config`]).
    pub fn take(tree: &mut OptionTree, config: Option<(String, String)>) -> Result<Self> {
        let mut options = BlkdebugOptions::default();
        if let Some((name, text)) = config {
            for (section, mut tree) in config_file::parse(&text, &name)? {
                options.rules.push(take_rule(section, &mut tree).map_err(invalid)?);
                tree.finish().map_err(invalid)?;
            }
        }
        options.take_lists(tree).map_err(invalid)?;
        options.take_numbers(tree).map_err(invalid)?;
        Ok(options)
    }

    /// Takes the name of the configuration file, if there is one, and reads it: its name, and its
    /// text. Blocks.
    ///
    /// # Errors
    ///
    /// It cannot be read, is no text, or is longer than 1 MiB.
    pub fn take_config(tree: &mut OptionTree) -> Result<Option<(String, String)>> {
        let name = tree.take_str("config").map_err(invalid)?;
        name.filter(|name| !name.is_empty()).map(read_config).transpose()
    }

    fn take_lists(&mut self, tree: &mut OptionTree) -> Result<(), OptionError> {
        for (key, section) in
            [("inject-error", Section::InjectError), ("set-state", Section::SetState)]
        {
            for mut rule in tree.take_subtree_list(key)?.unwrap_or_default() {
                self.rules.push(take_rule(section, &mut rule)?);
                rule.finish()?;
            }
        }
        self.take_child_perms = take_permissions(tree, "take-child-perms")?;
        self.unshare_child_perms = take_permissions(tree, "unshare-child-perms")?;
        Ok(())
    }

    fn take_numbers(&mut self, tree: &mut OptionTree) -> Result<(), OptionError> {
        self.seed = tree.take_u64("x-seed")?.unwrap_or(0);
        for (key, field) in [
            ("align", &mut self.align),
            ("max-transfer", &mut self.max_transfer),
            ("opt-write-zero", &mut self.opt_write_zero),
            ("max-write-zero", &mut self.max_write_zero),
            ("opt-discard", &mut self.opt_discard),
            ("max-discard", &mut self.max_discard),
        ] {
            *field = tree.take_size(key)?.unwrap_or(0);
        }
        Ok(())
    }

    /// Whether the limits go together: each a multiple of the alignment, and below 2 GiB.
    pub(super) fn check(&self, child_alignment: u32) -> Result<()> {
        let unmet = |key: &str, value: u64| {
            let text = format!("Cannot meet constraints with {key} {value}");
            Error::new(ErrorKind::InvalidArgument, text)
        };
        if self.align != 0 && (self.align >= MAX_LIMIT || !self.align.is_power_of_two()) {
            return Err(unmet("align", self.align));
        }
        let align = self.align.max(u64::from(child_alignment));
        let zeroes = align.max(self.opt_write_zero);
        let discards = align.max(self.opt_discard);
        for (key, value, unit) in [
            ("max-transfer", self.max_transfer, align),
            ("opt-write-zero", self.opt_write_zero, align),
            ("max-write-zero", self.max_write_zero, zeroes),
            ("opt-discard", self.opt_discard, align),
            ("max-discard", self.max_discard, discards),
        ] {
            if value >= MAX_LIMIT || value % unit.max(1) != 0 {
                return Err(unmet(key, value));
            }
        }
        Ok(())
    }
}

fn read_config(name: String) -> Result<(String, String)> {
    let failed = |error: std::io::Error| {
        let text = format!("Could not read blkdebug config file: {name}: {error}");
        Error::new(Error::from(error).kind(), text)
    };
    let file = std::fs::File::open(Path::new(&name)).map_err(failed)?;
    let mut text = String::new();
    file.take(config_file::MAX_FILE + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > config_file::MAX_FILE {
        let text = format!("blkdebug config file {name} is longer than {}", config_file::MAX_FILE);
        return Err(Error::new(ErrorKind::LimitExceeded, text));
    }
    Ok((name, text))
}

fn take_rule(section: Section, tree: &mut OptionTree) -> Result<Rule, OptionError> {
    let Some(name) = tree.take_str("event")? else {
        return Err(OptionError::new(tree.path_of("event"), "Missing event name for rule"));
    };
    let Some(event) = DebugEvent::parse(&name) else {
        let text = format!("invalid parameter value: {}", name.escape_default());
        return Err(OptionError::new(tree.path_of("event"), text));
    };
    let states = 0..=u64::from(u32::MAX);
    let mut take_state = |key: &str| -> Result<u32, OptionError> {
        // Within 32 bits.
        Ok(tree.take_u64_within(key, states.clone())?.unwrap_or(0) as u32)
    };
    let state = take_state("state")?;
    match section {
        Section::SetState => {
            let new_state = take_state("new_state")?;
            Ok(Rule::SetState { event, state, new_state })
        }
        Section::InjectError => {
            let injection = take_injection(tree)?;
            Ok(Rule::Inject { event, state, injection })
        }
    }
}

fn take_injection(tree: &mut OptionTree) -> Result<Injection, OptionError> {
    let default = Injection::default();
    let errno = tree.take_u64_within("errno", 0..=4095)?;
    let sector = take_sector(tree)?;
    let probability = match tree.take_str("x-probability")? {
        None => None,
        Some(text) => match text.parse::<f64>() {
            // Within 0 and 1, so within 32 bits.
            Ok(value) if (0.0..=1.0).contains(&value) => Some((value * 1e6).round() as u32),
            _ => {
                let path = tree.path_of("x-probability");
                return Err(OptionError::new(path, "is no number from 0 to 1"));
            }
        },
    };
    Ok(Injection {
        kinds: tree.take_enum("iotype", &IoKinds::NAMES)?.unwrap_or(default.kinds),
        errno: errno.map_or(default.errno, |errno| errno as i32),
        offset: sector,
        once: tree.take_bool("once")?.unwrap_or(false),
        immediately: tree.take_bool("immediately")?.unwrap_or(false),
        delay: Duration::from_nanos(tree.take_u64("x-delay-ns")?.unwrap_or(0)),
        nth: tree.take_u64("x-nth")?,
        probability,
        short: tree.take_size("x-short")?.unwrap_or(0),
        count_only: tree.take_bool("x-count-only")?.unwrap_or(false),
    })
}

/// The first byte of the sector of an injection; -1, the default, is any.
fn take_sector(tree: &mut OptionTree) -> Result<Option<u64>, OptionError> {
    let is_any = match tree.get("sector") {
        Some(Value::String(text)) => text == "-1",
        Some(Value::Number(number)) => number.to_string() == "-1",
        _ => false,
    };
    if is_any {
        // Explicitly what it is without.
        tree.set("sector", Value::String("0".into()));
    }
    let sector = tree.take_u64_within("sector", 0..=(i64::MAX as u64 >> 9))?;
    Ok(sector.filter(|_| !is_any).map(|sector| sector << 9))
}

fn take_permissions(tree: &mut OptionTree, key: &str) -> Result<Permissions, OptionError> {
    let mut permissions = Permissions::NONE;
    for name in tree.take_str_list(key)?.unwrap_or_default() {
        permissions = permissions
            | match name.as_str() {
                "consistent-read" => Permissions::CONSISTENT_READ,
                "write" => Permissions::WRITE,
                "write-unchanged" => Permissions::WRITE_UNCHANGED,
                "resize" => Permissions::RESIZE,
                other => {
                    let text = format!(
                        "'{}' is none of consistent-read, write, write-unchanged, resize",
                        other.escape_default()
                    );
                    return Err(OptionError::new(tree.path_of(key), text));
                }
            };
    }
    Ok(permissions)
}

fn invalid(error: OptionError) -> Error {
    Error::new(ErrorKind::InvalidArgument, error.to_string()).caused_by(error)
}
