//! What every store keeps, whatever is under it. A new implementation is done when this passes:
//! add a module like `sqlite` at the end.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod engines;
mod support;

mod attempts;
mod audit;
mod capacity;
mod events;
mod keys;
mod lists;
mod placement;
mod projects;
mod queues;
mod quotas;
mod requests;
mod snapshots;
mod templates;
mod tools;
mod workers;

/// Runs every test of the suite on one implementation, which `open` makes, with what must be kept
/// for as long as it is used. `None`: it cannot be had on this host, and that was said.
macro_rules! contract {
    ($open:path: $($module:ident::{$($test:ident),+ $(,)?}),+ $(,)?) => {
        $($(
            #[tokio::test]
            async fn $test() {
                let Some((store, _kept)) = $open().await else { return };
                crate::$module::$test(&store).await;
            }
        )+)+
    };
    ($open:path) => {
        contract! {
            $open:
            requests::{
                a_created_vm_and_its_task_are_recorded_and_owed,
                a_name_is_free_again_only_when_its_vm_is_deleted,
                a_repeated_request_is_answered_with_the_first_task,
                an_idempotency_key_with_another_request_is_refused,
                a_refused_request_does_not_use_up_its_idempotency_key,
                requests_on_a_vm_follow_its_state_machine,
                a_command_is_refused_unless_the_vm_takes_commands,
                a_stop_fails_what_has_not_begun,
                a_deletion_ends_what_is_pending_and_asks_what_runs_to_end,
                a_deletion_is_answered_with_the_earlier_one,
                a_deletion_that_was_given_up_can_be_asked_for_again,
                a_cancelled_creation_leaves_a_failed_vm,
                a_pending_execution_is_cancelled_with_its_task,
                a_running_execution_is_asked_to_end,
                a_change_of_state_cannot_be_cancelled,
                unknown_ids_are_typed_errors,
            },
            attempts::{
                an_attempt_is_counted_and_fenced_by_its_epoch,
                a_late_answer_is_refused_whole,
                a_task_ends_once,
                an_attempt_cannot_end_as_running,
                used_up_attempts_end_the_task_and_fail_the_vm,
                an_execution_with_used_up_attempts_is_lost,
                a_task_given_back_is_owed_again,
                a_task_given_back_too_often_ends,
                a_task_given_back_after_a_request_to_end_is_cancelled,
                a_started_execution_is_not_started_for_another_boot,
                an_execution_keeps_its_result_and_output,
                an_execution_ends_with_its_task,
                a_vm_that_is_being_deleted_does_not_come_back,
                history_keeps_every_state_and_survives_deletion,
                a_change_without_a_transition_is_refused,
                a_patch_keeps_what_it_does_not_name,
            },
            events::{
                every_change_is_an_event,
                a_failure_and_a_worker_say_what_they_must,
                what_the_platform_makes_for_itself_is_no_event,
                events_are_filtered,
                a_reader_goes_on_after_a_number_or_from_a_time,
                a_reader_beside_writers_misses_nothing,
                only_retention_takes_events_away,
            },
            lists::{
                pages_are_newest_first_and_complete,
                vms_are_filtered,
                tasks_are_filtered,
                the_outbox_holds_what_is_owed_oldest_first,
                open_tasks_are_those_that_have_not_ended,
                expired_vms_are_found_until_they_are_deleted,
                a_secret_is_the_first_that_was_proposed,
                those_who_propose_a_secret_at_once_get_the_same,
                ping_answers,
            },
            keys::{
                a_key_is_found_by_its_hash_and_by_nothing_like_it,
                a_revoked_key_has_no_hash_and_is_kept,
                the_use_of_a_key_is_kept_coarsely,
                keys_are_listed_by_project_and_in_pages,
                a_project_has_no_more_keys_than_there_may_be,
                keys_that_are_long_of_no_use_are_forgotten,
            },
            projects::{
                what_there_was_is_the_default_projects,
                projects_have_names_and_are_listed,
                a_project_is_deleted_when_nothing_is_left_of_it,
                a_vm_of_another_project_is_none_for_every_request,
                names_are_of_their_project,
                lists_are_of_a_project,
                a_vm_begins_only_as_what_its_project_has,
                nothing_is_made_in_a_project_that_is_gone,
            },
            quotas::{
                every_way_to_a_machine_is_held_to_the_quota,
                a_fork_has_room_for_all_of_it_or_is_refused_whole,
                tasks_that_wait_are_bounded_and_what_gives_back_is_not,
                creations_and_starts_at_once_do_not_exceed_a_quota,
                a_repetition_needs_no_quota_and_others_have_their_own,
                a_quota_that_is_lowered_takes_nothing_away,
            },
            snapshots::{
                a_snapshot_and_its_task_are_recorded_and_owed,
                a_snapshot_is_refused_unless_the_vm_runs_or_is_paused,
                a_snapshots_name_is_free_again_when_it_failed_or_is_deleted,
                a_repeated_snapshot_or_fork_is_answered_with_the_first,
                a_fork_records_its_snapshot_and_clones_whole_or_not_at_all,
                a_snapshot_fails_with_its_task,
                what_a_late_attempt_says_of_a_snapshot_does_not_count,
                a_snapshot_can_be_cancelled_and_a_suspension_cannot,
                a_suspension_stops_the_vm_and_ends_pending_work,
                a_start_uses_up_the_memory_however_it_ends,
                a_suspended_vm_that_was_found_stopped_has_its_memory,
                a_deletion_ends_snapshots_and_gives_up_the_memory,
                only_a_users_snapshot_that_nothing_begins_as_is_deleted,
                a_vm_begins_only_as_a_users_snapshot_that_can_be_ready,
                a_forks_snapshot_goes_when_its_vms_have_begun,
                snapshots_are_filtered_and_paged,
            },
            templates::{
                a_build_is_recorded_whole_and_owed,
                a_vm_that_builds_is_not_listed_nor_counted_but_starts,
                a_template_that_is_ready_takes_the_name_from_an_older_one,
                an_equal_build_that_is_under_way_is_the_answer,
                a_repeated_build_is_answered_with_the_first,
                a_template_fails_with_its_task,
                a_build_can_be_cancelled,
                progress_is_kept_and_fenced,
                a_template_is_deleted_with_its_snapshot,
                a_vm_begins_only_as_a_template_that_can_be_ready,
                templates_are_filtered_and_paged,
            },
            tools::{
                a_vm_has_what_it_asks_for_until_it_got_it,
                a_template_keeps_its_tools_and_they_make_it_another,
                a_build_of_tools_is_recorded_and_owed_and_of_no_vm,
                a_build_of_tools_that_fails_says_why,
                a_build_of_tools_can_be_cancelled,
                a_repeated_build_of_tools_is_answered_with_the_first,
                the_progress_of_a_task_is_kept_counted_and_fenced,
            },
            audit::{
                an_entry_is_read_as_it_was_written_once,
                the_audit_log_is_filtered_and_paged,
                only_what_is_old_is_taken_from_the_audit_log,
            },
            capacity::{
                there_are_no_more_vms_than_there_may_be,
                no_more_vms_start_at_once_than_may,
                creations_at_the_same_time_do_not_exceed_the_bound,
                a_fork_has_room_for_all_of_its_vms_or_is_refused,
                a_repetition_needs_no_room,
            },
            workers::{
                a_worker_registers_again_and_again,
                a_worker_that_drains_does_so_until_it_is_told_otherwise,
                a_worker_is_lost_once_and_only_by_its_last_heartbeat,
                what_a_lost_worker_writes_changes_nothing,
                what_a_worker_said_before_it_registered_anew_does_not_count,
                the_vms_of_a_lost_worker_fail_and_its_tasks_end_once,
                a_lost_workers_creations_go_to_another,
                a_creation_with_used_up_attempts_is_not_tried_elsewhere,
                a_vm_of_a_lost_worker_can_be_deleted_by_any,
                a_worker_that_is_back_keeps_what_was_not_settled,
            },
            queues::{
                queues_tell_what_waits_and_what_runs,
                a_dead_letter_is_one_until_it_is_retried,
            },
            placement::{
                without_a_registry_whoever_claims_a_vm_has_it,
                vms_go_where_the_least_is_promised,
                a_vm_waits_where_nobody_has_room_and_goes_on_when_there_is,
                a_waiting_vm_can_be_cancelled_and_deleted,
                creations_at_the_same_time_never_exceed_what_a_worker_may_promise,
                a_vm_goes_only_where_it_wants_to_be,
                a_worker_that_drains_or_left_gets_no_vms,
                a_task_is_begun_only_where_its_vm_is,
                a_snapshots_vms_go_where_it_is,
                a_templates_vms_go_to_who_has_its_folder,
            },
        }
    };
}

mod sqlite {
    use aether_store::{Durability, SqliteStore};

    async fn open() -> Option<(SqliteStore, tempfile::TempDir)> {
        let folder = tempfile::tempdir().unwrap();
        let store =
            SqliteStore::open(&folder.path().join("store.db"), Durability::Process).await.unwrap();
        Some((store, folder))
    }

    contract!(open);
}

mod postgres {
    contract!(crate::engines::postgres);
}
