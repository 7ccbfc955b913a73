//! `--rw`: the order of requests and the share of reads among them.

use std::fmt;
use std::str::FromStr;

/// Where the next request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Each iothread goes through a part of its own, again and again.
    Sequential,
    /// Any block of the disk, each as likely as the others.
    Random,
}

/// What `--rw` says. Written as it is read: `randread`, `randrw:70`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Where the next request goes.
    pub order: Order,
    /// How many of a hundred requests read, 0..=100; the others write.
    pub read_percent: u8,
}

impl Access {
    /// Whether any request writes, so that the image has to be opened for it.
    pub fn writes(self) -> bool {
        self.read_percent < 100
    }
}

impl FromStr for Access {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, percent) = match text.split_once(':') {
            Some((name, percent)) => (name, Some(percent)),
            None => (text, None),
        };
        let (order, direction) = match name.strip_prefix("rand") {
            Some(direction) => (Order::Random, direction),
            None => (Order::Sequential, name),
        };
        let read_percent = match (direction, percent) {
            ("read", None) => 100,
            ("write", None) => 0,
            ("rw", None) => 50,
            ("rw", Some(percent)) => parse_percent(percent)?,
            ("read" | "write", Some(_)) => {
                return Err(format!("a share of reads belongs to rw or randrw, not to {name}"));
            }
            _ => return Err("expected [rand]read, [rand]write or [rand]rw[:PCT]".to_owned()),
        };
        Ok(Self { order, read_percent })
    }
}

fn parse_percent(text: &str) -> Result<u8, String> {
    match text.parse() {
        Ok(percent) if percent <= 100 => Ok(percent),
        _ => Err(format!("`{text}` is not a share of reads, 0 to 100")),
    }
}

impl fmt::Display for Access {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = match self.order {
            Order::Sequential => "",
            Order::Random => "rand",
        };
        match self.read_percent {
            100 => write!(formatter, "{prefix}read"),
            0 => write!(formatter, "{prefix}write"),
            percent => write!(formatter, "{prefix}rw:{percent}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_written_form_reads_back_as_itself() {
        for text in ["read", "write", "rw:30", "randread", "randwrite", "randrw:70"] {
            let access: Access = text.parse().unwrap();
            assert_eq!(access.to_string(), text);
        }
    }

    #[test]
    fn the_share_counts_reads() {
        let access: Access = "randrw:70".parse().unwrap();
        assert_eq!(access, Access { order: Order::Random, read_percent: 70 });
        assert_eq!("rw".parse::<Access>().unwrap().read_percent, 50);
    }

    #[test]
    fn only_pure_reading_leaves_the_image_alone() {
        assert!(!"read".parse::<Access>().unwrap().writes());
        assert!(!"randrw:100".parse::<Access>().unwrap().writes());
        assert!("randrw:99".parse::<Access>().unwrap().writes());
        assert!("write".parse::<Access>().unwrap().writes());
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "rand", "reads", "randrw:", "randrw:101", "rw:-1", "read:50", "rw:1:2"] {
            assert!(text.parse::<Access>().is_err(), "{text}");
        }
    }
}
