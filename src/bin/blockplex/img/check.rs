//! `img check`: whether an image is whole, and how to make it so.

use blockplex::ErrorKind;
use blockplex::drivers::qcow2::check::{self as checks, CheckOptions, CheckReport, Fix};

use super::source::{FORCE_SHARE, FORMAT, HELP, IMAGE_OPTS, OBJECT, QUIET, Source, cache_mode};
use super::{Command, one_file, print_command_help, wants_json};
use crate::tool::getopt::{Opt, Parser, long_with, with};
use crate::tool::json::Json;
use crate::tool::message::strerror;
use crate::tool::open::ImageOpenOptions;
use crate::tool::{Failure, Tool};

pub const COMMAND: Command =
    Command { name: "check", help: HELP_TEXT, run, summary: "look for damage and repair it" };

const HELP_TEXT: &str = "\
Look for damage in a disk image, and repair it.

Usage: {tool} check [-f FMT | --image-opts] [-T CACHE] [-r leaks|all] [-U] [-q]
           [--output human|json] FILE

  -h, --help                 print this help and exit
  -q, --quiet                print nothing that is no error
  -f, --format FMT           format of FILE, instead of finding it out
      --image-opts           FILE is a list of options, driver=...,file.filename=...
  -T, --cache CACHE          none, writeback (the default), writethrough, directsync, unsafe
  -U, --force-share          whatever other programs do with the image meanwhile
      --output human|json    how to print it
  -r, --repair leaks|all     free unused clusters, or repair everything
      --object OBJECT        define a secret

The status is 0 where nothing is wrong (any more), 1 where the check failed, 2 where damage was
found, 3 where clusters are unused, 63 where the format has no check.
";

const OPTIONS: &[Opt] = &[
    HELP,
    QUIET,
    FORMAT,
    IMAGE_OPTS,
    with("cache", 'T'),
    FORCE_SHARE,
    long_with("output"),
    with("repair", 'r'),
    OBJECT,
];

/// The status where a format has no check.
const NO_CHECKS: u8 = 63;

/// How the result is told.
struct Output {
    filename: String,
    json: bool,
    quiet: bool,
}

fn run(tool: &mut Tool, words: Vec<String>) -> Result<u8, Failure> {
    let mut source = Source::default();
    let (mut json, mut quiet, mut fix, mut cache) = (false, false, Fix::None, "writeback".into());
    let mut parser = Parser::new(tool.name(), Some("check"), OPTIONS, words);
    while let Some(option) = parser.next()? {
        match option.name {
            "help" => return print_command_help(tool, &COMMAND),
            "quiet" => quiet = true,
            "cache" => cache = option.value,
            "output" => json = wants_json(&option.value)?,
            "repair" => {
                fix = match option.value.as_str() {
                    "leaks" => Fix::Leaks,
                    "all" => Fix::All,
                    other => {
                        return Err(Failure::usage(format!(
                            "--repair (-r) expects 'leaks' or 'all' not '{other}'"
                        )));
                    }
                };
            }
            _ => drop(source.take(tool, &option)?),
        }
    }
    let filename = one_file(parser.positional())?;
    let cache = cache_mode("source ", &cache)?;
    let write = fix != Fix::None;
    let options = ImageOpenOptions { write, cache, ..source.open_options(&filename)? };
    if format_of(tool, &options)? != "qcow2" {
        return Err(
            Failure::new("This image format does not support checks").with_status(NO_CHECKS)
        );
    }
    let output = Output { filename, json, quiet };
    check(tool, &options, fix, &output)
}

/// The image's format. It is opened for reading once, so that what keeps it from being used, other
/// than damage, is told.
fn format_of(tool: &Tool, options: &ImageOpenOptions) -> Result<String, Failure> {
    if options.force_share && options.write {
        // Opening says what is wrong with that.
        tool.open(options)?.close()?;
    }
    match tool.open(&ImageOpenOptions { write: false, metadata_only: true, ..options.clone() }) {
        Ok(image) => {
            let format = image.format()?.to_owned();
            image.close()?;
            Ok(format)
        }
        // The check has more to say about these.
        Err(failure)
            if failure.kind == Some(ErrorKind::Corrupt)
                && options.format.as_deref().is_none_or(|format| format == "qcow2") =>
        {
            Ok("qcow2".to_owned())
        }
        Err(failure) => Err(failure),
    }
}

fn check(
    tool: &Tool,
    options: &ImageOpenOptions,
    fix: Fix,
    output: &Output,
) -> Result<u8, Failure> {
    let mut report = one_check(tool, options, fix)?;
    if report.failure.is_none() && (report.corruptions_fixed > 0 || report.leaks_fixed > 0) {
        let (leaks, corruptions) = (report.leaks_fixed, report.corruptions_fixed);
        if !output.json && !output.quiet {
            println!(
                "The following inconsistencies were found and repaired:\n\n    {leaks} leaked \
                 clusters\n    {corruptions} corruptions\n\nDouble checking the fixed image now..."
            );
        }
        report = one_check(tool, options, Fix::None)?;
        (report.leaks_fixed, report.corruptions_fixed) = (leaks, corruptions);
    }
    if let Some(error) = &report.failure {
        return Err(Failure::new(format!("Check failed: {}", strerror(error.errno()))));
    }
    if output.json {
        println!("{}", json(&report, &output.filename).pretty());
    } else if !output.quiet {
        print!("{}", for_people(&report));
    }
    if report.check_errors > 0 {
        return Err(Failure::new("Check failed"));
    }
    Ok(report.exit_code())
}

/// Checks once; the findings go to stderr.
fn one_check(tool: &Tool, options: &ImageOpenOptions, fix: Fix) -> Result<CheckReport, Failure> {
    let work =
        async move |file: &blockplex::graph::Child| checks::check(file, CheckOptions { fix }).await;
    let report = tool
        .with_image_file(options, work)?
        .map_err(|error| crate::tool::open::could_not_open(&options.filename, &error))?;
    for message in &report.messages {
        eprintln!("{message}");
    }
    if report.messages_left_out > 0 {
        eprintln!("... and {} more", report.messages_left_out);
    }
    Ok(report)
}

fn for_people(report: &CheckReport) -> String {
    let CheckReport { corruptions, leaks, check_errors, .. } = report;
    let mut text = String::new();
    if corruptions + leaks + check_errors == 0 {
        text.push_str("No errors were found on the image.\n");
    }
    if *corruptions > 0 {
        text.push_str(&format!(
            "\n{corruptions} errors were found on the image.\nData may be corrupted, or further \
             writes to the image may corrupt it.\n"
        ));
    }
    if *leaks > 0 {
        text.push_str(&format!(
            "\n{leaks} leaked clusters were found on the image.\nThis means waste of disk space, \
             but no harm to data.\n"
        ));
    }
    if *check_errors > 0 {
        text.push_str(&format!(
            "\n{check_errors} internal errors have occurred during the check.\n"
        ));
    }
    let (total, allocated) = (report.total_clusters, report.allocated_clusters);
    if total > 0 && allocated > 0 {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        text.push_str(&format!(
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed \
             clusters\n",
            percent(allocated, total),
            percent(report.fragmented_clusters, allocated),
            percent(report.compressed_clusters, allocated),
        ));
    }
    if report.image_end_offset > 0 {
        text.push_str(&format!("Image end offset: {}\n", report.image_end_offset));
    }
    text
}

fn json(report: &CheckReport, filename: &str) -> Json {
    let mut members: Vec<(&'static str, Json)> = Vec::new();
    let mut some = |name, value: u64| members.extend((value > 0).then(|| (name, value.into())));
    some("image-end-offset", report.image_end_offset);
    some("compressed-clusters", report.compressed_clusters);
    some("total-clusters", report.total_clusters);
    some("corruptions", report.corruptions);
    some("corruptions-fixed", report.corruptions_fixed);
    members.push(("check-errors", report.check_errors.into()));
    let mut some = |name, value: u64| members.extend((value > 0).then(|| (name, value.into())));
    some("leaks", report.leaks);
    some("leaks-fixed", report.leaks_fixed);
    some("allocated-clusters", report.allocated_clusters);
    members.push(("filename", filename.into()));
    members.push(("format", "qcow2".into()));
    let fragmented = report.fragmented_clusters;
    members.extend((fragmented > 0).then(|| ("fragmented-clusters", fragmented.into())));
    Json::Object(members)
}
