//! A connection goes while it commits.

use aether_postgres::{Database, Limits};
use aether_store::{Begin, Capacity, PageRequest, PostgresStore, Store, StoreError, VmFilter};
use aether_types::{ErrorCode, TaskKind, TaskState, VmEvent, VmState, WorkerId};

use crate::{
    proxy::{Cut, Proxy},
    support,
};

async fn behind_a_proxy() -> Option<(PostgresStore, Proxy, impl Sized)> {
    let (_, test) = crate::engines::postgres().await?;
    let name = test.execute("select current_database()");
    let proxy = Proxy::before(&test, name.trim()).await;
    let limits = Limits { acquire_timeout: std::time::Duration::from_secs(2), ..Limits::default() };
    let database = Database::open(proxy.config.clone().limits(limits)).await.unwrap();
    Some((PostgresStore::open(&database).await.unwrap(), proxy, test))
}

#[tokio::test]
async fn a_commit_that_nobody_heard_of_is_found_out_and_done_once() {
    let Some((store, proxy, _kept)) = behind_a_proxy().await else { return };
    for cut in [Cut::Before, Cut::After] {
        let name = format!("vm-{cut:?}").to_lowercase();
        proxy.set(cut);
        let made = support::create(&store, &name).await;
        assert!(proxy.has_cut() && !made.repeated);
        assert_eq!(store.task(made.task.id).await.unwrap().unwrap().state, TaskState::Pending);

        // Each of these would be refused if it were done a second time.
        proxy.set(cut);
        let begun = store.begin_attempt(made.task.id, WorkerId::new().into(), 1).await.unwrap();
        assert!(matches!(begun, Begin::Go(_)) && proxy.has_cut());
        proxy.set(cut);
        let end = support::completed(Some(VmEvent::Started));
        let ended = store.end_attempt(made.task.id, 1, end).await.unwrap();
        assert!(proxy.has_cut());
        assert_eq!((ended.state, ended.attempts), (TaskState::Completed, 1));
        assert_eq!(store.vm(made.vm.id).await.unwrap().unwrap().state, VmState::Running);
        assert_eq!(store.vm_history(made.vm.id).await.unwrap().len(), 2);
    }
}

#[tokio::test]
async fn a_request_in_doubt_is_answered_when_it_is_repeated() {
    let Some((store, proxy, _kept)) = behind_a_proxy().await else { return };
    let ask = || {
        let (vm, task) = (support::new_vm("once"), support::new_task(TaskKind::VmCreate));
        store.create_vm(vm, task, Capacity::default(), Some(support::key("k", 1)))
    };
    proxy.set(Cut::AfterAndClosed);
    let doubt = ask().await.unwrap_err();
    assert!(matches!(doubt, StoreError::InDoubt { .. }), "{doubt:?}");
    assert_eq!(doubt.code(), ErrorCode::Unavailable);
    proxy.set(Cut::Nothing);
    let answer = ask().await.unwrap();
    assert!(answer.repeated);
    let all = store.vms(VmFilter::default(), PageRequest::default()).await.unwrap();
    assert_eq!(all.items.len(), 1);
    assert_eq!(store.undispatched(10).await.unwrap().len(), 1);
}
