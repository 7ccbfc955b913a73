//! Internal snapshots, made by the peer: writing to the disk must not change them.

use crate::qcow2::testing::Scratch;
use crate::qcow2::testing::rig::Rig;
use crate::qcow2::testing::volume::Volume;
use blockplex_graph::Request;

#[test]
fn a_snapshot_keeps_what_it_held() {
    let scratch = Scratch::new();
    for options in ["", "cluster_size=512", "compat=0.10,cluster_size=4k"] {
        let path = scratch.create(options, "2M");
        scratch.qemu_io(&path, "write -P 0x11 0 1M");
        scratch.qemu_img(&["snapshot", "-c", "before", &path]);
        let volume = Volume::from_file(&path);
        let mut rig = Rig::writable(&volume);
        let mut model = vec![0x11; 1 << 20];
        model.resize(2 << 20, 0);
        // The first write is past and the slices are in memory, so that tier 1 has its say.
        rig.write(1_500_000, &[4; 10]);
        model[1_500_000..1_500_010].fill(4);
        assert!(rig.read(0, 2 << 20) == model);
        rig.write(1000, &[2; 100_000]);
        model[1000..101_000].fill(2);
        // A second time: now the clusters are the disk's own.
        rig.write(2000, &[3; 500]);
        model[2000..2500].fill(3);
        rig.request(Request::discard(262_144, 131_072)).unwrap();
        model[262_144..393_216].fill(0);
        assert!(rig.read(0, 2 << 20) == model, "{options}");
        rig.close();
        volume.save(&path);
        scratch.check_clean(&path);
        assert!(scratch.contents(&path) == model, "{options}");
        scratch.qemu_img(&["snapshot", "-a", "before", &path]);
        let mut before = vec![0x11; 1 << 20];
        before.resize(2 << 20, 0);
        assert!(scratch.contents(&path) == before, "{options}: the snapshot changed");
        scratch.qemu_img(&["snapshot", "-d", "before", &path]);
        scratch.check_clean(&path);
    }
}
