//! What images may open by themselves when our tools open them: not what QEMU's let them.

use crate::pair::Pair;

/// A raw file, and images that name it, or other things, in all ways.
fn images() -> Pair {
    let pair = Pair::new();
    pair.given("mkdir elsewhere own");
    pair.given("qemu-img create -q -f raw disk 1M");
    for (image, backing) in [
        ("plain", "disk"),
        ("file", "file:disk"),
        ("network", "nbd://localhost:1/x"),
        ("json", "json:{\"driver\":\"raw\",\"file.filename\":\"disk\"}"),
        ("null", "null-co://"),
    ] {
        pair.given(&format!("qemu-img create -q -u -f qcow2 -b {backing} -F raw {image} 1M"));
    }
    // QEMU would make the file where we are, and then not find it.
    let (status, text) =
        pair.ours_says("qemu-img create -q -f qcow2 -o data_file=../elsewhere/data own/image 1M");
    assert_eq!(status, 0, "{text}");
    pair.given("qemu-img create -q -f qcow2 -o data_file=data near 1M");
    pair
}

#[test]
fn local_backing_files_are_followed_and_protocols_are_not() {
    let pair = images();
    for image in ["plain", "file", "near"] {
        assert_eq!(pair.ours_says(&format!("qemu-img map {image}")).0, 0, "{image}");
    }
    for image in ["network", "json", "null"] {
        let (status, text) = pair.ours_says(&format!("qemu-img map {image}"));
        assert!(status == 1 && text.contains("is not granted"), "{image}: {text}");
        // What is not opened can be looked at.
        assert_eq!(pair.ours_says(&format!("qemu-img info {image}")).0, 0, "{image}");
    }
}

#[test]
fn protocols_and_directories_are_allowed_one_by_one_or_all_at_once() {
    let pair = images();
    assert_eq!(pair.ours_says("qemu-img map --allow null-co null").0, 0);
    assert_eq!(pair.ours_says("qemu-img --allow=null-co map null").0, 0);
    assert_eq!(pair.ours_says("qemu-img map --allow nbd null").0, 1);
    for image in ["json", "null", "plain"] {
        assert_eq!(pair.ours_says(&format!("qemu-img map --trust-images {image}")).0, 0, "{image}");
    }
    let (status, text) = pair.ours_says("qemu-img map --allow json json");
    assert!(status == 1 && text.contains("cannot be granted"), "{text}");
}

#[test]
fn data_files_lie_beside_their_image_or_where_it_is_allowed() {
    let pair = images();
    for command in ["map", "resize"] {
        let size = if command == "resize" { "2M" } else { "" };
        let (status, text) = pair.ours_says(&format!("qemu-img {command} own/image {size}"));
        assert!(status == 1 && text.contains("not within a directory"), "{text}");
        let allowed = format!("qemu-img {command} --allow elsewhere own/image {size}");
        assert_eq!(pair.ours_says(&allowed).0, 0);
    }
}
