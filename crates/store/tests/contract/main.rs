//! What every store keeps, whatever is under it. A new implementation is done when this passes:
//! add a module like `sqlite` at the end.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

mod attempts;
mod lists;
mod requests;

/// Runs every test of the suite on one implementation.
macro_rules! contract {
    ($make:path: $($module:ident::{$($test:ident),+ $(,)?}),+ $(,)?) => {
        $($(
            #[tokio::test]
            async fn $test() {
                let (store, _kept) = $make().await;
                crate::$module::$test(&store).await;
            }
        )+)+
    };
}

mod sqlite {
    use aether_store::{Durability, SqliteStore};

    async fn open() -> (SqliteStore, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let store =
            SqliteStore::open(&folder.path().join("store.db"), Durability::Process).await.unwrap();
        (store, folder)
    }

    contract! {
        open:
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
        lists::{
            pages_are_newest_first_and_complete,
            vms_are_filtered,
            tasks_are_filtered,
            the_outbox_holds_what_is_owed_oldest_first,
            open_tasks_are_those_that_have_not_ended,
            expired_vms_are_found_until_they_are_deleted,
            keys_round_trip,
            ping_answers,
        },
    }
}
