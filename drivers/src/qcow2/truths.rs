//! All numbered truths of this driver: what holds them, and what fails when they break.
//!
//! Each stands, with its reasons, at the head of the file it is about. *Held by* names the function
//! that asserts it (in debug builds, where it is a matter of our own code) or that refuses what
//! breaks it (where it is a matter of the file or the caller); "the order in" names the only function
//! that has the steps in their order, which no state in memory could tell afterwards. `tests/tidy`
//! looks that no truth is missing here, and that all functions and tests exist.
//!
//! | truth | in short | held by | tests |
//! |---|---|---|---|
//! | Q1 | no input makes a codec panic, run on or allocate much | lints: no unwrap, no index, no cast that cuts | `damaged_images_do_no_harm`, `damaged_headers_never_panic_and_what_parses_comes_back`, `a_bomb_fills_one_cluster_at_most` |
//! | Q2 | arithmetic is checked before it is done | lints, as for Q1 | `out_of_range_fields_are_refused_before_any_shift`, `damaged_headers_never_panic_and_what_parses_comes_back` |
//! | Q3 | errors name field, value, place and rule, escaped | the order in `number` | `sentence_names_field_value_place_and_rule`, `strings_from_images_are_escaped_and_cut` |
//! | W1 | data and counts are durable before an entry | `assert_counted`; the order in `write_work` | `a_crash_at_any_moment_leaves_a_whole_image`, `an_entry_is_written_after_a_flush_of_its_data_and_counts` |
//! | W2 | an L2 table is durable before its L1 entry | `assert_counted`; the order in `make_table`, `write_work` | `an_entry_is_written_after_a_flush_of_its_data_and_counts`, `a_crash_at_any_moment_leaves_a_whole_image` |
//! | W3 | counts fall after what dropped the reference is durable | `take_ready` | `a_cluster_waits_for_its_users_and_for_the_disk`, `a_crash_at_any_moment_leaves_a_whole_image` |
//! | W4 | blocks, then the table, then the header | the order in `write_work` | `refcount_blocks_are_durable_before_the_table_and_the_table_before_the_header` |
//! | W5 | whoever waits for a round gets one that began after he came | `flush` | `a_flush_behind_a_running_flush_reaches_the_file_after_it`, `a_flush_that_waits_while_the_l1_table_moves_is_in_the_new_table` |
//! | W6 | a round that fails leaves dirty what it took | `settle`, also when it is torn down | `every_failed_write_of_the_file_leaves_a_whole_image`, `a_write_back_that_is_torn_down_with_its_loop_is_no_lost_update` |
//! | Y1 | the dirty bit is durable before refcounts are left out | `assert_may_defer` | `late_refcounts_are_not_written_at_a_flush_and_the_image_is_marked_first`, `a_dirty_bit_that_may_have_gone_is_set_again` |
//! | Y2 | it goes after a round that left nothing out | `mark_clean` | `late_refcounts_are_an_option_of_the_open_image`, `a_crash_at_any_moment_leaves_a_whole_image` |
//! | Y3 | what a cut takes back is written in time | the order in `cut_file` | `a_crash_while_space_is_given_back_leaves_a_whole_image`, `a_disk_that_shrinks_gives_its_space_back_and_forgets_what_was_there` |
//! | Y4 | the count of a new L2 table is written before the entry that names it | `write_refcounts` | `late_refcounts_are_not_written_at_a_flush_and_the_image_is_marked_first` |
//! | Y5 | the dirty bit stands over work whose middle is not whole | `hold_mark` | `a_crash_leaves_the_old_state_or_the_new_one` |
//! | H1 | the size is published first, then ranges are locked | `check_inside` | `a_write_that_was_admitted_before_leaves_nothing_past_the_new_end`, `a_disk_that_shrinks_and_grows_beside_writers_loses_nothing` |
//! | H2 | unallocated, then no tables, then the size | `cut_disk` | `a_crash_while_space_is_given_back_leaves_a_whole_image`, `a_failed_change_of_the_size_leaves_a_whole_image` |
//! | H3 | empty blocks leave the table durably before their clusters are used | the order in `cut_file` | `a_crash_while_refcount_blocks_go_leaves_a_whole_image` |
//! | H4 | the file is cut when the refcounts say so durably | `last_used_end` | `a_crash_while_space_is_given_back_leaves_a_whole_image` |
//! | HU1 | a header that may have changed gives the image up | `switch_header` | `a_change_of_the_size_that_fails_half_way_does_not_leave_two_l1_tables` |
//! | N1 | flags before counts | `add_references` | `a_crash_leaves_the_old_state_or_the_new_one`, `a_crash_while_a_snapshot_of_the_peer_is_applied_leaves_no_wrong_flag` |
//! | N2 | counts before names | the order in `count_and_name`, `switch_disk` | `a_crash_leaves_the_old_state_or_the_new_one` |
//! | N3 | one write of one sector switches | `switch_header` | `a_crash_leaves_the_old_state_or_the_new_one` |
//! | N4 | what fails before the switch is undone | the order in `count_and_name` | `a_failure_at_any_operation_harms_nothing`, `a_snapshot_that_fails_leaves_no_references` |
//! | N5 | while flags and counts disagree there is the dirty bit | `hold_mark` | `a_crash_leaves_the_old_state_or_the_new_one` |
//! | ME1 | no tables, durably, then no counts | `empty_at_once` | `a_crash_while_space_is_given_back_leaves_a_whole_image` |
//! | ME2 | step by step where others use clusters | `is_all_disk` | `an_image_that_is_made_empty_holds_nothing_and_is_small` |
//! | PK1 | a compressed cluster counts in each host cluster that it touches | the order in `free_entry` | `the_peer_reads_what_was_written_compressed_and_its_images_are_no_smaller`, `clusters_that_share_a_host_cluster_go_one_by_one` |
//! | PK2 | packing goes on only in a counted cluster | `allocate_bytes`, `stop_packing_in` | `nothing_is_packed_into_a_cluster_that_was_given_back`, `a_compressed_cluster_that_is_being_read_stays_until_it_is_read` |
//! | PK3 | a second host cluster is the next one in the file | `allocate_bytes` | `compressed_writes_beside_each_other_and_beside_others_lose_nothing` |
//! | E1 | nothing is written past the extent | `write_data`, `store_locked` | `an_entry_past_the_end_of_the_file_is_not_written_in_place` |
//! | E2 | the extent grows, and is cut only when nothing is handed out | `cover` | `several_loops_on_one_image_lose_nothing`, `a_longer_file_that_was_torn_down_with_its_loop_grows_no_more` |
//! | E3 | a file of fixed length is its own limit | the order in `cover` | `a_file_of_fixed_length_holds_an_image_among_old_bytes`, `a_full_device_of_fixed_length_fails_the_write_and_nothing_else` |
//! | L1 | a cluster enters limbo after its last entry has changed | the order in `commit`, `erase_step`, `make_table` | `a_cluster_with_a_read_in_flight_is_not_used_again`, `several_loops_on_one_image_lose_nothing` |
//! | L2 | it leaves when its users have ended and the change is durable | `take_ready` | `a_cluster_waits_for_its_users_and_for_the_disk`, `a_freed_cluster_is_not_used_again_before_a_flush`, `a_cluster_with_a_write_in_flight_is_not_used_again` |
//! | L3 | limbo is bounded | `push` | `what_waits_is_bounded`, `a_request_that_lasts_does_not_make_others_flush` |
//! | S1 | words change under the slice's mutex | the type `SliceEditor` | `a_slice_changed_after_its_snapshot_is_dirty_again` |
//! | S2 | a dirty slice is on the list that keeps it | `remove` | `dirty_slices_outlive_the_budget`, `a_tiny_cache_loses_nothing` |
//! | S3 | both words of an extended entry are one | the type `SequenceCount` | `a_pair_is_read_whole_and_after_what_came_before_it`, `neighbours_in_one_cluster_do_not_lose_each_others_bits` |
//! | C1 | the budget bounds what is clean and unused; nobody fails for want of a place | `trim`, `insert` | `more_writers_than_cached_tables_all_get_through`, `dirty_slices_outlive_the_budget` |
//! | C2 | a slice is dropped only when it is as on disk | `remove` | `eviction_spares_slices_that_are_referred_to`, `cleaning_at_every_operation_of_the_file_loses_nothing` |
//! | D1 | a link's slice never changes | the type `Link` | `readers_see_whole_slices_while_others_come_and_go` |
//! | D2 | a link is freed after its last reader | `remove` | `readers_see_whole_slices_while_others_come_and_go` |
//! | D3 | no guard is held across an await | lint: no such guard across an await | `readers_see_whole_slices_while_others_come_and_go` |
//! | LK1 | locks are taken in the order of their ranks | `check` in the type `Ranked` | `a_lock_taken_after_one_of_higher_rank_is_found` |
//! | LK2 | looking up takes none of them | `look_up` | `a_read_that_hits_the_cache_waits_for_nothing_that_another_request_holds` |
//! | I1 | autoclear bits and bitmaps first | `prepare_for_writing`, `write_round` | `autoclear_bits_are_cleared_before_the_first_write_and_not_by_reading`, `autoclear_bits_that_could_not_be_cleared_are_cleared_before_the_first_write` |
//! | I2 | a corrupt image is marked once and not written any more | `prepare_for_writing` | `a_damaged_entry_fails_its_requests_and_marks_the_image` |
//! | I3 | an image whose metadata is in doubt is given up, and says so | `check_known` | `a_change_of_the_size_that_fails_half_way_does_not_leave_two_l1_tables`, `a_panic_in_a_write_back_gives_the_image_up`, `a_write_to_a_kept_place_that_was_torn_down_lets_nobody_write_there` |
//! | OC1 | no write over metadata of another kind | `check_write` | `a_write_of_data_over_a_table_is_refused_and_marks_the_image`, `a_snapshot_that_claims_the_disks_l1_table_stops_the_first_change_of_it` |
//! | U1 | no bit of a neighbour is lost | the type `SliceEditor` | `neighbours_in_one_cluster_do_not_lose_each_others_bits` |
//! | U2 | a write in a cluster's own place fills to the borders of new subclusters, and no further | the order in `fill_of` | `copy_on_write_ends_at_the_borders_of_subclusters`, `a_write_into_new_subclusters_leaves_those_beside_them_to_others` |
//! | U3 | a new place takes over all allocated subclusters | `commit_extended` | `any_workload_on_subclusters_leaves_what_the_peer_reads` |
//! | U4 | a cluster in which nothing is allocated may keep its place | `own_place` | `any_workload_on_subclusters_leaves_what_the_peer_reads` |
//! | X1 | an entry names its own offset in the data file | `slice` | `an_entry_that_names_another_place_is_damage` |
//! | X2 | the data file ends where the disk ends | `writable_tail`, `prepare_data` | `a_write_to_the_last_cluster_leaves_the_data_file_as_long_as_the_disk`, `a_late_write_behind_the_end_of_a_data_file_does_not_come_back` |
//! | X3 | a raw data file reads like the disk | the order in `erase_step` | `a_raw_data_file_is_zeroed_before_its_entries`, `a_crash_with_a_data_file_leaves_a_whole_image` |
//! | X4 | holes come before entries, under the lock of the range | the order in `erase_step` | `a_late_hole_does_not_hit_what_is_written_to_the_same_place` |
//! | X5 | the data file is flushed before an entry is written | the order in `write_work` | `the_data_file_is_flushed_before_an_entry_is_written`, `a_crash_with_a_data_file_leaves_a_whole_image` |
//! | EN1 | places hold ciphertext in all sectors | `zeros_are_zeros` | `zeros_are_zeros_wherever_they_come_from`, `the_peer_reads_what_was_written_here` |
//! | EN2 | sectors are numbered by their place, or by the disk's | `numbered_by` | `copies_of_shared_and_backing_clusters_are_decrypted_by_the_old_place_and_encrypted_by_the_new`, `the_peer_reads_what_was_written_here` |
//! | EN3 | a key is known to be right before it is used | `unlock` | `without_a_key_nothing_is_opened_but_metadata`, `a_wrong_password_opens_nothing` |
//! | EN4 | requests are whole sectors | `limits` | `suites_and_large_requests_read_back` |
//! | P1 | bitmaps are marked as in use before the first write | the order in `prepare_for_writing` | `after_a_crash_no_bitmap_misses_a_write`, `what_a_writer_did_not_store_can_only_be_removed` |
//! | P2 | bits, tables and directory are durable before the header names them | the order in `store_bitmaps` | `after_a_crash_no_bitmap_misses_a_write`, `a_failure_while_bitmaps_are_stored_leaves_them_marked_and_the_image_whole` |
//! | P3 | what was in use can only be removed | `usable` | `what_a_writer_did_not_store_can_only_be_removed` |
//! | M1 | marking takes no lock and loses nothing | there is no lock in `mark` | `marks_of_two_threads_are_both_there`, `threads_that_mark_at_once_lose_nothing` |
//! | M2 | clearing is for who has made sure that nobody marks | a drain, by `manage` | `clearing_a_part_of_a_full_leaf_keeps_the_marks_of_other_chunks`, `clearing_what_is_being_marked_may_lose_the_mark` |
//! | M3 | no bit past the end of the disk is stored | `set_size` | `the_border_bit_stays_when_the_disk_grows_and_goes_when_it_shrinks_past_it`, `random_operations_agree_with_a_plain_bitmap` |
//! | K1 | ambiguous damage ends a repair before it writes | the order in `check` | `what_is_ambiguous_is_reported_and_left_alone`, `snapshots_that_cannot_be_followed_end_a_repair` |
//! | K2 | counts rise first and fall last | the order in `fix_all` | `a_repair_may_be_cut_off_at_any_moment` |
//! | K3 | a structure with gaps is made anew, and one write puts it in place | `change_header` | `a_refcount_structure_that_cannot_be_is_made_anew`, `a_repair_may_be_cut_off_at_any_moment` |
//! | K4 | memory and time follow the file | the order in `check` | `claims_cost_neither_time_nor_memory` |
//! | K5 | the marks go last | the order in `fix_all` | `the_marks_go_when_the_image_is_whole`, `a_repair_may_be_cut_off_at_any_moment` |
//! | J1 | what a header will refer to is durable before | the order in `write_structure`, `downgrade` | `an_amendment_may_be_cut_off_at_any_moment` |
//! | J2 | version 3 first, version 2 last | the order in `amend` | `an_amendment_may_be_cut_off_at_any_moment`, `a_downgrade_keeps_the_zeros_and_the_snapshots` |
//! | J3 | a new width is a new structure that one write puts in place | `change_header` | `refcounts_of_every_width_become_those_of_every_other`, `an_amendment_may_be_cut_off_at_any_moment` |
