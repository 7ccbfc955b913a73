//! Whole command lines, as a user types them.

use super::*;

fn parse_line(line: &str) -> Result<Command, clap::Error> {
    parse(line.split_whitespace())
}

fn bench_of(line: &str) -> BenchOptions {
    match parse_line(line) {
        Ok(Command::Bench(options)) => options,
        other => panic!("{line}: {other:?}"),
    }
}

fn stress_of(line: &str) -> StressOptions {
    match parse_line(line) {
        Ok(Command::Stress(options)) => options,
        other => panic!("{line}: {other:?}"),
    }
}

/// The message of a usage error, which ends the program with 2.
fn refusal(line: &str) -> String {
    let error = parse_line(line).expect_err(line);
    assert_eq!(error.exit_code(), 2, "{line}");
    error.to_string()
}

#[test]
fn the_definition_of_the_arguments_is_consistent() {
    Arguments::command().debug_assert();
}

#[test]
fn bench_without_words_has_useful_defaults() {
    let options = bench_of("blockplex bench");
    assert!(options.images.is_empty());
    assert_eq!(options.block_bytes, 4096);
    assert_eq!(options.goal, Goal::Runtime(Duration::from_secs(5)));
    assert!(!options.access.writes());
    assert_eq!(options.poll_max, None);
}

#[test]
fn bench_takes_all_its_options() {
    let options = bench_of(
        "blockplex bench -f qcow2 --iothreads 4 --depth 8 --bs 64k --rw randrw:70 --count 1000 \
         --direct --size 1G --seed 0x2a --output json --plot out.svg --poll-max-ns 0 a.img b.img",
    );
    let file = |name: &str| ImageSource::File {
        path: PathBuf::from(name),
        format: Some("qcow2".to_owned()),
    };
    let expected = BenchOptions {
        images: vec![file("a.img"), file("b.img")],
        iothreads: 4,
        depth: 8,
        block_bytes: 64 << 10,
        step_bytes: 64 << 10,
        access: Access { order: Order::Random, read_percent: 70 },
        goal: Goal::Count(1000),
        direct: true,
        size: Some(1 << 30),
        seed: 42,
        output: OutputFormat::Json,
        plot: Some(PathBuf::from("out.svg")),
        poll_max: Some(Duration::ZERO),
    };
    assert_eq!(options, expected);
}

#[test]
fn image_options_are_kept_as_they_were_typed() {
    let options = bench_of("blockplex bench --image-opts driver=null-co,size=1G");
    assert_eq!(options.images, [ImageSource::Options("driver=null-co,size=1G".to_owned())]);
}

#[test]
fn stress_takes_all_its_options() {
    let options = stress_of(
        "blockplex stress --iothreads 3 --runtime 1.5 --seed 9 --mutations-per-second 50 --depth 2 \
         --bs 8k --size 64M --output json -f raw a.img",
    );
    let image = ImageSource::File { path: PathBuf::from("a.img"), format: Some("raw".to_owned()) };
    let expected = StressOptions {
        image: Some(image),
        iothreads: 3,
        depth: 2,
        block_bytes: 8192,
        runtime: Duration::from_millis(1500),
        size: Some(64 << 20),
        seed: 9,
        mutations_per_second: 50.0,
        output: OutputFormat::Json,
    };
    assert_eq!(options, expected);
}

#[test]
fn contradictions_are_usage_errors() {
    for line in [
        "blockplex",
        "blockplex frobnicate",
        "blockplex bench --count 10 --runtime 10",
        "blockplex bench --image-opts driver=null-co a.img",
        "blockplex bench -f raw",
        "blockplex bench -f raw --image-opts driver=null-co",
        "blockplex bench --bs 1000",
        "blockplex bench --depth 0",
        "blockplex bench --iothreads 257",
        "blockplex bench --rw randrw:200",
        "blockplex bench --runtime 0",
        "blockplex stress a.img b.img",
        "blockplex stress --image-opts driver=null-co a.img",
        "blockplex stress -f raw --image-opts driver=null-co",
        "blockplex stress --mutations-per-second=-1",
        "blockplex stress --rw randread",
    ] {
        refusal(line);
    }
}

#[test]
fn limits_over_several_options_say_what_they_are() {
    let text = refusal("blockplex bench --iothreads 256 --depth 4096 --bs 1M");
    assert!(text.contains("1 TiB") && text.contains("4 GiB"), "{text}");
    let text = refusal("blockplex bench --iothreads 1 a.img b.img");
    assert!(text.contains("2 images"), "{text}");
    let text = refusal("blockplex bench --bs 1M --size 512k");
    assert!(text.contains("less than one block"), "{text}");
    assert!(text.contains("Usage: blockplex bench"), "{text}");
    let text = refusal("blockplex stress --size 17G");
    assert!(text.contains("16 GiB"), "{text}");
}

#[test]
fn help_and_version_are_not_failures() {
    for line in ["blockplex --help", "blockplex bench --help", "blockplex --version"] {
        assert_eq!(parse_line(line).expect_err(line).exit_code(), 0, "{line}");
    }
}

#[test]
fn shares_of_a_count_add_up() {
    for iothreads in 1..=7 {
        let shares = (0..iothreads).map(|index| Goal::Count(10).share(index, iothreads).unwrap());
        assert_eq!(shares.sum::<u64>(), 10);
    }
    assert_eq!(Goal::Count(1).share(1, 2), Some(0));
    assert_eq!(Goal::Runtime(Duration::from_secs(1)).share(0, 1), None);
}
