//! The audit log: what was written is read, in pages, and only retention takes it away.

use aether_store::{AuditEntry, AuditFilter, Outcome, PageRequest, Store};
use aether_types::{AuditId, ErrorCode, KeyId, ProjectId, Timestamp};

fn new_entry(at: i64) -> AuditEntry {
    AuditEntry {
        id: AuditId::new(),
        at: Timestamp::from_unix_ms(at),
        project_id: Some(ProjectId::DEFAULT),
        key_id: Some(KeyId::new()),
        key_prefix: Some("aeth_12345678".into()),
        action: Some("vms:write".parse().unwrap()),
        method: "POST".into(),
        path: "/vms/web/stop".into(),
        made: Some("/tasks/1".into()),
        outcome: Outcome::Done,
        status: 202,
        code: None,
        request_id: "r-1".into(),
        address: Some("192.0.2.7".parse().unwrap()),
    }
}

async fn read(store: &impl Store, filter: AuditFilter) -> Vec<AuditEntry> {
    store.audit_entries(filter, PageRequest::default()).await.unwrap().items
}

pub(crate) async fn an_entry_is_read_as_it_was_written_once(store: &impl Store) {
    let one = new_entry(1);
    let nobody = AuditEntry {
        project_id: None,
        key_id: None,
        key_prefix: None,
        action: None,
        made: None,
        outcome: Outcome::Refused,
        status: 401,
        code: Some(ErrorCode::Unauthorized),
        address: Some("2001:db8::1".parse().unwrap()),
        ..new_entry(2)
    };
    for entry in [&one, &nobody, &one] {
        store.append_audit(entry.clone()).await.unwrap();
    }
    assert_eq!(read(store, AuditFilter::default()).await, [nobody, one]);
}

pub(crate) async fn the_audit_log_is_filtered_and_paged(store: &impl Store) {
    let theirs = ProjectId::new();
    let mut all = Vec::new();
    for n in 1..=6 {
        let entry = AuditEntry {
            project_id: Some(if n % 2 == 0 { theirs } else { ProjectId::DEFAULT }),
            outcome: if n == 5 { Outcome::Refused } else { Outcome::Done },
            // Two of them at one moment.
            ..new_entry(if n == 4 { 3 } else { n })
        };
        store.append_audit(entry.clone()).await.unwrap();
        all.insert(0, entry);
    }
    let of = |project| AuditFilter { project: Some(project), ..AuditFilter::default() };
    assert_eq!(read(store, of(theirs)).await, [all[0].clone(), all[2].clone(), all[4].clone()]);
    let refused = AuditFilter { outcomes: vec![Outcome::Refused], ..AuditFilter::default() };
    assert_eq!(read(store, refused).await, all[1..2]);
    let key = AuditFilter { key: all[3].key_id, ..AuditFilter::default() };
    assert_eq!(read(store, key).await, all[3..4]);
    let time = |ms| Some(Timestamp::from_unix_ms(ms));
    let between = AuditFilter { since: time(2), until: time(5), ..AuditFilter::default() };
    assert_eq!(read(store, between).await, all[2..5]);
    let mut page = PageRequest { limit: 4, after: None };
    let first = store.audit_entries(AuditFilter::default(), page).await.unwrap();
    page.after = first.next;
    let second = store.audit_entries(AuditFilter::default(), page).await.unwrap();
    assert_eq!([first.items, second.items].concat(), all);
    assert_eq!(second.next, None);
}

pub(crate) async fn only_what_is_old_is_taken_from_the_audit_log(store: &impl Store) {
    for n in 1..=3 {
        store.append_audit(new_entry(n)).await.unwrap();
    }
    assert_eq!(store.prune_audit(Timestamp::from_unix_ms(1)).await.unwrap(), 0);
    assert_eq!(store.prune_audit(Timestamp::from_unix_ms(3)).await.unwrap(), 2);
    let left = read(store, AuditFilter::default()).await;
    assert_eq!(left.iter().map(|entry| entry.at.unix_ms()).collect::<Vec<_>>(), [3]);
}
