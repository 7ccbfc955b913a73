use super::*;

/// An image of a header, a table of one cluster, and a block that counts the three of them.
fn small(cluster_bits: u32, order: u32) -> Allocation {
    let geometry = Geometry::new(cluster_bits, order, false).unwrap();
    let size = geometry.cluster_size();
    let mut table = vec![0; (size / 8) as usize];
    table[0] = 2 * size;
    let mut allocation = Allocation::new(geometry, table, (size, 1), 3 * size);
    let mut block = Block::new(vec![0; size as usize].into_boxed_slice(), order);
    for index in 0..3 {
        block.set(index, 1).unwrap();
    }
    allocation.insert_block(0, block);
    allocation.metadata.extend(0..3, Structure::Other);
    allocation
}

fn done<T: std::fmt::Debug>(attempt: Attempt<T>) -> T {
    match attempt {
        Attempt::Done(value) => value,
        other => panic!("{other:?}"),
    }
}

/// Every cluster handed out is counted once, and nothing else is.
#[test]
fn no_cluster_is_handed_out_twice_while_blocks_and_table_grow() {
    for order in 0..=6 {
        let mut allocation = small(9, order);
        allocation.max_blocks = usize::MAX;
        let mut seen: std::collections::HashSet<u64> = [0, 1, 2].into();
        for round in 0..20_000_u64 {
            let run = done(allocation.allocate(1 + round % 3));
            for cluster in run.offset / 512..run.offset / 512 + run.clusters {
                assert!(seen.insert(cluster), "order {order}: cluster {cluster} twice");
                assert!(run.zeroed, "nothing was freed");
            }
        }
        // What is left are the blocks and the tables.
        for (index, entry) in allocation.table.iter().enumerate().filter(|(_, entry)| **entry != 0)
        {
            assert!(index == 0 || seen.insert(entry / 512), "block {index} on top of something");
        }
        let tables = allocation.next_place.into_iter().map(|(at, count)| (at / 512, count));
        for (first, count) in tables.chain(allocation.abandoned.clone()) {
            assert!((first..first + count).all(|cluster| seen.insert(cluster)));
        }
        let counted: u64 = allocation.blocks.values().map(|b| b.len() as u64 - b.free()).sum();
        assert_eq!(counted, seen.len() as u64, "order {order}");
    }
}

#[test]
fn a_freed_cluster_is_used_again_before_the_file_grows_and_is_not_taken_for_zero() {
    let mut allocation = small(16, 4);
    let run = done(allocation.allocate(10));
    assert_eq!((run.offset, run.clusters, run.zeroed), (3 << 16, 10, true));
    assert_eq!(done(allocation.release(5)), 0);
    let again = done(allocation.allocate(4));
    assert_eq!((again.offset, again.clusters, again.zeroed), (5 << 16, 1, false));
    assert_eq!(done(allocation.allocate(1)).offset, 13 << 16);
}

#[test]
fn the_file_ends_with_the_bytes_that_are_used_of_its_last_cluster() {
    let mut allocation = small(16, 4);
    done(allocation.allocate(2));
    assert_eq!(allocation.file_end(), 5 << 16);
    allocation.short_end = Some((4 << 16) + 100);
    assert_eq!(allocation.file_end(), (4 << 16) + 100);
    assert_eq!(done(allocation.release(4)), 0);
    done(allocation.allocate(1));
    assert_eq!(allocation.file_end(), 5 << 16, "somebody else has it now");
    let place = done(allocation.allocate_bytes(300));
    assert_eq!(allocation.file_end(), place + 300);
}

#[test]
fn a_cluster_with_metadata_is_never_handed_out() {
    let mut allocation = small(16, 4);
    allocation.metadata.insert(4, Structure::Other);
    assert_eq!(done(allocation.allocate(1)).offset, 3 << 16);
    let overlap = Attempt::Failed(AllocationError::Overlap(4 << 16));
    assert_eq!(allocation.allocate(1), overlap, "Q09");
}

#[test]
fn a_cluster_without_references_cannot_lose_one() {
    let mut allocation = small(16, 4);
    let uncounted = |cluster: u64| Attempt::Failed(AllocationError::Uncounted(cluster << 16));
    assert_eq!(allocation.release(9), uncounted(9));
    assert_eq!(allocation.release(40_000), uncounted(40_000));
}

#[test]
fn a_long_run_at_the_end_is_counted_whole() {
    for order in 0..=6 {
        let mut allocation = small(9, order);
        allocation.max_blocks = usize::MAX;
        let run = done(allocation.allocate_tail(9000));
        assert_eq!(run.clusters, 9000);
        for cluster in run.offset / 512..run.offset / 512 + 9000 {
            assert_eq!(done(allocation.refcount(cluster)), 1, "order {order}");
        }
        let next = done(allocation.allocate(1));
        assert!(next.offset < run.offset || next.offset >= run.offset + 9000 * 512);
    }
}
