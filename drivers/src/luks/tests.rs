//! Against the peer.

use super::*;
use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::new_loop;
use crate::qcow2::testing::volume::Volume;
use blockplex_graph::{BlockGraph, NodeOptions, Permissions, Queue};
use std::process::Command;
use std::time::Duration;

const OBJECT: &str = "secret,id=s,data=hush";

/// Opens the disk and runs `work` with a queue, or says why not.
fn with_disk<T>(
    volume: &Volume,
    options: LuksOptions,
    work: impl AsyncFnOnce(&Queue) -> T,
) -> Result<T> {
    let mut event_loop = new_loop();
    let local = event_loop.local();
    event_loop.block_on(async {
        let graph = BlockGraph::new();
        let mut change = graph.begin().await;
        let file = change.add_node(Some("file"), volume.driver(), NodeOptions::default(), &[])?;
        let drained = change.drain().await?;
        change.commit(&drained).await?;
        drop(drained);
        let topology = graph.topology();
        let child = Child::for_control(&local, topology.node(file).unwrap(), Permissions::ALL);
        let driver = Box::new(Luks::open(&child, options, false).await?);
        let mut change = graph.begin().await;
        let node =
            change.add_node(Some("disk"), driver, NodeOptions::default(), &[(Role::File, file)])?;
        let needed = Access::WRITER.needed | Permissions::RESIZE;
        let origin = change.add_origin("disk", Access { needed, ..Access::WRITER }, None);
        change.set_root(origin.id(), Some(node))?;
        let drained = change.drain().await?;
        change.commit(&drained).await?;
        drop(drained);
        let queue = Queue::open(&graph, &origin, &local, "queue");
        Ok(work(&queue).await)
    })
}

fn key(text: &str) -> LuksOptions {
    LuksOptions { key: Some(Secret::new(text)), ..LuksOptions::default() }
}

async fn write(queue: &Queue, offset: u64, bytes: &[u8]) {
    queue.request(Request::write(offset, IoBuffer::from_slice(bytes))).await.result.unwrap();
}

async fn read(queue: &Queue, offset: u64, length: usize) -> Vec<u8> {
    let vector = IoVector::zeroed(length);
    queue.request(Request::read(offset, vector.clone())).await.result.unwrap();
    vector.to_vec()
}

fn fresh(size: u64) -> Volume {
    let volume = Volume::new(&[]);
    let iteration_time = Duration::from_millis(1);
    let options =
        LuksCreateOptions { iteration_time, ..LuksCreateOptions::new(Secret::new("hush")) };
    crate::qcow2::testing::rig::with_file(&volume, async |file| {
        create(file, &options, size, Preallocation::Off).await.unwrap();
    });
    volume
}

#[test]
fn the_peer_reads_and_writes_the_same_disk() {
    let volume = fresh(1 << 20);
    with_disk(&volume, key("hush"), async |queue| {
        write(queue, 512, &[0x11; 1024]).await;
        write(queue, 700, &[0x22; 100]).await;
        write(queue, 64 << 10, &[0x33; 400 << 10]).await;
        let zeroes = Request::write_zeroes(100 << 10, 5000);
        queue.request(zeroes).await.result.unwrap();
    })
    .unwrap();
    let scratch = Scratch::new();
    let path = scratch.path();
    volume.save(&path);
    let image = format!("driver=luks,key-secret=s,file.filename={path}");
    let output = Command::new("qemu-io")
        .args(["--object", OBJECT, "--image-opts"])
        .args(["-c", "read -P 0x11 512 188", "-c", "read -P 0x22 700 100"])
        .args(["-c", "read -P 0x33 64k 36k", "-c", "read -P 0 100k 5000"])
        .args(["-c", "write -P 0x44 1020k 4k", &image])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && !text.contains("failed"), "{text}");
    with_disk(&Volume::from_file(&path), key("hush"), async |queue| {
        assert_eq!(read(queue, 1020 << 10, 4096).await, [0x44; 4096]);
        assert_eq!(read(queue, 690, 20).await, [[0x11; 10], [0x22; 10]].concat());
    })
    .unwrap();
}

#[test]
fn a_disk_that_grows_grows_with_zeros() {
    let volume = fresh(4096);
    with_disk(&volume, key("hush"), async |queue| {
        queue.request(Request::truncate(3 << 20)).await.result.unwrap();
        assert!(read(queue, 4096, (3 << 20) - 4096).await.iter().all(|byte| *byte == 0));
    })
    .unwrap();
    assert_eq!(volume.length(), 2_068_480 + (3 << 20));
}

#[test]
fn a_disk_is_opened_with_its_key_or_for_its_header() {
    let volume = fresh(4096);
    let fails = |options| with_disk(&volume, options, async |_| ()).unwrap_err();
    assert!(fails(LuksOptions::default()).to_string().contains("'key-secret' is required"));
    assert_eq!(fails(key("no")).kind(), ErrorKind::PermissionDenied);
    let metadata_only = LuksOptions { metadata_only: true, ..LuksOptions::default() };
    with_disk(&volume, metadata_only, async |queue| {
        let request = Request::read(0, IoVector::zeroed(512));
        assert!(queue.request(request).await.result.is_err());
    })
    .unwrap();
    assert!(with_disk(&Volume::new(&[0; 4096]), key("hush"), async |_| ()).is_err());
}
