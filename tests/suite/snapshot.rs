//! Snapshots that do not come about, and clearing up beside them.

use blockplex::drivers::qcow2::CreateOptions;
use blockplex::{Backend, Blockplex, ErrorKind, OpenOptions, SnapshotOptions, block_on};
use std::path::Path;

const SIZE: u64 = 1 << 20;

fn open(layer: &Blockplex, name: &str, options: OpenOptions) -> Backend {
    block_on(layer.open(name, options)).expect("off a loop").expect("opens")
}

fn close(backend: &Backend) {
    block_on(backend.close()).expect("off a loop").expect("closes");
}

fn qcow2(layer: &Blockplex, path: &Path) -> Backend {
    let created = block_on(layer.create_qcow2(path, CreateOptions::new(SIZE)));
    created.expect("off a loop").expect("creates");
    open(layer, "disk", OpenOptions::image("qcow2", path))
}

#[test]
fn a_refused_snapshot_leaves_a_file_that_was_there_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let kept = folder.path().join("kept");
    std::fs::write(&kept, b"not ours").unwrap();
    let layer = Blockplex::new().unwrap();
    let memory = open(&layer, "ram", OpenOptions::parse("driver=memory,size=1M").unwrap());
    let image = qcow2(&layer, &folder.path().join("base.qcow2"));
    for (backend, kind) in [(&memory, ErrorKind::NotSupported), (&image, ErrorKind::Exists)] {
        let node = backend.root().unwrap();
        let taken = block_on(layer.snapshot(node, SnapshotOptions::new(&kept))).unwrap();
        assert_eq!(taken.unwrap_err().kind(), kind);
        assert_eq!(std::fs::read(&kept).unwrap(), b"not ours");
        assert_eq!(backend.root(), Some(node));
        close(backend);
    }
}

#[test]
fn a_snapshot_that_fails_late_removes_the_file_and_node_that_it_made() {
    let folder = tempfile::tempdir().unwrap();
    let layer = Blockplex::new().unwrap();
    let named = OpenOptions::parse("driver=memory,size=1M,node-name=taken").unwrap();
    let memory = open(&layer, "ram", named);
    let image = qcow2(&layer, &folder.path().join("base.qcow2"));
    let nodes = layer.graph().topology().nodes().count();
    let file = folder.path().join("overlay.qcow2");
    let mut options = SnapshotOptions::new(&file);
    options.node_name = Some("taken".into());
    let taken = block_on(layer.snapshot(image.root().unwrap(), options)).unwrap();
    assert_eq!(taken.unwrap_err().kind(), ErrorKind::Exists);
    assert!(!file.exists());
    assert_eq!(layer.graph().topology().nodes().count(), nodes);
    image.blocking().write(0, b"still writable").unwrap();
    close(&image);
    close(&memory);
}

#[test]
fn closing_one_disk_takes_nothing_away_from_snapshots_and_openings_of_another() {
    let folder = tempfile::tempdir().unwrap();
    let layer = Blockplex::new().unwrap();
    let image = qcow2(&layer, &folder.path().join("base.qcow2"));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..200 {
                let options = OpenOptions::parse("driver=raw,file.driver=memory,file.size=1M");
                close(&open(&layer, "passing", options.unwrap()));
            }
        });
        for number in 0..20u8 {
            let file = folder.path().join(format!("{number}.qcow2"));
            let node = image.root().unwrap();
            block_on(layer.snapshot(node, SnapshotOptions::new(file))).unwrap().unwrap();
            image.blocking().write(u64::from(number) * 4096, &[number; 512]).unwrap();
        }
    });
    for number in 0..20u8 {
        let bytes = image.blocking().read_to_vec(u64::from(number) * 4096, 512).unwrap();
        assert_eq!(bytes, [number; 512]);
    }
    close(&image);
    assert_eq!(layer.graph().topology().nodes().count(), 0);
}
