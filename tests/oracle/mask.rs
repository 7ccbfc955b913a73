//! What may differ between two runs: times, rates, dates, how much the host has allocated, and what
//! a LUKS header takes from chance and the machine's speed.

/// `text` with what may differ replaced.
pub fn mask(text: &str) -> String {
    text.lines().map(|line| mask_line(line) + "\n").collect()
}

fn mask_line(line: &str) -> String {
    if let Some((indent, _)) = line.split_once("disk size: ") {
        return format!("{indent}disk size: …");
    }
    if line.trim_start().starts_with("\"actual-size\":") {
        return "\"actual-size\": …".to_owned();
    }
    if let Some((member, _)) = line.split_once("sec\": ")
        && member.trim_start().starts_with("\"date-")
    {
        return format!("{member}sec\": …");
    }
    for name in
        ["uuid", "iters", "master key iters", "\"uuid\"", "\"iters\"", "\"master-key-iters\""]
    {
        let value = line.trim_start().strip_prefix(name).and_then(|rest| rest.strip_prefix(": "));
        if let Some(value) = value {
            return format!("{} …", line.strip_suffix(value).unwrap_or(line).trim_end());
        }
    }
    if line.starts_with("Run completed in ") {
        return "Run completed in …".to_owned();
    }
    // qemu-io: `64 KiB, 1 ops; 00.00 sec (14.102 MiB/sec and 225.6318 ops/sec)`.
    if let Some((counts, _)) = line.split_once(" ops; ") {
        return format!("{counts} ops; …");
    }
    // qemu-io -C: `512,1,0:00:00.00,143233.090,279.752`.
    let fields: Vec<&str> = line.split(',').collect();
    if let [bytes, operations, time, _, _] = fields[..]
        && time.split(':').count() == 3
    {
        return format!("{bytes},{operations},…");
    }
    mask_date(line)
}

/// `2026-11-25 21:03:19` (snapshot lists) without the moment.
fn mask_date(line: &str) -> String {
    let is_date = |word: &str| {
        word.len() == 10
            && word.bytes().filter(|byte| *byte == b'-').count() == 2
            && word.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-')
    };
    let Some(at) = line.split(' ').position(is_date) else { return line.to_owned() };
    let word = |(index, word)| match index {
        index if index == at => "DATE",
        index if index == at + 1 => "TIME",
        _ => word,
    };
    line.split(' ').enumerate().map(word).collect::<Vec<_>>().join(" ")
}

#[test]
fn only_moments_are_masked() {
    assert_eq!(mask("1  a  0 B 2026-11-25 21:03:19  00:00"), "1  a  0 B DATE TIME  00:00\n");
    assert_eq!(
        mask("disk size: 4 KiB\nvirtual size: 1 MiB\n"),
        "disk size: …\nvirtual size: 1 MiB\n"
    );
    assert_eq!(mask("64 KiB, 1 ops; 00.00 sec (1 MiB/sec)"), "64 KiB, 1 ops; …\n");
}
