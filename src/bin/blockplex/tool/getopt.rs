//! Options in the manner of `getopt_long`: permuted, abbreviated, clustered.
//!
//! ```ignore
//! const OPTIONS: &[Opt] = &[opt("help", 'h'), with("format", 'f'), long_with("object")];
//! let mut parser = Parser::new(tool.name(), Some("info"), OPTIONS, words);
//! while let Some(option) = parser.next()? {
//!     match option.name {
//!         "format" => format = Some(option.value),
//!         …
//!     }
//! }
//! let files = parser.positional();
//! ```
//!
//! Messages about wrong options are glibc's; they are printed here, and the [`Failure`] that is
//! given only points to the help.

use std::collections::VecDeque;

use super::Failure;

/// An option that a command knows.
#[derive(Clone, Copy, Debug)]
pub struct Opt {
    /// Its long name; what it is known by even where it has only a short one.
    name: &'static str,
    short: Option<char>,
    is_long: bool,
    takes_value: bool,
}

impl Opt {
    /// What the option is known by.
    pub fn name(&self) -> &'static str {
        self.name
    }
}

/// `--name`, `-s`.
pub const fn opt(name: &'static str, short: char) -> Opt {
    Opt { name, short: Some(short), is_long: true, takes_value: false }
}

/// `--name VALUE`, `-s VALUE`.
pub const fn with(name: &'static str, short: char) -> Opt {
    Opt { name, short: Some(short), is_long: true, takes_value: true }
}

/// `--name`.
pub const fn long(name: &'static str) -> Opt {
    Opt { name, short: None, is_long: true, takes_value: false }
}

/// `--name VALUE`.
pub const fn long_with(name: &'static str) -> Opt {
    Opt { name, short: None, is_long: true, takes_value: true }
}

/// `-s`, known as `name`.
pub const fn short(name: &'static str, short: char) -> Opt {
    Opt { name, short: Some(short), is_long: false, takes_value: false }
}

/// `-s VALUE`, known as `name`.
pub const fn short_with(name: &'static str, short: char) -> Opt {
    Opt { name, short: Some(short), is_long: false, takes_value: true }
}

/// An option that was given.
#[derive(Debug, PartialEq, Eq)]
pub struct Given {
    /// The option's name.
    pub name: &'static str,
    /// Its value; empty where it takes none.
    pub value: String,
}

/// The words of a command line.
pub struct Parser {
    /// What messages begin with.
    program: String,
    options: &'static [Opt],
    words: VecDeque<String>,
    /// The rest of a word of short options.
    cluster: String,
    positional: Vec<String>,
    /// Whether the first word that is no option ends the options.
    ordered: bool,
}

impl Parser {
    /// A parser of the words after the command's name.
    pub fn new(
        program: &str,
        command: Option<&str>,
        options: &'static [Opt],
        words: Vec<String>,
    ) -> Parser {
        let program = match command {
            Some(command) => format!("{program} {command}"),
            None => program.to_owned(),
        };
        let (cluster, positional) = (String::new(), Vec::new());
        Parser { program, options, words: words.into(), cluster, positional, ordered: false }
    }

    /// Stops at the first word that is no option; it and what follows are positional.
    #[must_use]
    pub fn ordered(mut self) -> Parser {
        self.ordered = true;
        self
    }

    /// The next option.
    ///
    /// # Errors
    ///
    /// An option that is not known or not complete; it has been told on stderr.
    pub fn next(&mut self) -> Result<Option<Given>, Failure> {
        self.step().map_err(|text| {
            eprintln!("{}: {text}", self.program);
            Failure::hint()
        })
    }

    /// The words that are no options; all of them once [`Parser::next`] has given none.
    pub fn positional(self) -> Vec<String> {
        self.positional
    }

    fn step(&mut self) -> Result<Option<Given>, String> {
        if !self.cluster.is_empty() {
            return self.short().map(Some);
        }
        while let Some(word) = self.words.pop_front() {
            if word == "--" {
                break;
            }
            if let Some(name) = word.strip_prefix("--") {
                return self.long(name).map(Some);
            }
            match word.strip_prefix('-') {
                Some(cluster) if !cluster.is_empty() => {
                    self.cluster = cluster.to_owned();
                    return self.short().map(Some);
                }
                _ => self.positional.push(word),
            }
            if self.ordered {
                break;
            }
        }
        self.positional.extend(self.words.drain(..));
        Ok(None)
    }

    fn short(&mut self) -> Result<Given, String> {
        let mut letters = self.cluster.chars();
        let letter = letters.next().unwrap_or('?');
        let rest = letters.as_str().to_owned();
        let known = self.options.iter().find(|option| option.short == Some(letter));
        let Some(option) = known else { return Err(format!("invalid option -- '{letter}'")) };
        let value = if !option.takes_value {
            self.cluster = rest;
            return Ok(Given { name: option.name, value: String::new() });
        } else if rest.is_empty() {
            self.words.pop_front()
        } else {
            Some(rest)
        };
        self.cluster.clear();
        let value = value.ok_or_else(|| format!("option requires an argument -- '{letter}'"))?;
        Ok(Given { name: option.name, value })
    }

    /// `text` is what follows the two dashes.
    fn long(&mut self, text: &str) -> Result<Given, String> {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (text, None),
        };
        let option = self.find_long(name, text)?;
        match (option.takes_value, value) {
            (false, Some(_)) => {
                Err(format!("option '--{}' doesn't allow an argument", option.name))
            }
            (false, None) => Ok(Given { name: option.name, value: String::new() }),
            (true, value) => {
                let value = value.or_else(|| self.words.pop_front());
                let missing = || format!("option '--{}' requires an argument", option.name);
                Ok(Given { name: option.name, value: value.ok_or_else(missing)? })
            }
        }
    }

    fn find_long(&self, name: &str, text: &str) -> Result<Opt, String> {
        let long = || self.options.iter().filter(|option| option.is_long);
        if let Some(option) = long().find(|option| option.name == name) {
            return Ok(*option);
        }
        let candidates: Vec<_> = long().filter(|option| option.name.starts_with(name)).collect();
        match candidates.as_slice() {
            [] => Err(format!("unrecognized option '--{text}'")),
            [option] => Ok(**option),
            several => {
                let names: Vec<_> =
                    several.iter().map(|option| format!("'--{}'", option.name)).collect();
                let names = names.join(" ");
                Err(format!("option '--{text}' is ambiguous; possibilities: {names}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: &[Opt] = &[
        opt("help", 'h'),
        with("format", 'f'),
        long_with("output"),
        long_with("object"),
        opt("quiet", 'q'),
        long("add"),
    ];

    type Parsed = (Vec<(&'static str, String)>, Vec<String>);

    fn parse(text: &str) -> Result<Parsed, String> {
        let words = text.split_whitespace().map(str::to_owned).collect();
        let mut parser = Parser::new("p", None, OPTIONS, words);
        let mut given = Vec::new();
        while let Some(option) = parser.step()? {
            given.push((option.name, option.value));
        }
        Ok((given, parser.positional()))
    }

    #[test]
    fn options_may_stand_anywhere_and_be_short_clustered_or_abbreviated() {
        let (given, files) =
            parse("a -qf raw b -fqcow2 --outp=json --add --obj x -- -q c").unwrap();
        let expected = [
            ("quiet", ""),
            ("format", "raw"),
            ("format", "qcow2"),
            ("output", "json"),
            ("add", ""),
            ("object", "x"),
        ];
        assert_eq!(given, expected.map(|(name, value)| (name, value.to_owned())));
        assert_eq!(files, ["a", "b", "-q", "c"]);
    }

    #[test]
    fn wrong_options_are_told_in_the_words_of_glibc() {
        for (text, problem) in [
            ("-x", "invalid option -- 'x'"),
            ("-qx", "invalid option -- 'x'"),
            ("-f", "option requires an argument -- 'f'"),
            ("--zz=1", "unrecognized option '--zz=1'"),
            ("--o", "option '--o' is ambiguous; possibilities: '--output' '--object'"),
            ("--qui=1", "option '--quiet' doesn't allow an argument"),
            ("--form", "option '--format' requires an argument"),
        ] {
            assert_eq!(parse(text).unwrap_err(), problem, "{text}");
        }
    }

    #[test]
    fn an_ordered_parser_stops_at_the_first_word_that_is_no_option() {
        let words = ["-q", "create", "-f"].map(str::to_owned).to_vec();
        let mut parser = Parser::new("p", None, OPTIONS, words).ordered();
        assert_eq!(parser.step().unwrap().map(|given| given.name), Some("quiet"));
        assert_eq!(parser.step().unwrap(), None);
        assert_eq!(parser.positional(), ["create", "-f"]);
    }
}
